"""Which processes the platform has: commands, ports and log files. Nothing here starts anything."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from pydantic import SecretStr

from streamforge.gnn.libraries import missing_libraries
from streamforge.processes import LOOPBACK, remembered_ports
from streamforge.settings import Settings

BROKER = "broker"
SIMULATOR = "simulator"
LOADER = "loader"
INFERENCE = "inference"
CONSUMERS = ("parser", "bars", "history-parser", INFERENCE, "writer")
UI = "ui"
"""Name of the port that serves pages for people."""
SIMULATED_VENUE = "SIM"
RECORDED_VENUE = "BINANCE"
_SLOT = "0"
_METRICS = "metrics"
_READY_URLS = {_METRICS: f"http://{LOOPBACK}:{{port}}/ready", UI: f"http://{LOOPBACK}:{{port}}/server_info"}
_STOP_ORDER = (SIMULATOR, LOADER, *CONSUMERS, BROKER)
PORT_RELEASE_S = 2.0
"""How long a remembered port that is taken is waited for."""
# Of a process that is under our command, not of the platform.
_NOT_INHERITED = frozenset({"log_file"})


class ProcessPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the platform.

    Args:
        name: its name under the supervisor.
        kind: what it is in `queue-events`.
        command: what is run.
        ports: what it listens on, by name; `metrics` serves `/ready`, `ui` pages for people.
        log_file: where its output goes.
        stop_rank: ends happen in this order, one after the other: first what feeds, last what is fed.
        stop_deadline_s: seconds from SIGTERM to SIGKILL.
        is_on_demand: it is not started with the others, but when somebody asks the supervisor for it.
        stops_children: SIGTERM goes to the processes that it has started too.
        starts_after: names of what must be ready before it is started with the others.
    """

    name: str
    kind: str
    slot: str
    command: list[str]
    ports: dict[str, int]
    log_file: str
    stop_rank: int
    stop_deadline_s: int = 30
    is_on_demand: bool = False
    stops_children: bool = False
    starts_after: tuple[str, ...] = ()

    @property
    def ready_url(self) -> str | None:
        """Return what answers with success once it is ready, where it has that."""
        return next(
            (url.format(port=self.ports[name]) for name, url in _READY_URLS.items() if name in self.ports), None
        )


class PlatformPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All processes of one platform in the order of their start, and notes for people."""

    home: str
    processes: list[ProcessPlan]
    notes: list[str]

    def named(self, name: str) -> ProcessPlan | None:
        """Return the process called `name`, if the platform has it."""
        return next((process for process in self.processes if process.name == name), None)

    @property
    def ui_url(self) -> str | None:
        """Return the address of Dagster's UI, where the platform has one."""
        return next((f"http://{LOOPBACK}:{each.ports[UI]}" for each in self.processes if UI in each.ports), None)


@dataclass(frozen=True, slots=True)
class PlatformFiles:
    """Where the platform of one home keeps what it knows of its processes."""

    home: Path

    @property
    def folder(self) -> Path:
        """Return the folder of the supervisor: configuration, log, pid files."""
        return self.home / "supervisor"

    @property
    def logs(self) -> Path:
        """Return the folder of all log files."""
        return self.home / "logs"

    @property
    def plan(self) -> Path:
        """Return the file with the plan that was started last."""
        return self.folder / "plan.json"

    @property
    def ports(self) -> Path:
        """Return the file that remembers ports."""
        return self.home / "ports.json"

    @property
    def ledger(self) -> Path:
        """Return the folder of what the simulator says it sent."""
        return self.home / "ledger"


