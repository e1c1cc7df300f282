"""Operating-system processes and ports: records that survive pid reuse, endings with a deadline, free ports.

A pid alone names nothing: it is reused. A record holds the creation time too, and only a live process
that agrees in both is ever signalled.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Container
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
    """Return whether `process` runs; reaps it when it is our own child and has ended."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.is_running()
        if process.ppid() == os.getpid():
            process.wait(0)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        pass
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


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
