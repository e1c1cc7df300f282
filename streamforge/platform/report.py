"""What can be said of a platform: its processes as the supervisor sees them, and as they see themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

from streamforge import broker
from streamforge.broker import BrokerState, BrokerStatus
from streamforge.contracts import load_contracts
from streamforge.errors import RetryableSourceError, StreamForgeError
from streamforge.events import ProcessEvent
from streamforge.platform.lifecycle import supervisor_process
from streamforge.platform.plan import PlatformFiles, ProcessPlan, read_plan
from streamforge.platform.supervisor import (
    History,
    SupervisedProcess,
    SupervisorClient,
    read_history,
    socket_path,
)
from streamforge.settings import Settings
from streamforge.supervision import read_process_states

_EVENTS_WITHIN_S = 600.0
_UP = ("RUNNING", "STARTING")


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessReport:
    """One process of the platform.

    Args:
        state: the supervisor's word, or `NOT RUNNING` when there is no supervisor.
        last_end: how it ended last in this run; None when it never did.
        own_state: what it says of itself in `queue-events`; None when it has not spoken lately.
        positions: next offset of each topic-partition it has made durable.
        lag: records behind the end of each topic-partition.
    """

    name: str
    state: str
    pid: int | None
    uptime_s: float | None
    restarts: int
    last_end: str | None
    own_state: str | None
    positions: dict[str, int]
    lag: dict[str, int]
    counters: dict[str, float]
    ports: dict[str, int]
    log_file: str

    @property
    def is_up(self) -> bool:
        """Return whether the supervisor has it running."""
        return self.state in _UP


@dataclasses.dataclass(frozen=True, slots=True)
class PlatformReport:
    """State of a whole platform: supervisor, broker, Dagster's address, processes, and what could not be found out."""

    supervisor_pid: int | None
    broker: BrokerStatus
    ui_url: str | None
    processes: tuple[ProcessReport, ...]
    notes: tuple[str, ...]

    @property
    def is_well(self) -> bool:
        """Return whether everything that was started runs."""
        return self.supervisor_pid is not None and all(process.is_up for process in self.processes)

    def processes_as_dicts(self) -> list[dict[str, Any]]:
        """Return the processes as plain values for a JSON report."""
        return [dataclasses.asdict(process) for process in self.processes]


def report(settings: Settings) -> PlatformReport:
    """Return the state of the platform of this home; a part that does not answer becomes a note."""
    files = PlatformFiles(settings.home_path)
    plan = read_plan(files)
    running = supervisor_process(files)
    notes: list[str] = []
    supervised: dict[str, SupervisedProcess] = {}
    if running is not None:
        try:
            supervised = SupervisorClient(socket_path(files)).processes()
        except RetryableSourceError as error:
            notes.append(str(error))
    broker_status = broker.status(settings)
    events = _latest_events(settings, broker_status, notes)
    histories = read_history(files)
    processes = tuple(
        _process_report(item, supervised.get(item.name), histories.get(item.name), events.get((item.kind, item.slot)))
        for item in (plan.processes if plan else ())
    )
    if plan is None:
        notes.append(f"no platform was ever started in {files.home}: run `streamforge up`")
    return PlatformReport(
        supervisor_pid=None if running is None else running.pid,
        broker=broker_status,
        ui_url=plan.ui_url if plan else None,
        processes=processes,
        notes=tuple(notes),
    )


def _latest_events(
    settings: Settings, broker_status: BrokerStatus, notes: list[str]
) -> dict[tuple[str, str], ProcessEvent]:
    """Return the latest event of each kind and slot; reads nothing when the broker does not answer."""
    if broker_status.state not in (BrokerState.RUNNING, BrokerState.EXTERNAL):
        return {}
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    try:
        states = read_process_states(settings, contracts, within_s=_EVENTS_WITHIN_S)
    except StreamForgeError as error:
        notes.append(f"positions and lag are unknown: {error}")
        return {}
    latest: dict[tuple[str, str], ProcessEvent] = {}
    for event in sorted(states.values(), key=lambda event: event.ts_ns):
        latest[event.kind, event.slot] = event
    return latest


def _process_report(
    plan: ProcessPlan, supervised: SupervisedProcess | None, history: History | None, event: ProcessEvent | None
) -> ProcessReport:
    return ProcessReport(
        name=plan.name,
        state="NOT RUNNING" if supervised is None else supervised.state,
        pid=None if supervised is None else supervised.pid,
        uptime_s=None if supervised is None else supervised.uptime_s,
        restarts=0 if history is None else max(history.restarts, 0),
        last_end=None if history is None else history.last_end,
        own_state=None if event is None else str(event.state),
        positions={} if event is None else event.positions,
        lag={} if event is None else event.lag,
        counters={} if event is None else event.counters,
        ports=plan.ports,
        log_file=plan.log_file,
    )
