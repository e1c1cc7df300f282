"""Become another program that dies with its supervisor and does not come back faster than is good.

    python -m streamforge.platform.launch --name NAME --state DIR [--parent-death SIGNAL] [--after PORT] -- COMMAND...

The supervisor library restarts a process that was up at once, and it ignores exit codes of processes that
end in their first seconds. So this sits between them, and then replaces itself with the command (same pid):

- On Linux the kernel is asked to send SIGNAL (default KILL) when the parent dies (`PR_SET_PDEATHSIG`, kept
  over exec): a SIGKILL of the supervisor leaves nothing behind. Elsewhere `streamforge down` finds what is
  left by the pid file that is written here.
- A process that was started before within the last two minutes waits first: 1, 2, 4 ... 30 s.
- One that needs others waits until somebody listens on their ports, a minute at most: all may have been killed at once,
  and Dagster's webserver asks its code servers only once.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from streamforge.processes import LOOPBACK, ProcessRecord, is_listening, write_atomically

_PR_SET_PDEATHSIG = 1
_RECENT_S = 120.0
_MAX_DELAY_S = 30.0
_INIT_PID = 1
_PORTS_TIMEOUT_S = 60.0
_PORTS_POLL_S = 0.1


def backoff_s(starts_s: Sequence[float], now_s: float) -> float:
    """Return how long to wait before a start at `now_s`, after starts at `starts_s` (seconds since 1970)."""
    recent = sum(1 for start_s in starts_s if 0 <= now_s - start_s < _RECENT_S)
    return 0.0 if recent == 0 else min(2.0 ** (recent - 1), _MAX_DELAY_S)


def launch_command(
    command: Sequence[str],
    *,
    name: str,
    state: Path,
    parent_death: signal.Signals | None = signal.SIGKILL,
    after: Iterable[int] = (),
) -> list[str]:
    """Return the command line that runs `command` through this module; `after` are ports of the loopback."""
    death = "NONE" if parent_death is None else parent_death.name.removeprefix("SIG")
    own = [sys.executable, "-m", __name__]
    ports = [f"--after={port}" for port in after]
    return [*own, "--name", name, "--state", str(state), "--parent-death", death, *ports, "--", *command]


def pid_file(state: Path, name: str) -> Path:
    """Return the file with the record of the process called `name`."""
    return state / f"{name}.pid"


def starts_file(state: Path, name: str) -> Path:
    """Return the file with the times at which the process called `name` was started."""
    return state / f"{name}.starts"


def main(arguments: Sequence[str]) -> None:
    """Bind to the parent, wait as long as the history asks for, become the command."""
    parser = argparse.ArgumentParser(description="Run a command that dies with its supervisor.")
    parser.add_argument("--name", required=True, help="name of the process")
    parser.add_argument("--state", required=True, type=Path, help="folder of pid and history files")
    parser.add_argument("--parent-death", default="KILL", help="signal when the parent dies: KILL, TERM or NONE")
    parser.add_argument("--after", action="append", default=[], type=int, help="port that must listen first")
    parser.add_argument("command", nargs="+", help="what to run")
    options = parser.parse_args(arguments)
    if options.parent_death != "NONE":
        _bind_to_parent(signal.Signals[f"SIG{options.parent_death}"])
    ProcessRecord.of(os.getpid()).write(pid_file(options.state, options.name))
    _wait_for_turn(starts_file(options.state, options.name))
    _wait_for_ports(options.after)
    os.execvp(options.command[0], options.command)  # noqa: S606  # no shell is the point


def _bind_to_parent(death_signal: signal.Signals) -> None:
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == _INIT_PID:
        # The parent died before we asked: no signal will come.
        sys.exit(f"the supervisor is gone, {death_signal.name} would never come; not started")


def _wait_for_turn(history: Path) -> None:
    try:
        starts_s = msgspec.json.decode(history.read_bytes(), type=list[float])
    except (OSError, msgspec.MsgspecError):
        starts_s = []
    delay_s = backoff_s(starts_s, time.time())
    if delay_s:
        sys.stderr.write(f"restart after {delay_s:g} s ({len(starts_s)} starts before)\n")
        sys.stderr.flush()
        time.sleep(delay_s)
    write_atomically(history, msgspec.json.encode([*starts_s[-100:], time.time()]).decode())


def _wait_for_ports(ports: Sequence[int]) -> None:
    """Wait until each port listens; what does not in time is for the command to tell."""
    deadline_s = time.monotonic() + _PORTS_TIMEOUT_S
    for port in ports:
        while not is_listening(f"{LOOPBACK}:{port}") and time.monotonic() < deadline_s:
            time.sleep(_PORTS_POLL_S)


if __name__ == "__main__":
    main(sys.argv[1:])
