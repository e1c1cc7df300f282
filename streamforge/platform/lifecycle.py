"""Start the platform, keep it, stop it, and leave no process behind.

`up` starts the supervisor, the supervisor starts the processes. Every one of them writes a record of itself
(pid and creation time), so `down` ends exactly what is ours, whatever became of the supervisor. On Linux
the supervisor ends with `up`, and the processes end with the supervisor, by the kernel's parent-death
signal; `up --detach` leaves the supervisor alone on purpose.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import httpx
import msgspec
import psutil
from filelock import FileLock, Timeout

from streamforge import broker
from streamforge.broker import BrokerState
from streamforge.contracts import load_contracts
from streamforge.errors import ProcessError, RetryableSourceError
from streamforge.kafka_server import class_path
from streamforge.platform.control_plane import dagster_environment, with_dagster, write_instance
from streamforge.platform.launch import launch_command, pid_file, starts_file
from streamforge.platform.plan import (
    BROKER,
    PlatformFiles,
    PlatformPlan,
    ProcessPlan,
    environment_of,
    make_plan,
    read_plan,
)
from streamforge.platform.signals import StopRequested, StopSignals
from streamforge.platform.supervisor import (
    SUPERVISOR,
    SupervisorClient,
    config_file,
    log_file,
    read_history,
    render_config,
    socket_path,
    supervisor_command,
    was_asked_to_stop,
)
from streamforge.processes import (
    ProcessRecord,
    end_process,
    is_alive,
    is_port_free,
    last_lines,
    listened_ports,
    spawn_detached,
    write_atomically,
)
from streamforge.settings import Settings, make_folder
from streamforge.topics import create_topics

Tell = Callable[[str], None]

_SUPERVISOR_TIMEOUT_S = 60.0
_BROKER_TIMEOUT_S = 180.0
_READY_TIMEOUT_S = 120.0
_MARGIN_S = 15.0
_PORT_ATTEMPTS = 3
_POLL_S = 0.1
_WATCH_S = 1.0
_ENDED_FOR_GOOD = ("EXITED", "FATAL")


class PortTakenError(ProcessError):
    """Another program listens on a port that was chosen for one of ours."""


def plan_platform(
    settings: Settings, *, simulator: bool, dagster: bool = False, remember: bool = False
) -> PlatformPlan:
    """Return what would run now: the embedded broker only if it is ours to run, Dagster if asked for."""
    is_ours = broker.status(settings).state in (BrokerState.STOPPED, BrokerState.DIED)
    plan = make_plan(settings, broker=is_ours, simulator=simulator, remember=remember)
    return with_dagster(plan, remember=remember) if dagster else plan


def up(settings: Settings, *, simulator: bool, detach: bool, tell: Tell, ready: Callable[[PlatformPlan], None]) -> None:
    """Start the platform and, unless `detach`, keep it until a stop signal; returns when it is stopped.

    `tell` hears each step, `ready` is called once when everything is up.

    Raises:
        ProcessError: it runs already, or a part of it did not start or ended; all that was started is stopped.
        StopRequested: a stop signal came before everything was up; all that was started is stopped.
    """
    files = PlatformFiles(settings.home_path)
    with _only_one(files):
        _refuse_running(files)
        if not settings.bootstrap_servers:
            tell("looking for Apache Kafka (fetched once)")
            class_path()

        def plan_again() -> PlatformPlan:
            return plan_platform(settings, simulator=simulator, dagster=settings.dagster, remember=True)

        serve_on_free_ports(settings, files, plan_again, detach=detach, tell=tell, ready=ready)


def serve_on_free_ports(
    settings: Settings,
    files: PlatformFiles,
    make: Callable[[], PlatformPlan],
    *,
    detach: bool,
    tell: Tell,
    ready: Callable[[PlatformPlan], None],
    hold: Callable[[PlatformPlan], None] | None = None,
) -> None:
    """Do as `serve`, with a new plan where another program took a port between its choice and its use.

    Raises:
        PortTakenError: it happened again and again.
        ProcessError: as for `serve`.
        StopRequested: as for `serve`.
    """
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        plan = make()
        held = None if hold is None else partial(hold, plan)
        try:
            serve(settings, files, plan, detach=detach, tell=tell, ready=ready, hold=held)
        except PortTakenError as error:
            if attempt == _PORT_ATTEMPTS:
                raise
            tell(f"{error} Starting again with other ports")
        else:
            return


def serve(
    settings: Settings,
    files: PlatformFiles,
    plan: PlatformPlan,
    *,
    detach: bool,
    tell: Tell,
    ready: Callable[[PlatformPlan], None],
    hold: Callable[[], None] | None = None,
) -> None:
    """Start the processes of `plan`, keep them as `up` does, and leave none behind.

    With `hold` they are kept until it returns, instead of until a stop signal.

    Raises:
        PortTakenError: another program took a port of the plan.
        ProcessError: a part did not start, or the supervisor ended.
        StopRequested: a stop signal came before everything was up.
    """
    _write_files(files, plan)
    with StopSignals() as signals:
        is_up = False
        try:
            _start(settings, files, plan, signals, detach=detach, tell=tell)
            is_up = True
            ready(plan)
            if hold is not None:
                hold()
            elif not detach:
                _keep(files, tell)
        except StopRequested as request:
            tell(f"{request}: stopping")
            if not is_up:
                raise
        finally:
            signals.ignore()
            if not (detach and is_up):
                _stop_all(files, tell)
                if plan.named(BROKER):
                    broker.stop(settings)  # it has ended: this forgets its pid


def down(settings: Settings, tell: Tell) -> list[str]:
    """Stop all that runs in this home, supervisor first, broker last; return the names of what was stopped."""
    files = PlatformFiles(settings.home_path)
    stopped = _stop_all(files, tell)
    if not settings.bootstrap_servers:
        state = broker.status(settings)
        if state.pid is not None:
            tell("stopping the broker")
            stopped.append(BROKER)
        if state.state is not BrokerState.STOPPED:
            broker.stop(settings)  # of one that has ended it forgets the pid
    return stopped


def what_runs(settings: Settings) -> list[str]:
    """Return the names of what `down` would stop, the broker last."""
    names = [name for name, _ in _left_over(PlatformFiles(settings.home_path))]
    if not settings.bootstrap_servers and BROKER not in names and broker.status(settings).pid is not None:
        names.append(BROKER)
    return names


def supervisor_process(files: PlatformFiles) -> psutil.Process | None:
    """Return the supervisor of this home if it lives."""
    record = ProcessRecord.read(pid_file(files.folder, SUPERVISOR))
    return None if record is None else record.process()


@contextmanager
def _only_one(files: PlatformFiles) -> Iterator[None]:
    make_folder(files.folder)
    lock = FileLock(files.folder / "lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        msg = f"another `streamforge up` is at work in {files.home}. Use it, or stop it with `streamforge down`"
        raise ProcessError(msg) from error


def _refuse_running(files: PlatformFiles) -> None:
    running = supervisor_process(files)
    if running is not None:
        msg = (
            f"the platform of {files.home} runs already (supervisor pid {running.pid}). See `streamforge status`, "
            "or stop it with `streamforge down`"
        )
        raise ProcessError(msg)
    left = [name for name, _ in _left_over(files)]
    if left:
        msg = f"processes of an earlier run are left in {files.home}: {', '.join(left)}. Run `streamforge down` first"
        raise ProcessError(msg)


def _write_files(files: PlatformFiles, plan: PlatformPlan) -> None:
    files.logs.mkdir(parents=True, exist_ok=True)
    socket_path(files).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_file(files).unlink(missing_ok=True)
    for process in plan.processes:
        starts_file(files.folder, process.name).unlink(missing_ok=True)
    starts_file(files.folder, SUPERVISOR).unlink(missing_ok=True)
    write_atomically(config_file(files), render_config(files, plan))
    write_instance(plan)
    write_atomically(files.plan, msgspec.json.encode(plan).decode())


def _start(
    settings: Settings, files: PlatformFiles, plan: PlatformPlan, signals: StopSignals, *, detach: bool, tell: Tell
) -> None:
    for note in plan.notes:
        tell(note)
    tell("starting the broker" if plan.named(BROKER) else "using the broker that runs already")
    with signals.deferred():
        _spawn_supervisor(settings, files, detach=detach)
    client = SupervisorClient(socket_path(files))
    _wait(files, client.is_up, _SUPERVISOR_TIMEOUT_S, "the supervisor answers", log_file(files).name)
    _wait_for_broker(settings, files, client, plan)
    tell("creating topics from the contracts")
    create_topics(settings, load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix))
    at_once = [process for process in plan.processes if not process.is_on_demand]
    awaited = [process for process in at_once if process.ports]
    for process in at_once:
        if process.name == BROKER:
            continue
        for each in [each for each in awaited if each.name in process.starts_after]:
            _wait_until_ready(files, client, each, tell)
            awaited.remove(each)
        tell(f"starting {process.name}")
        client.start(process.name)
    for process in awaited:
        _wait_until_ready(files, client, process, tell)


def _spawn_supervisor(settings: Settings, files: PlatformFiles, *, detach: bool) -> None:
    command = launch_command(
        supervisor_command(files, sys.executable),
        name=SUPERVISOR,
        state=files.folder,
        parent_death=None if detach else signal.SIGTERM,
    )
    environment = {**os.environ, **environment_of(settings), **dagster_environment(files.home)}
    process = spawn_detached(command, out=files.logs / "supervisord.out", environment=environment)
    ProcessRecord.of(process.pid).write(pid_file(files.folder, SUPERVISOR))


def _wait(files: PlatformFiles, condition: Callable[[], bool], timeout_s: float, what: str, log_name: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        _require_supervisor(files)
        if time.monotonic() >= deadline:
            raise ProcessError(_with_log(files, f"not within {timeout_s:g} s: {what}", log_name))
        time.sleep(_POLL_S)


def _require_supervisor(files: PlatformFiles) -> None:
    if supervisor_process(files) is None:
        raise ProcessError(_with_log(files, "the supervisor ended", "supervisord.log"))


def _wait_for_broker(settings: Settings, files: PlatformFiles, client: SupervisorClient, plan: PlatformPlan) -> None:
    def answers() -> bool:
        if plan.named(BROKER) is not None and client.processes()[BROKER].state in _ENDED_FOR_GOOD:
            raise ProcessError(_with_log(files, "the broker ended", "broker.out"))
        if BROKER in (histories := read_history(files)) and histories[BROKER].restarts > 1:
            raise ProcessError(
                _with_log(files, f"the broker dies again and again ({histories[BROKER].last_end})", "broker.out")
            )
        return broker.status(settings).state in (BrokerState.RUNNING, BrokerState.EXTERNAL)

    _wait(files, answers, _BROKER_TIMEOUT_S, "the broker answers", "broker.log")


def _wait_until_ready(files: PlatformFiles, client: SupervisorClient, process: ProcessPlan, tell: Tell) -> None:
    """Wait until it listens and says so; a process that only needs longer (or is paused) is said and not stopped."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        _require_supervisor(files)
        found = client.processes()[process.name]
        if _is_ready(process, found.pid):
            tell(f"{process.name} is ready")
            return
        history = read_history(files).get(process.name)
        if found.state in _ENDED_FOR_GOOD or (history is not None and history.restarts):
            _require_own_ports(process, found.pid)
        if found.state in _ENDED_FOR_GOOD:
            text = f"{process.name} ended with exit code {found.exit_code} while the platform was starting"
            raise ProcessError(_with_log(files, text, f"{process.name}.out"))
        if time.monotonic() >= deadline:
            tell(
                f"{process.name} is not ready after {_READY_TIMEOUT_S:g} s; it is left running, see {process.log_file}"
            )
            return
        time.sleep(_POLL_S)


