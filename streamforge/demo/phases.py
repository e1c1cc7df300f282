"""The phases of a demo: their names, who hears of them, and how long each took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Phase(StrEnum):
    """What the demo is doing."""

    START = "start"
    MODELS = "models"
    MARKET = "market"
    LANDING = "landing"
    REPLAY = "replay"
    RECORDINGS = "recordings"
    VERIFY = "verify"
    DAGSTER = "dagster"
    STOP = "stop"


class Watcher(Protocol):
    """Who is told what is going on."""

    def phase(self, phase: Phase) -> None:
        """Hear that a phase begins."""

    def progress(self, done: int, total: int, note: str) -> None:
        """Hear how far the phase is."""

    def tell(self, text: str) -> None:
        """Hear a sentence on the side."""


@dataclass(slots=True)
class PhaseClock:
    """Measures phases, one after the other; a phase that is entered again goes on."""

    phases: dict[str, float] = field(default_factory=dict)
    _current: str | None = None
    _since_s: float = 0.0

    def enter(self, phase: str) -> None:
        """Begin a phase and end the one before."""
        self.stop()
        self._current, self._since_s = phase, time.monotonic()

    def stop(self) -> None:
        """End the phase that runs."""
        if self._current is not None:
            spent_s = time.monotonic() - self._since_s
            self.phases[self._current] = self.phases.get(self._current, 0.0) + spent_s
        self._current = None

    @property
    def total_s(self) -> float:
        """Return the seconds of all phases that have ended."""
        return sum(self.phases.values())
