"""The latest bars of each instrument, kept for whoever looks back: one small piece of state for each bar.

Pure. A bar is kept under a key of its own, so that a new one costs one small record of a changelog, whatever
the window's length; what leaves the window leaves the changelog too.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from streamforge.errors import DecodeError
from streamforge.market.bars import INTERVAL_NS
from streamforge.market.records import Bar

NEVER_NS = 0

_SEPARATOR = "@"
_ASKED = "asked"


class WindowBar(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is kept of a bar; prices and volume are decimal text."""

    ts_start_ns: int
    ts_end_ns: int
    replay_epoch: int
    revision: int
    high: str
    low: str
    close: str
    volume: str

    @classmethod
    def of(cls, bar: Bar) -> WindowBar:
        """Return what is kept of `bar`."""
        return cls(
            bar.ts_start_ns,
            bar.ts_end_ns,
            bar.replay_epoch,
            bar.revision,
            bar.high,
            bar.low,
            bar.close,
            bar.volume,
        )


class InstrumentWindow(msgspec.Struct):
    """The latest bars of one instrument by their start, and the start of the last interval that was asked for."""

    bars: dict[int, WindowBar] = {}
    newest_ns: int = NEVER_NS
    asked_ns: int = NEVER_NS

    def copy(self) -> InstrumentWindow:
        """Return a window of its own with the same bars."""
        return InstrumentWindow(dict(self.bars), self.newest_ns, self.asked_ns)

    def add(self, bar: Bar, keep_bars: int) -> list[int]:
        """Take one bar in and return the starts whose bars are others than before, or gone.

        A later revision replaces an earlier one, whichever comes first. A bar further back than `keep_bars`
        intervals before the newest is not taken.
        """
        newest_ns = max(self.newest_ns, bar.ts_start_ns)
        first_ns = newest_ns - (keep_bars - 1) * INTERVAL_NS
        known = self.bars.get(bar.ts_start_ns)
        is_older = known is not None and (known.replay_epoch, known.revision) >= (bar.replay_epoch, bar.revision)
        if is_older or bar.ts_start_ns < first_ns:
            return []
        self.newest_ns = newest_ns
        self.bars[bar.ts_start_ns] = WindowBar.of(bar)
        changed = [bar.ts_start_ns]
        # Bars come in the order of time but for corrections, which go where their first revision was; one that
        # comes late without a first one leaves a little late.
        while (oldest_ns := next(iter(self.bars))) < first_ns:
            del self.bars[oldest_ns]
            changed.append(oldest_ns)
        return changed


WindowsState = Mapping[str, InstrumentWindow]
"""Windows by instrument."""


def bar_key(instrument: str, ts_start_ns: int) -> str:
    """Return the state key of one bar."""
    return f"{instrument}{_SEPARATOR}{ts_start_ns}"


def asked_key(instrument: str) -> str:
    """Return the state key of what was asked last of an instrument."""
    return f"{instrument}{_SEPARATOR}{_ASKED}"


def save_window(state: WindowsState, key: str) -> str | None:
    """Return the text of one state key, None where it no longer exists."""
    instrument, _, name = key.rpartition(_SEPARATOR)
    window = state.get(instrument)
    if window is None:
        return None
    found: int | WindowBar | None = window.asked_ns if name == _ASKED else window.bars.get(int(name))
    return None if found is None else msgspec.json.encode(found).decode()


def restore_windows(saved: Mapping[str, str]) -> WindowsState:
    """Return the windows whose keys were saved as `saved`.

    Raises:
        DecodeError: a text is not such a state.
    """
    bars: dict[str, dict[int, WindowBar]] = {}
    asked: dict[str, int] = {}
    try:
        for key, text in saved.items():
            instrument, _, name = key.rpartition(_SEPARATOR)
            kept = bars.setdefault(instrument, {})
            if name == _ASKED:
                asked[instrument] = msgspec.json.decode(text, type=int)
            else:
                kept[int(name)] = msgspec.json.decode(text, type=WindowBar)
    except (msgspec.MsgspecError, ValueError) as error:
        raise DecodeError("bad_state", f"expected the state of a window: {error}") from error
    return {
        instrument: InstrumentWindow(
            dict(sorted(kept.items())), max(kept, default=NEVER_NS), asked.get(instrument, NEVER_NS)
        )
        for instrument, kept in bars.items()
    }


def bars_between(state: WindowsState, start_ns: int, end_ns: int) -> dict[str, list[WindowBar]]:
    """Return the bars that lie in `[start_ns, end_ns)`, by instrument; instruments without one are left out."""
    found = {
        instrument: [bar for bar in window.bars.values() if start_ns <= bar.ts_start_ns and bar.ts_end_ns <= end_ns]
        for instrument, window in state.items()
    }
    return {instrument: bars for instrument, bars in found.items() if bars}