def _is_ready(process: ProcessPlan, pid: int | None) -> bool:
    """Return whether it listens on its ports, itself and not another program, and answers that it is ready."""
    if not listened_ports(pid).issuperset(process.ports.values()):
        return False
    try:
        return process.ready_url is None or httpx.get(process.ready_url, timeout=2.0).is_success
    except httpx.HTTPError:
        return False


def _require_own_ports(process: ProcessPlan, pid: int | None) -> None:
    """Raise when a process that has ended finds its port in the hands of another program."""
    own = listened_ports(pid)
    taken = [f"{name} {port}" for name, port in process.ports.items() if port not in own and not is_port_free(port)]
    if taken:
        raise PortTakenError(f"another program listens on a port of {process.name}: {', '.join(taken)}.")


def _keep(files: PlatformFiles, tell: Tell) -> None:
    """Stay while the supervisor lives and say when a process ends or comes back."""
    client = SupervisorClient(socket_path(files))
    known = {name: found.pid for name, found in client.processes().items()}
    while True:
        time.sleep(_WATCH_S)
        if supervisor_process(files) is None and was_asked_to_stop(files):
            tell("the supervisor was stopped from outside")
            return
        _require_supervisor(files)
        try:
            found = client.processes()
        except RetryableSourceError:
            continue
        histories = read_history(files)
        for name, process in found.items():
            if process.pid != known.get(name):
                end = histories[name].last_end if name in histories else None
                what = f"runs again (pid {process.pid})" if process.pid else "is not restarted"
                tell(f"{name} ended ({end}): {what}")
        known = {name: process.pid for name, process in found.items()}


