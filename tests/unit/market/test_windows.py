"""Windows of bars: bounded, point in time, and what is saved is what is restored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamforge.errors import DecodeError
from streamforge.market.windows import (
    InstrumentWindow,
    asked_key,
    bar_key,
    bars_between,
    restore_windows,
    save_window,
)
from tests.inference_support import FIRST_NS, make_bar

MINUTE_NS = 60_000_000_000
NAME = "BTC-USDT.SIM"


def window_of(*steps: tuple[int, int], keep_bars: int = 100) -> tuple[InstrumentWindow, dict[str, str]]:
    """Take (minute, revision) in and return the window with the changelog that it leaves."""
    window = InstrumentWindow()
    log: dict[str, str] = {}
    for minute, revision in steps:
        changed = window.add(make_bar(NAME, minute, revision=revision), keep_bars)
        for key in [bar_key(NAME, start_ns) for start_ns in changed]:
            text = save_window({NAME: window}, key)
            if text is None:
                del log[key]
            else:
                log[key] = text
    return window, log


STEPS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=60)


@given(STEPS, st.integers(2, 12))
def test_changelog_of_a_window_restores_it(steps: list[tuple[int, int]], keep_bars: int) -> None:
    window, log = window_of(*steps, keep_bars=keep_bars)
    window.asked_ns = 77
    log[asked_key(NAME)] = save_window({NAME: window}, asked_key(NAME)) or ""
    assert restore_windows(log) == {NAME: window}


@given(STEPS)
def test_later_revision_stays_in_whatever_order_they_come(steps: list[tuple[int, int]]) -> None:
    window, _ = window_of(*steps)
    latest: dict[int, int] = {}
    for minute, revision in steps:
        latest[minute] = max(revision, latest.get(minute, 0))
    assert {(bar.ts_start_ns - FIRST_NS) // MINUTE_NS: bar.revision for bar in window.bars.values()} == latest


@given(st.integers(1, 60), st.integers(2, 12))
def test_window_holds_the_latest_bars_only(minutes: int, keep_bars: int) -> None:
    window, log = window_of(*((minute, 0) for minute in range(minutes)), keep_bars=keep_bars)
    wanted = range(max(0, minutes - keep_bars), minutes)
    assert [(start - FIRST_NS) // MINUTE_NS for start in window.bars] == list(wanted)
    assert len(log) == len(wanted)


def test_bars_between_sees_nothing_that_ends_later() -> None:
    window, _ = window_of(*((minute, 0) for minute in range(10)))
    found = bars_between({NAME: window, "none": InstrumentWindow()}, FIRST_NS + 2 * MINUTE_NS, FIRST_NS + 5 * MINUTE_NS)
    assert [(bar.ts_start_ns - FIRST_NS) // MINUTE_NS for bar in found.pop(NAME)] == [2, 3, 4]
    assert found == {}


@pytest.mark.parametrize("saved", [{bar_key(NAME, 1): "{}"}, {f"{NAME}@soon": "[]"}, {asked_key(NAME): '"x"'}])
def test_state_that_is_none_is_refused(saved: dict[str, str]) -> None:
    with pytest.raises(DecodeError, match="bad_state"):
        restore_windows(saved)
