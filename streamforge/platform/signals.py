"""Ctrl-C, SIGTERM and SIGHUP as one exception that comes once, and never in the middle of a start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(BaseException):
    """Somebody asked this command to stop; not an `Exception`, so that nothing on the way swallows it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)


class StopSignals:
    """While entered, the first stop signal raises `StopRequested` in the main thread; later ones are ignored.

    Ignoring later ones keeps the cleanup whole: a second Ctrl-C would cut it off and leave processes behind.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._is_deferred = False
        self._is_raised = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold a signal back until the block is done: nothing may be started and not yet written down."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        self._raise_once()

    def ignore(self) -> None:
        """From here on nothing is raised any more: the cleanup has begun."""
        self._is_raised = True

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._received is None:
            self._received = number
        if not self._is_deferred:
            self._raise_once()

    def _raise_once(self) -> None:
        if self._received is not None and not self._is_raised:
            self._is_raised = True
            raise StopRequested(self._received)