def _stop_all(files: PlatformFiles, tell: Tell) -> list[str]:
    """End the supervisor, which ends its processes in order, then whatever is left; return what ran."""
    stopped = []
    running = supervisor_process(files)
    if running is not None:
        plan = read_plan(files)
        names = [process.name for process in plan.processes] if plan else []
        deadline_s = _MARGIN_S + sum(process.stop_deadline_s for process in plan.processes) if plan else _MARGIN_S
        alive = [name for name in names if _record_is_alive(files, name)]
        tell(f"stopping {', '.join(alive) or 'the supervisor'}")
        if not end_process(running, deadline_s=deadline_s):
            tell(f"the supervisor was killed: it did not end within {deadline_s:g} s")
        stopped = [name for name in alive if not _record_is_alive(files, name)]
    # In the order of the plan's ends: the broker last.
    for name, process in _left_over(files):
        tell(f"stopping {name}, which was left over")
        end_process(process, deadline_s=_MARGIN_S)
        stopped.append(name)
    for path in files.folder.glob("*.pid"):
        path.unlink(missing_ok=True)
    return stopped


def _left_over(files: PlatformFiles) -> list[tuple[str, psutil.Process]]:
    """Return the recorded processes that still live, the broker last."""
    found = []
    for path in files.folder.glob("*.pid"):
        record = ProcessRecord.read(path)
        process = None if record is None else record.process()
        if process is not None and path.stem != SUPERVISOR:
            found.append((path.stem, process))
    return sorted(found, key=lambda item: item[0] == BROKER)


def _record_is_alive(files: PlatformFiles, name: str) -> bool:
    record = ProcessRecord.read(pid_file(files.folder, name))
    process = None if record is None else record.process()
    return process is not None and is_alive(process)


def _with_log(files: PlatformFiles, text: str, log_name: str) -> str:
    path = files.logs / log_name
    tail = "\n  ".join(last_lines(path)) or "(nothing)"
    return f"{text}. Everything that was started is stopped. Last lines of {path}:\n  {tail}"
