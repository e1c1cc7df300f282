"""`up` and `down`: what is restarted, and that nothing is ever left behind.

The supervisor, the launcher, the signals and the broker are the real ones; the platform's processes are
small programs, so that each way to die can be tried in seconds. `tests/acceptance` runs the real ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec
import psutil
import pytest
from msgspec.structs import replace

from streamforge.errors import ProcessError
from streamforge.platform.launch import pid_file
from streamforge.platform.lifecycle import down, serve_on_free_ports, supervisor_process, up
from streamforge.platform.plan import PlatformFiles, PlatformPlan, ProcessPlan, environment_of
from streamforge.platform.supervisor import SupervisorClient, read_history, socket_path
from streamforge.processes import LOOPBACK, ProcessRecord, choose_free_port
from streamforge.settings import Settings
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

# Long only when something is wrong: machines of tests are slow and shared.
_WITHIN_S = 120.0
_SLEEP = "import signal; signal.pause()"
_STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
_SERVER = "import signal, socket; server = socket.create_server(('127.0.0.1', {port})); signal.pause()"
_DRIVER = """
import sys
from pathlib import Path
import msgspec
from streamforge.errors import ProcessError
from streamforge.platform.lifecycle import serve
from streamforge.platform.plan import PlatformFiles, PlatformPlan
from streamforge.platform.signals import StopRequested
from streamforge.settings import Settings

settings = Settings(_env_file=None)
plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=PlatformPlan)
try:
    serve(
        settings, PlatformFiles(settings.home_path), plan, detach=sys.argv[2] == "detach",
        tell=lambda text: print(text, flush=True), ready=lambda plan: print("READY", flush=True),
    )
except StopRequested:
    sys.exit(130)
except ProcessError as error:
    print(error)
    sys.exit(1)
"""


@dataclass
class Running:
    """A platform of small processes under a real supervisor, in a process of its own."""

    files: PlatformFiles
    process: subprocess.Popen[str]
    names: list[str]

    def read_until(self, text: str) -> list[str]:
        """Return what it says up to a line with `text`."""
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line.strip())
            if text in line:
                return said
        pytest.fail(f"ended with {self.process.wait()} before saying {text!r}")

    def alive(self) -> dict[str, psutil.Process]:
        """Return the live processes by name, the supervisor too; remembers nothing."""
        records = {path.stem: ProcessRecord.read(path) for path in self.files.folder.glob("*.pid")}
        found = {name: record.process() for name, record in records.items() if record is not None}
        return {name: process for name, process in found.items() if process is not None}

    def wait_all_alive(self) -> dict[str, psutil.Process]:
        """Wait until the supervisor and every process run, and return them by name."""
        wanted = {*self.names, "supervisord"}
        return wait_until(
            lambda: found if (found := self.alive()).keys() == wanted else None,
            timeout_s=_WITHIN_S,
            what="all are running",
        )


class Start:
    """Starts platforms of small processes and ends what a failed test leaves."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.files = PlatformFiles(settings.home_path)
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def __call__(
        self,
        programs: dict[str, str],
        *,
        ports: dict[str, int] | None = None,
        after: dict[str, str] | None = None,
        detach: bool = False,
    ) -> Running:
        """Start a platform of `programs` (name to Python code), ended in that order.

        `after` names what must be ready before a program is started.
        """
        plan = self.plan(programs, ports=ports or {}, after=after or {})
        path = self._folder / "plan.json"
        path.write_bytes(msgspec.json.encode(plan))
        process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, str(path), "detach" if detach else "stay"],
            env=os.environ | environment_of(self.settings),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return Running(self.files, process, list(programs))

    def plan(
        self, programs: dict[str, str], *, ports: dict[str, int], after: Mapping[str, str] = MappingProxyType({})
    ) -> PlatformPlan:
        """Return a platform of `programs`."""
        processes = [
            replace(self._process(name, code, rank, ports), starts_after=(after[name],) if name in after else ())
            for rank, (name, code) in enumerate(programs.items())
        ]
        return PlatformPlan(home=str(self.settings.home_path), processes=processes, notes=[])

    def close(self) -> None:
        """End everything that was started."""
        for process in self._started:
            process.terminate()
            process.send_signal(signal.SIGCONT)
            process.communicate(timeout=_WITHIN_S)
        down(self.settings, print)

    def _process(self, name: str, code: str, rank: int, ports: dict[str, int]) -> ProcessPlan:
        return ProcessPlan(
            name=name,
            kind=name,
            slot="0",
            command=[sys.executable, "-c", code],
            ports={"grpc": ports[name]} if name in ports else {},
            log_file=str(self.files.logs / f"{name}.out"),
            stop_rank=rank,
            stop_deadline_s=2,
        )


@pytest.fixture
def start(platform: Settings, tmp_path: Path) -> Iterator[Start]:
    contracts = tmp_path / "contracts"
    contracts.mkdir()
    shutil.copy(platform.contracts_dir / "queue-control.yaml", contracts)
    starter = Start(platform.model_copy(update={"contracts_dir": contracts}), tmp_path)
    yield starter
    starter.close()


def _wait_all_gone(processes: dict[str, psutil.Process]) -> None:
    def gone() -> bool:
        return not any(
            process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes.values()
        )

    def gone_safely() -> bool:
        try:
            return gone()
        except psutil.NoSuchProcess:
            return False

    wait_until(gone_safely, timeout_s=_WITHIN_S, what=f"all are gone: {processes}")


