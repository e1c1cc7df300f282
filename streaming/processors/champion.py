"""The champion model of a running process: loaded, and loaded anew when another becomes champion."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from streamforge.errors import StreamForgeError
from streamforge.gnn.registry import Champion, champion_version, load_champion
from streamforge.settings import Settings

_log = structlog.get_logger(__name__)


class ChampionWatch:
    """Asks the registry every few seconds which version is champion; a registry that fails changes nothing.

    Args:
        settings: where the registry is.
        interval_s: seconds between two questions.
        say: hears what people should know: which champion forecasts, or why none does.
    """

    def __init__(self, settings: Settings, interval_s: float, say: Callable[[str], None]) -> None:
        self.champion: Champion | None = None
        self._settings = settings
        self._interval_s = interval_s
        self._say = say
        self._due_s: float | None = None

    def refresh(self, now_s: float) -> None:
        """Ask, where it is time, and load what is champion now; called between two batches."""
        if self._due_s is not None and now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        held = None if self.champion is None else self.champion.version
        try:
            version = champion_version(self._settings)
            if version != held:
                self.champion = load_champion(self._settings)
                _log.info("champion", version=version, before=held)
        except StreamForgeError as error:
            # The model at hand is still a champion of a moment ago; forecasts need not end with the registry.
            _log.warning("champion not asked for", detail=str(error), held=held)
            self._say(f"champion {held or 'none'}; the registry cannot be asked: {error}")
            return
        self._say(self._state())

    def _state(self) -> str:
        if self.champion is None:
            return "no champion yet: bars are kept, forecasts begin when there is one"
        return f"champion {self.champion.version}"
