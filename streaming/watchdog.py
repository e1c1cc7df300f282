"""End the process when a call into a library does not come back, although it was given a timeout.

librdkafka's transactional calls wait without bound for their own main thread, and where the broker dies while offsets
are on their way that one may never answer: the process would stand still for ever, ready to all appearance. Its end is
a kill like any other: the next start takes over from the last commit.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

_LOOK_S = 1.0
_EXIT_CODE = 1
_log = structlog.get_logger(__name__)


class Watchdog:
    """Watches one call at a time.

    Args:
        end: ends the process with an exit code, at once.
        look_s: seconds between two looks.
    """

    def __init__(self, *, end: Callable[[int], object] = os._exit, look_s: float = _LOOK_S) -> None:
        self._end = end
        self._look_s = look_s
        self._call: tuple[str, float] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def over(self, what: str, timeout_s: float) -> Iterator[None]:
        """Give what runs inside `timeout_s` seconds."""
        self._call = what, time.monotonic() + timeout_s
        try:
            yield
        finally:
            self._call = None

    def close(self) -> None:
        """Watch no more."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        overdue = None
        while not self._stopped.wait(self._look_s):
            call = self._call
            if call is None or time.monotonic() < call[1]:
                overdue = None
            elif call is not overdue:
                overdue = call  # a process that stood still itself gets one more look
            else:
                _log.error("call does not return, the process ends", call=call[0], exit_code=_EXIT_CODE)
                self._end(_EXIT_CODE)
                return
