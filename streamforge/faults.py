"""Named steps at which a test can kill or stop the process: a real signal, nothing simulated.

Production code marks the places between the steps of a protocol with `step("name")`. Nothing happens
unless the process was started with the setting `kill_at`.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass

from streamforge.errors import ConfigurationError

_KILL_AT = re.compile(r"(?P<name>[^:!]+)(:(?P<count>[1-9]\d*))?(!(?P<stop>stop))?")


@dataclass(slots=True)
class _Fault:
    """A signal at the Nth passage of a step."""

    passages: int
    number: signal.Signals


_armed: dict[str, _Fault] = {}


def arm(kill_at: str | None) -> None:
    """Kill this process at the step that `kill_at` names: `step`, or `step:N` for its Nth passage.

    With `!stop` behind it the process is stopped (SIGSTOP) instead, and goes on when it gets a SIGCONT.

    Raises:
        ConfigurationError: it is not of this form.
    """
    _armed.clear()
    if kill_at is None:
        return
    match = _KILL_AT.fullmatch(kill_at)
    if match is None:
        msg = f"kill_at must be step or step:N with N > 0, and !stop behind it to stop only, found {kill_at!r}"
        raise ConfigurationError(msg)
    number = signal.SIGSTOP if match["stop"] else signal.SIGKILL
    _armed[match["name"]] = _Fault(int(match["count"] or 1), number)


def step(name: str) -> None:
    """Mark a step; sends the signal when it was armed for this passage."""
    fault = _armed.get(name) if _armed else None
    if fault is None:
        return
    fault.passages -= 1
    if fault.passages == 0:
        os.kill(os.getpid(), fault.number)
