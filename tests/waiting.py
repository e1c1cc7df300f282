"""Wait for a condition with a deadline; the only waiting that tests do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_tick = threading.Event()


def wait_until(condition: Callable[[], T | None], *, timeout_s: float = 60.0, what: str) -> T:
    """Return the first truthy value of `condition`; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            msg = f"not within {timeout_s} s: {what}"
            raise AssertionError(msg)
        _tick.wait(0.02)
