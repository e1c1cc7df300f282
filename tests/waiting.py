"""Wait for a condition with a deadline; the only waiting that tests do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_FIRST_TICK_S, _LAST_TICK_S, _TICK_GROWTH = 0.02, 0.25, 1.25
_tick = threading.Event()


def wait_until(condition: Callable[[], T | None], *, timeout_s: float = 60.0, what: str) -> T:
    """Return the first truthy value of `condition`; fail with `what` after `timeout_s`.

    It asks less often the longer it waits: many conditions start a process or ask a server, which then wait for us.
    """
    deadline = time.monotonic() + timeout_s
    tick_s = _FIRST_TICK_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            msg = f"not within {timeout_s} s: {what}"
            raise AssertionError(msg)
        _tick.wait(tick_s)
        tick_s = min(tick_s * _TICK_GROWTH, _LAST_TICK_S)
