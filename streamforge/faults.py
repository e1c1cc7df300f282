"""Named steps at which a test can kill the process: a real SIGKILL, nothing simulated.

Production code marks the places between the steps of a protocol with `step("name")`. Nothing happens
unless the process was started with the setting `kill_at`.
"""

from __future__ import annotations

import os
import signal

from streamforge.errors import ConfigurationError

_armed: dict[str, int] = {}


def arm(kill_at: str | None) -> None:
    """Kill this process at the step that `kill_at` names: `step`, or `step:N` for its Nth passage.

    Raises:
        ConfigurationError: N is not a positive number.
    """
    _armed.clear()
    if kill_at is None:
        return
    name, _, count = kill_at.partition(":")
    if count and not (count.isdecimal() and int(count) > 0):
        msg = f"kill_at must be step or step:N with N > 0, found {kill_at!r}"
        raise ConfigurationError(msg)
    _armed[name] = int(count or 1)


def step(name: str) -> None:
    """Mark a step; kills the process when it was armed for this passage."""
    if not _armed or name not in _armed:
        return
    _armed[name] -= 1
    if _armed[name] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