def test_exit_codes_0_2_3_stay_ended_and_others_come_back_with_backoff(start: Start) -> None:
    codes = {"done": "0", "usage": "2", "fenced": "3", "failed": "1"}
    running = start({name: f"raise SystemExit({code})" for name, code in codes.items()})
    running.read_until("READY")
    files = running.files
    restarted = wait_until(
        lambda: history if (history := read_history(files)).get("failed") and history["failed"].restarts >= 2 else None,
        timeout_s=_WITHIN_S,
        what="the failing process was restarted twice",
    )
    assert restarted["failed"].last_end == "exit code 1"
    processes = SupervisorClient(socket_path(files)).processes()
    ended = {name: (processes[name].state, processes[name].exit_code) for name in ("done", "usage", "fenced")}
    assert ended == {"done": ("EXITED", 0), "usage": ("EXITED", 2), "fenced": ("EXITED", 3)}
    assert [restarted[name].restarts for name in ("done", "usage", "fenced")] == [0, 0, 0]
    assert "restart after 1 s" in (files.logs / "failed.out").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_signal_ends_everything_with_exit_code_0(start: Start, number: signal.Signals) -> None:
    running = start({"feeder": _SLEEP, "stubborn": _STUBBORN})
    running.read_until("READY")
    processes = running.wait_all_alive()
    running.process.send_signal(number)
    running.process.send_signal(number)
    assert running.process.wait(_WITHIN_S) == 0
    _wait_all_gone(processes)
    log = (running.files.logs / "supervisord.log").read_text(encoding="utf-8")
    assert log.index("stopped: feeder") < log.index("stopped: stubborn")


def test_stop_signal_during_the_start_leaves_nothing(start: Start) -> None:
    running = start({"slow": _SLEEP}, ports={"slow": choose_free_port()})
    running.read_until("starting slow")
    processes = running.wait_all_alive()
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(_WITHIN_S) == 130
    _wait_all_gone(processes)


def test_process_that_ends_during_the_start_stops_the_rest_and_shows_its_log(start: Start) -> None:
    wrong = "print('STREAMFORGE_X is wrong'); raise SystemExit(2)"
    running = start({"wrong": wrong, "well": _SLEEP}, ports={"wrong": choose_free_port()})
    out, _ = running.process.communicate(timeout=_WITHIN_S)
    assert running.process.returncode == 1
    assert "wrong ended with exit code 2" in out
    assert "STREAMFORGE_X is wrong" in out
    assert running.alive() == {}


def test_process_is_started_when_what_it_needs_is_ready(start: Start) -> None:
    port = choose_free_port()
    asks = f"import signal, socket; socket.create_connection(('127.0.0.1', {port})); signal.pause()"
    running = start(
        {"server": _SERVER.format(port=port), "asks": asks}, ports={"server": port}, after={"asks": "server"}
    )
    said = running.read_until("READY")
    assert said.index("server is ready") < said.index("starting asks")
    assert running.wait_all_alive().keys() == {"server", "asks", "supervisord"}


def test_port_taken_between_plan_and_start_is_chosen_again(start: Start) -> None:
    taken, free = choose_free_port(), choose_free_port()
    plans = [start.plan({"server": _SERVER.format(port=port)}, ports={"server": port}) for port in (taken, free)]
    held: list[PlatformPlan] = []
    said: list[str] = []
    with socket.create_server((LOOPBACK, taken)):
        # Another program answers on the port all the while: that it answers must not pass for ours.
        serve_on_free_ports(
            start.settings,
            start.files,
            iter(plans).__next__,
            detach=False,
            tell=said.append,
            ready=lambda _: None,
            hold=held.append,
        )
    assert held == plans[1:]
    assert any(f"another program listens on a port of server: grpc {taken}" in text for text in said)
    assert supervisor_process(start.files) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.parametrize("victim", ["up", "supervisord"])
def test_kill_of_up_or_supervisor_leaves_nothing(start: Start, victim: str) -> None:
    running = start({"feeder": _SLEEP, "stubborn": _STUBBORN})
    running.read_until("READY")
    processes = running.wait_all_alive()
    if victim == "up":
        running.process.kill()
        _wait_all_gone(processes)
    else:
        # `up` must not be able to clean up: the kernel alone has to end them.
        running.process.send_signal(signal.SIGSTOP)
        processes["supervisord"].kill()
        _wait_all_gone(processes)
        running.process.send_signal(signal.SIGCONT)
    running.process.communicate(timeout=_WITHIN_S)
    assert running.process.returncode == (-signal.SIGKILL if victim == "up" else 1)


def test_detached_platform_outlives_up_and_is_ended_by_down(start: Start) -> None:
    running = start({"feeder": _SLEEP}, detach=True)
    running.read_until("READY")
    assert running.process.wait(_WITHIN_S) == 0
    processes = running.wait_all_alive()
    with pytest.raises(ProcessError, match="runs already"):
        up(start.settings, simulator=False, detach=True, tell=print, ready=print)
    assert down(start.settings, print) == ["feeder"]
    _wait_all_gone(processes)
    assert down(start.settings, print) == []


def test_down_ends_what_a_killed_supervisor_left_and_no_stranger(start: Start) -> None:
    files = start.files
    files.folder.mkdir(parents=True)
    left, other = (subprocess.Popen([sys.executable, "-c", _SLEEP]) for _ in range(2))
    try:
        ProcessRecord.of(left.pid).write(pid_file(files.folder, "parser"))
        # A pid file whose pid has become a stranger's.
        ProcessRecord(other.pid, psutil.Process(other.pid).create_time() - 100.0).write(pid_file(files.folder, "bars"))
        with pytest.raises(ProcessError, match=r"left .*parser.*streamforge down"):
            up(start.settings, simulator=False, detach=True, tell=print, ready=print)
        assert down(start.settings, print) == ["parser"]
        assert left.poll() is not None
        assert other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()
    assert supervisor_process(files) is None
