"""The running line as the harness sees it: pids, what each process gets done, orders to it, and who has to start it."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from streamforge.contracts import Contracts
from streamforge.errors import RetryableSourceError
from streamforge.platform.launch import starts_file
from streamforge.platform.plan import PlatformFiles, PlatformPlan, ProcessPlan
from streamforge.platform.supervisor import SupervisedProcess, SupervisorClient, socket_path
from streamforge.processes import LOOPBACK, write_atomically
from streamforge.settings import Settings
from tests.chaos.schedule import BARS, LOADER
from tests.chaos.victim import TELL_WHERE, Order, obeyed_file, order_file

RECOVERY_TIMEOUT_S = 180.0
FENCED = 3
_WATCH_S = 0.2
_LOOK_S = 0.1
_HTTP_TIMEOUT_S = 2.0
_ENDED = ("EXITED", "FATAL", "STOPPED")
_LEFT_ALONE = (0, 2, FENCED)
"""Exit codes after which the supervisor does not start a process again."""

_DONE_COUNTERS = {LOADER: "streamforge_loader_acked_total", BARS: "streamforge_records_total"}
_DONE_COUNTER = "streamforge_outputs_total"

T = TypeVar("T")


class ViolationError(AssertionError):
    """Something that must not be: who did not come back, or two that both survived."""


class NotReachedError(Exception):
    """The step of a fault was not passed in time, or another fault stood in the way: nothing was done."""


class Aborted(Exception):  # noqa: N818 - not an error
    """Another lane has failed: nothing more is to be done."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A process before its trouble."""

    pid: int | None


@dataclass
class Scene:
    """One running line.

    Args:
        settings: of the platform.
        contracts: has `queue-control`.
        plan: what the supervisor keeps.
        orders: folder of the agents' orders.
    """

    settings: Settings
    contracts: Contracts
    plan: PlatformPlan
    orders: Path
    aborted: threading.Event = field(default_factory=threading.Event)
    started_by_hand: Counter[str] = field(default_factory=Counter)
    """Processes that had ended with an exit code that a supervisor leaves alone."""

    def __post_init__(self) -> None:
        self._files = PlatformFiles(self.settings.home_path)
        self.client = SupervisorClient(socket_path(self._files))
        self._away: set[str] = set()
        self._returning: set[str] = set()
        self._kept: frozenset[str] = frozenset()
        self._found: dict[str, SupervisedProcess] = {}
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)

    # Watching

    def start_watching(self, names: Iterable[str]) -> None:
        """Start again, from now on, whichever of `names` has ended, unless it is away on purpose."""
        self._kept = frozenset(names)
        self._found = self.client.processes()
        self._watching.set()
        self._watcher.start()

    def stop_watching(self) -> None:
        """Leave ended processes alone from now on."""
        self._watching.clear()
        if self._watcher.is_alive():
            self._watcher.join()

    def found(self, name: str) -> SupervisedProcess:
        """Return what the supervisor said last of a process."""
        return self._found[name]

    def has_ended(self, name: str) -> bool:
        """Return whether a process has ended and the supervisor leaves it alone."""
        return self._found[name].state in _ENDED

    def keep_away(self, name: str) -> None:
        """Leave a process alone when it ends."""
        self._away.add(name)

    def bring_back(self, name: str) -> None:
        """Start a process that was kept away, if it has ended."""
        self._returning.add(name)
        self._away.discard(name)

    def process(self, name: str) -> ProcessPlan:
        """Return the plan of a process."""
        process = self.plan.named(name)
        assert process is not None, name
        return process

    # Waiting

    def pause(self, pause_s: float) -> None:
        """Let time pass, as the schedule says.

        Raises:
            Aborted: another lane has failed.
        """
        if self.aborted.wait(pause_s):
            raise Aborted

    def wait(self, condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
        """Return the first truthy value of `condition`.

        Raises:
            ViolationError: there is none within `timeout_s`.
            Aborted: another lane has failed.
        """
        deadline_s = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline_s:
                msg = f"not within {timeout_s:g} s: {what}"
                raise ViolationError(msg)
            self.pause(_LOOK_S)
        return value

    def pid(self, name: str) -> int:
        """Return the pid of a process; waits while it has none."""
        return self.wait(lambda: self._found[name].pid, RECOVERY_TIMEOUT_S, f"{name} has a pid")

    def mark(self, name: str) -> Mark:
        """Return what is remembered of a process before its trouble."""
        return Mark(self._found[name].pid)

    def wait_at_work(self, before: Mapping[str, Mark], *, one_will_do: bool = False) -> None:
        """Wait until each process (or one of them) is ready and has got something done since its trouble.

        Raises:
            ViolationError: it did not come back; its log says where it stands.
        """
        left, done = dict(before), dict[str, float]()

        def all_work() -> bool:
            for name, mark in before.items():
                pid, now = self._found[name].pid, self._done(name)
                if name in left and now is not None and now > (done.setdefault(name, now) if pid == mark.pid else 0):
                    del left[name]
            return not left or (one_will_do and len(left) < len(before))

        try:
            self.wait(all_work, RECOVERY_TIMEOUT_S, "all are at work again")
        except ViolationError as error:
            for name in left:
                self.kill(name, TELL_WHERE)
            msg = f"{error}; still away: {', '.join(left)}"
            raise ViolationError(msg) from error

    # Trouble

    def kill(self, name: str, number: signal.Signals) -> int:
        """Send a signal to a process and return its pid."""
        pid = self.pid(name)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    def order(self, name: str, order: Order) -> None:
        """Give an order to the agent of a process; it outlives the process."""
        obeyed_file(self.orders, name).unlink(missing_ok=True)
        write_atomically(order_file(self.orders, name), msgspec.json.encode(order).decode())

    def wait_obeyed(self, name: str, timeout_s: float) -> bool:
        """Wait until the order was obeyed; False where it was not and is taken back."""
        obeyed = obeyed_file(self.orders, name)
        try:
            self.wait(obeyed.exists, timeout_s, "an order is obeyed")
        except ViolationError:
            order_file(self.orders, name).unlink(missing_ok=True)
            return obeyed.exists()
        return True

    # Inside

    def _done(self, name: str) -> float | None:
        """Return how much a process that is ready has made durable in its life; None where it is not ready."""
        port = self.process(name).ports["metrics"]
        counter = _DONE_COUNTERS.get(name, _DONE_COUNTER)
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_HTTP_TIMEOUT_S)
        try:
            connection.request("GET", "/ready")
            response = connection.getresponse()
            response.read()
            if response.status != http.client.OK:
                return None
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(counter))

    def _watch(self) -> None:
        while self._watching.is_set():
            with suppress(RetryableSourceError):
                self._found = self.client.processes()
                for name, process in self._found.items():
                    # The wait before a restart grows with the number of recent starts; here each is the first.
                    starts_file(self._files.folder, name).unlink(missing_ok=True)
                    left_alone = process.state in _ENDED and process.exit_code in _LEFT_ALONE
                    if name in self._kept - self._away and left_alone:
                        if name not in self._returning:
                            self.started_by_hand[f"{name}, exit code {process.exit_code}"] += 1
                        self.client.start(name)
                        self._returning.discard(name)
            time.sleep(_WATCH_S)
