"""The `supervisor` library: its configuration file, its socket, and what it knows of its processes."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
import xmlrpc.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from streamforge.errors import RetryableSourceError
from streamforge.platform.launch import launch_command
from streamforge.platform.plan import PlatformFiles, PlatformPlan, ProcessPlan
from streamforge.processes import last_lines

SUPERVISOR = "supervisord"
# The kernel's limit is 104 to 108 bytes, and the library puts its pid behind the name for a moment.
_SOCKET_PATH_MAX_BYTES = 90
_CONFIG = """\
[supervisord]
nodaemon=true
silent=true
identifier=streamforge
logfile={log}
logfile_maxbytes=5MB
logfile_backups=1
loglevel=info
pidfile={folder}/library.pid
childlogdir={logs}

[unix_http_server]
file={socket}
chmod=0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
# startsecs=0: within its first seconds the library would restart any exit code; the launcher backs off instead.
_PROGRAM = """
[program:{name}]
command={command}
autostart={autostart}
autorestart=unexpected
exitcodes=0,2,3
startsecs=0
priority={priority}
stopsignal=TERM
stopasgroup={stops_children}
stopwaitsecs={stop_deadline_s}
killasgroup=true
redirect_stderr=true
stdout_logfile={log_file}
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=3
"""
_ENDED = re.compile(
    r"exited: (?P<name>\S+) \((?:exit status (?P<code>-?\d+)|terminated by (?P<signal>\S+))(?P<rest>[^)]*)"
)
_SPAWNED = re.compile(r"spawned: '(?P<name>[^']+)' with pid")


@dataclass(frozen=True, slots=True)
class SupervisedProcess:
    """What the supervisor says of one process now.

    Args:
        state: the library's word: STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL.
        uptime_s: seconds since its last start, while it runs.
        exit_code: of its last end, when it has ended and was not started again.
    """

    name: str
    state: str
    pid: int | None
    uptime_s: float | None
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class History:
    """What the supervisor's log says of one process in this run.

    Args:
        restarts: starts after the first.
        last_end: how it ended last: `exit status 1` or `SIGKILL`; None when it never ended.
    """

    restarts: int
    last_end: str | None


def config_file(files: PlatformFiles) -> Path:
    """Return the path of the supervisor's configuration."""
    return files.folder / "supervisord.conf"


def log_file(files: PlatformFiles) -> Path:
    """Return the path of the supervisor's own log."""
    return files.logs / "supervisord.log"


def socket_path(files: PlatformFiles) -> Path:
    """Return where the supervisor listens: in the home, or in a short folder of ours where that is too long."""
    path = files.folder / "socket"
    if len(os.fsencode(path)) <= _SOCKET_PATH_MAX_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(files.home)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"streamforge-{os.getuid()}" / digest


def render_config(files: PlatformFiles, plan: PlatformPlan) -> str:
    """Return the supervisor's configuration: the broker starts with it, the rest when told."""
    text = _CONFIG.format(
        log=_escaped(log_file(files)),
        folder=_escaped(files.folder),
        logs=_escaped(files.logs),
        socket=_escaped(socket_path(files)),
    )
    return text + "".join(_program(files, process, plan) for process in plan.processes)


def supervisor_command(files: PlatformFiles, python: str) -> list[str]:
    """Return the command that runs the supervisor in the foreground."""
    return [python, "-m", "supervisor.supervisord", "--configuration", str(config_file(files))]


class SupervisorClient:
    """Talks to a running supervisor over its socket."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_up(self) -> bool:
        """Return whether the supervisor answers."""
        try:
            self._call(lambda proxy: proxy.supervisor.getState())
        except RetryableSourceError:
            return False
        return True

    def processes(self) -> dict[str, SupervisedProcess]:
        """Return every process by name.

        Raises:
            RetryableSourceError: the supervisor does not answer.
        """
        return {
            info["name"]: _supervised(info) for info in self._call(lambda proxy: proxy.supervisor.getAllProcessInfo())
        }

    def start(self, name: str) -> None:
        """Start the process called `name`; it may still be coming up when this returns.

        Raises:
            RetryableSourceError: the supervisor does not answer, or refuses.
        """
        self._call(lambda proxy: proxy.supervisor.startProcess(name, False))

    def _call(self, ask: Callable[[Any], Any]) -> Any:
        with self._proxy() as proxy:
            try:
                return ask(proxy)
            except (OSError, HTTPException, xmlrpc.client.Error) as error:
                msg = f"the supervisor at {self._path} does not answer: {error}. Look at `streamforge status`"
                raise RetryableSourceError(msg) from error

    @contextmanager
    def _proxy(self) -> Iterator[xmlrpc.client.ServerProxy]:
        transport = SupervisorTransport(None, None, f"unix://{self._path}")
        try:
            yield xmlrpc.client.ServerProxy("http://localhost", transport=transport)
        finally:
            transport.close()


def read_history(files: PlatformFiles) -> dict[str, History]:
    """Return what happened to each process since the supervisor was started, by name."""
    try:
        text = log_file(files).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    starts: dict[str, int] = {}
    ends: dict[str, str] = {}
    for line in text.splitlines():
        if spawned := _SPAWNED.search(line):
            starts[spawned["name"]] = starts.get(spawned["name"], 0) + 1
        elif ended := _ENDED.search(line):
            ends[ended["name"]] = f"exit code {ended['code']}" if ended["code"] else ended["signal"].rstrip(";")
    return {name: History(count - 1, ends.get(name)) for name, count in starts.items()}


def was_asked_to_stop(files: PlatformFiles) -> bool:
    """Return whether the supervisor that has ended was asked to, by its own log."""
    return any("indicating exit request" in line for line in last_lines(log_file(files), 200))


def _program(files: PlatformFiles, process: ProcessPlan, plan: PlatformPlan) -> str:
    needed = [port for each in plan.processes if each.name in process.starts_after for port in each.ports.values()]
    command = launch_command(process.command, name=process.name, state=files.folder, after=needed)
    return _PROGRAM.format(
        name=process.name,
        command=_escaped(shlex.join(command)),
        autostart="true" if process.name == "broker" else "false",
        # The library ends the highest priority first.
        priority=len(plan.processes) - process.stop_rank + 10,
        stop_deadline_s=process.stop_deadline_s,
        stops_children="true" if process.stops_children else "false",
        log_file=_escaped(process.log_file),
    )


def _escaped(value: object) -> str:
    """Return `value` for the library's configuration, where `%` begins an expansion."""
    return str(value).replace("%", "%%")


def _supervised(info: dict[str, Any]) -> SupervisedProcess:
    is_up = bool(info["pid"])
    has_ended = info["statename"] in ("EXITED", "FATAL")
    return SupervisedProcess(
        name=info["name"],
        state=info["statename"],
        pid=info["pid"] or None,
        uptime_s=float(info["now"] - info["start"]) if is_up else None,
        exit_code=info["exitstatus"] if has_ended else None,
    )
