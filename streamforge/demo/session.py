"""One market and its loader on a running platform: start them, stop them cleanly, let everything land."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from streamforge.contract_model import Contracts
from streamforge.demo.market import Sent, read_sent
from streamforge.errors import ProcessError
from streamforge.events import CommandKind
from streamforge.lakehouse.line import Line, LineState
from streamforge.platform.plan import LOADER, SIMULATOR, PlatformFiles, PlatformPlan, ProcessPlan
from streamforge.platform.supervisor import SupervisorClient, socket_path
from streamforge.settings import Settings
from streamforge.supervision import send_command

Tell = Callable[[int, int, str], None]
"""Hears how much is done, of how much, and what it is."""

LANDING_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 60.0
_ARRIVAL_TIMEOUT_S = 30.0
_POLL_S = 0.5
_ENDED = ("EXITED", "FATAL")


def silent(_done: int, _total: int, _note: str) -> None:
    """Tell nobody."""


def captured(state: LineState) -> int:
    """Return how many messages the raw topics have."""
    return state.log_end["raw-trades"] + state.log_end["raw-depth"]


class Session:
    """A market and the loader that captures it, both kept by the platform's supervisor.

    Args:
        settings: of the platform.
        contracts: has `queue-control`.
        plan: what the supervisor keeps.
        prefix: goes before the names of market and loader in the plan.
    """

    def __init__(self, settings: Settings, contracts: Contracts, plan: PlatformPlan, *, prefix: str = "") -> None:
        self._settings = settings
        self._contracts = contracts
        self._market = _named(plan, prefix + SIMULATOR)
        self._loader = _named(plan, prefix + LOADER)
        self.client = SupervisorClient(socket_path(PlatformFiles(settings.home_path)))

    def start(self) -> None:
        """Start market and loader."""
        for process in (self._market, self._loader):
            self.client.start(process.name)

    def require_running(self) -> None:
        """Check that both run.

        Raises:
            ProcessError: one has ended; says how and names its log.
        """
        found = self.client.processes()
        for process in (self._market, self._loader):
            if found[process.name].state in _ENDED:
                raise _ended(process, found[process.name].exit_code)

    def wait_for_market(self, timeout_s: float, *, on_look: Callable[[], None] = lambda: None) -> None:
        """Wait until the market has ended by itself.

        Raises:
            ProcessError: it did not within `timeout_s`, or ended with another exit code than 0.
        """
        self._wait_for_end(self._market, timeout_s, on_look)

    def land(self, line: Line, ledger: Path, *, captured_before: int = 0, tell: Tell = silent) -> Sent:
        """Stop the market, then the loader, and wait until the tables have all that the topics hold.

        Args:
            line: looks at topics and tables.
            ledger: folder of the market's ledger.
            captured_before: messages in the raw topics that are not this market's.
            tell: hears how far it is.

        Returns:
            What the market's ledger says it sent. What of it never came is for verification to tell.

        Raises:
            ProcessError: one of the two did not end cleanly.
            RetryableSourceError: not everything landed in time; says who is behind.
        """
        self._stop(self._market)
        sent = read_sent(ledger)
        self._wait_for_arrival(line, captured_before + sent.messages, tell)
        self._stop(self._loader)
        line.wait_until_landed(
            LANDING_TIMEOUT_S,
            on_look=lambda name, state: tell(
                len(state.conditions) - len(state.missing), len(state.conditions), f"{name} reaches its table"
            ),
        )
        return sent

    def _wait_for_arrival(self, line: Line, messages: int, tell: Tell) -> None:
        deadline_s = time.monotonic() + _ARRIVAL_TIMEOUT_S
        while (found := captured(line.look())) < messages and time.monotonic() < deadline_s:
            tell(found, messages, "the last messages reach the raw topics")
            time.sleep(_POLL_S)

    def _stop(self, process: ProcessPlan) -> None:
        """Tell a process to stop over `queue-control` and wait until it has ended; harmless when it has."""
        if self.client.processes()[process.name].state not in _ENDED:
            target = f"{process.kind}/{process.slot}"
            stop = CommandKind.STOP
            send_command(self._settings, self._contracts, target=target, command=stop, issued_by="streamforge")
        self._wait_for_end(process, _END_TIMEOUT_S, lambda: None)

    def _wait_for_end(self, process: ProcessPlan, timeout_s: float, on_look: Callable[[], None]) -> None:
        deadline_s = time.monotonic() + timeout_s
        while (found := self.client.processes()[process.name]).state not in _ENDED:
            if time.monotonic() > deadline_s:
                msg = f"{process.name} did not end within {timeout_s:g} s; see {process.log_file}"
                raise ProcessError(msg)
            on_look()
            time.sleep(_POLL_S)
        if found.exit_code:
            raise _ended(process, found.exit_code)


def _named(plan: PlatformPlan, name: str) -> ProcessPlan:
    process = plan.named(name)
    if process is None:
        msg = f"the platform has no process {name}; it has {', '.join(item.name for item in plan.processes)}"
        raise ProcessError(msg)
    return process


def _ended(process: ProcessPlan, exit_code: int | None) -> ProcessError:
    return ProcessError(f"{process.name} ended with exit code {exit_code}; see {process.log_file}")