def make_plan(settings: Settings, *, broker: bool, simulator: bool, remember: bool = True) -> PlatformPlan:
    """Return the processes to run, with ports that are free now.

    Args:
        settings: of the platform.
        broker: whether the embedded broker is one of them (not: it runs already, or it is external).
        simulator: whether the market is simulated; without it the loader reads the real venue.
        remember: whether the ports are written down for the next start; not for a dry run.
    """
    files = PlatformFiles(settings.home_path)
    kinds = consumer_kinds()
    served = ["simulator websocket", "simulator rest", f"{SIMULATOR} {_METRICS}"] if simulator else []
    names = [*served, *(f"{kind} {_METRICS}" for kind in (LOADER, *kinds))]
    ports = remembered_ports(files.ports, names, release_s=PORT_RELEASE_S, remember=remember)
    # Readers first: nothing waits in a topic that nobody reads. The venue before the loader, who looks for it.
    processes = [_process(files, BROKER, ["broker", "run"], {})] if broker else []
    processes += [_consumer(files, kind, ports.numbers[f"{kind} {_METRICS}"]) for kind in reversed(kinds)]
    if simulator:
        processes.append(_simulator(files, settings, ports.numbers))
    processes.append(_loader(files, settings, ports.numbers, simulator=simulator))
    return PlatformPlan(home=str(files.home), processes=processes, notes=list(ports.notes()))


def consumer_kinds() -> tuple[str, ...]:
    """Return the kinds of consumers that run here: forecasts need libraries that are not always installed."""
    return tuple(kind for kind in CONSUMERS if kind != INFERENCE or not missing_libraries())


def read_plan(files: PlatformFiles) -> PlatformPlan | None:
    """Return the plan that was started last in this home; None where there is none that can be read."""
    try:
        return msgspec.json.decode(files.plan.read_bytes(), type=PlatformPlan)
    except (OSError, msgspec.MsgspecError):
        return None


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the environment variables that give a child process the same settings, secrets included."""
    chosen = {name: getattr(settings, name) for name in settings.model_fields_set - _NOT_INHERITED}
    chosen |= {"home": settings.home_path, "contracts_dir": settings.contracts_dir.resolve()}
    return {f"STREAMFORGE_{name.upper()}": _as_text(value) for name, value in chosen.items() if value is not None}


def _as_text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else str(value)


def _process(files: PlatformFiles, name: str, arguments: list[str], ports: dict[str, int]) -> ProcessPlan:
    return ProcessPlan(
        name=name,
        kind=name,
        slot=_SLOT,
        command=[sys.executable, "-m", "cli", *arguments],
        ports=ports,
        log_file=str(files.logs / f"{name}.out"),
        stop_rank=_STOP_ORDER.index(name),
    )


def _consumer(files: PlatformFiles, kind: str, metrics_port: int) -> ProcessPlan:
    arguments = ["run", kind, "--slot", _SLOT, "--metrics-port", str(metrics_port), "--output", "json"]
    return _process(files, kind, arguments, {_METRICS: metrics_port})


def _simulator(files: PlatformFiles, settings: Settings, ports: Mapping[str, int]) -> ProcessPlan:
    source = "synthetic" if settings.recordings_dir is None else "recordings"
    metrics_port = ports[f"{SIMULATOR} {_METRICS}"]
    served = {"websocket": ports["simulator websocket"], "rest": ports["simulator rest"], _METRICS: metrics_port}
    arguments = ["simulate", "--source", source, "--slot", _SLOT, "--kafka", "--ledger", str(files.ledger)]
    arguments += ["--ws-port", str(served["websocket"]), "--rest-port", str(served["rest"])]
    arguments += ["--metrics-port", str(metrics_port), "--output", "json"]
    return _process(files, SIMULATOR, arguments, served)


def _loader(files: PlatformFiles, settings: Settings, ports: Mapping[str, int], *, simulator: bool) -> ProcessPlan:
    metrics_port = ports[f"{LOADER} {_METRICS}"]
    arguments = ["load", "--slot", _SLOT, "--metrics-port", str(metrics_port), "--output", "json"]
    if simulator:
        venue = SIMULATED_VENUE if settings.recordings_dir is None else RECORDED_VENUE
        arguments += ["--venue", venue, "--symbols", "all"]
        arguments += ["--ws-url", f"ws://{LOOPBACK}:{ports['simulator websocket']}"]
        arguments += ["--rest-url", f"http://{LOOPBACK}:{ports['simulator rest']}"]
    return _process(files, LOADER, arguments, {_METRICS: metrics_port})
