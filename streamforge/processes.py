"""Operating-system processes and ports: records that survive pid reuse, endings with a deadline, free ports.

A pid alone names nothing: it is reused. A record holds the creation time too, and only a live process
that agrees in both is ever signalled.
"""

from __future__ import annotations

import getpass
import os
import random
import socket
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import psutil

from streamforge.errors import PermanentSourceError

LOOPBACK = "127.0.0.1"
# Below the range that Linux and macOS give to outgoing connections, so that a remembered port stays free.
_PORTS = range(20_000, 32_000)
_PORT_ATTEMPTS = 200
# The creation time is computed from the boot time, which moves when the clock is set.
_CREATE_TIME_TOLERANCE_S = 2.0
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.02
_TAIL_BYTES = 65_536


class ProcessRecord(msgspec.Struct, frozen=True):
    """A process by pid and creation time (seconds since 1970), as written to a pid file."""

    pid: int
    created_s: float

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the record of the live process `pid`."""
        return cls(pid, psutil.Process(pid).create_time())

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the record in `path`, or None where there is none that can be read."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError):
            return None

    def write(self, path: Path) -> None:
        """Write the record to `path` in one step."""
        write_atomically(path, msgspec.json.encode(self).decode())

    def process(self) -> psutil.Process | None:
        """Return the live process that this record names; None when it ended or the pid is someone else's."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.created_s) < _CREATE_TIME_TOLERANCE_S
        except psutil.NoSuchProcess:
            return None
        return process if is_same and is_alive(process) else None


def end_process(process: psutil.Process, *, deadline_s: float) -> bool:
    """Ask `process` to end with SIGTERM and kill it after `deadline_s`; return whether it ended by itself."""
    try:
        process.terminate()
    except psutil.NoSuchProcess:
        return True
    if wait_ended(process, timeout_s=deadline_s):
        return True
    kill_process(process)
    return False


def kill_process(process: psutil.Process) -> None:
    """SIGKILL `process` and wait until it is gone."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
    wait_ended(process, timeout_s=_KILL_TIMEOUT_S)


def wait_ended(process: psutil.Process, *, timeout_s: float) -> bool:
    """Wait until `process` has ended and return whether it did within `timeout_s`.

    A zombie has ended: its parent may be another process that never asks for its exit code. Our own child
    is reaped.
    """
    deadline = time.monotonic() + timeout_s
    while is_alive(process):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def is_alive(process: psutil.Process) -> bool:
    """Return whether `process` runs; reaps it when it is our own child and has ended.

    A process whose first thread has ended looks like a zombie while its other threads still hold its
    sockets and files: it counts as alive.
    """
    try:
        if process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1:
            return process.is_running()
        if process.ppid() == os.getpid():
            process.wait(0)
    except psutil.NoSuchProcess:
        return False
    except psutil.TimeoutExpired:
        return True
    return False


def is_port_free(port: int) -> bool:
    """Return whether a server could listen on loopback `port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of an ended server that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def listened_ports(pid: int | None) -> set[int]:
    """Return the TCP ports that the process `pid` itself listens on; none where it does not live."""
    try:
        connections = psutil.Process(pid).net_connections("tcp") if pid is not None else []
    except psutil.Error:
        return set()
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


def is_listening(address: str | None) -> bool:
    """Return whether somebody accepts connections at `HOST:PORT`; at no address nobody does."""
    if address is None:
        return False
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False


def choose_free_port(taken: Container[int] = ()) -> int:
    """Return a loopback port that nobody listens on and that is not in `taken`.

    Raises:
        PermanentSourceError: no free port was found.
    """
    for port in random.SystemRandom().sample(_PORTS, _PORT_ATTEMPTS):
        if port not in taken and is_port_free(port):
            return port
    msg = (
        f"none of {_PORT_ATTEMPTS} ports tried between {_PORTS.start} and {_PORTS.stop} on {LOOPBACK} is free. "
        "End what listens there and try again"
    )
    raise PermanentSourceError(msg)


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports by the name of what listens on them.

    Args:
        numbers: the port of each name.
        moved: old ports of the names whose remembered port is taken by another program.
    """

    numbers: Mapping[str, int]
    moved: Mapping[str, int]

    def notes(self) -> tuple[str, ...]:
        """Return a sentence for each port that had to change."""
        return tuple(
            f"port {old} of the {name} is taken by another program: it now listens on {self.numbers[name]}"
            for name, old in self.moved.items()
        )


def remembered_ports(path: Path, names: Iterable[str], *, release_s: float = 0.0, remember: bool = True) -> Ports:
    """Return the ports of `names` that `path` remembers, choosing and remembering those it lacks.

    Args:
        path: JSON file, name to port.
        names: what needs a port.
        release_s: a remembered port that is taken is waited for so long: a killed server holds its own a
            moment longer.
        remember: whether to write down what was chosen; not for a dry run.
    """
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    except (OSError, msgspec.MsgspecError):
        known = {}
    deadline = time.monotonic() + release_s
    numbers: dict[str, int] = {}
    moved: dict[str, int] = {}
    for name in names:
        old = known.get(name)
        while old is not None and not is_port_free(old) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if old is None or not is_port_free(old):
            numbers[name] = choose_free_port({*known.values(), *numbers.values()})
            if old is not None:
                moved[name] = old
        else:
            numbers[name] = old
    if remember and numbers.items() - known.items():
        write_atomically(path, msgspec.json.encode(known | numbers).decode())
    return Ports(numbers, moved)


def spawn_detached(command: list[str], *, out: Path, environment: Mapping[str, str] | None = None) -> psutil.Process:
    """Start `command` in a session of its own, so that it outlives this command and its terminal.

    Its output goes to the file `out`, which is emptied first. The caller writes a `ProcessRecord`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    pid = os.posix_spawn(
        command[0],
        command,
        os.environ if environment is None else environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(out), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return psutil.Process(pid)


def user_at_host() -> str:
    """Return who runs this process, for records of what a person did: `user@host`."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name; which of the two depends on Python's version
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def last_lines(path: Path, count: int = 15) -> tuple[str, ...]:
    """Return the last `count` lines of the text file `path`; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-count:])


def write_atomically(path: Path, text: str, *, mode: int | None = None) -> None:
    """Write `text` to `path` so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    if mode is not None:
        temporary.chmod(mode)
    temporary.replace(path)
