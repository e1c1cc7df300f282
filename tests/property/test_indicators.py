"""Indicators are TA-Lib's, from the first value on, and a series gone on with is the series in one run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import talib
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamforge.market.indicators import (
    ATR_PERIOD,
    EMA_FAST,
    EMA_SLOW,
    RSI_PERIOD,
    Indicators,
    IndicatorState,
    add_bar,
)

Column = NDArray[np.float64]
BARS = 1_200


def series(seed: int, *, scale: float = 100.0, bars: int = BARS) -> tuple[Column, Column, Column]:
    """Return high, low and close of a random walk with jumps and flat stretches."""
    random = np.random.default_rng(seed)
    moves = random.normal(0, 0.004, bars) * random.choice([0.0, 1.0, 25.0], bars, p=[0.2, 0.78, 0.02])
    close = scale * np.exp(np.cumsum(moves))
    before = np.concatenate([[scale], close[:-1]])
    high = np.maximum(before, close) * (1 + np.abs(random.normal(0, 0.001, bars)))
    low = np.minimum(before, close) * (1 - np.abs(random.normal(0, 0.001, bars)))
    return high, low, close


def run(
    high: Column, low: Column, close: Column, state: IndicatorState | None = None
) -> tuple[IndicatorState, list[Indicators]]:
    state = state or IndicatorState()
    found = []
    for bar in zip(high.tolist(), low.tolist(), close.tolist(), strict=True):
        state, indicators = add_bar(state, *bar)
        found.append(indicators)
    return state, found


def column(found: list[Indicators], name: str) -> Column:
    """Return one indicator, NaN while it warms up, as TA-Lib writes it."""
    return np.array([np.nan if (value := getattr(each, name)) is None else value for each in found])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e5])
def test_indicators_are_those_of_talib(seed: int, scale: float) -> None:
    high, low, close = series(seed, scale=scale)
    _, found = run(high, low, close)
    expected = {
        "ema_fast": talib.EMA(close, EMA_FAST),
        "ema_slow": talib.EMA(close, EMA_SLOW),
        "rsi": talib.RSI(close, RSI_PERIOD),
        "atr": talib.ATR(high, low, close, ATR_PERIOD),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(column(found, name), values, rtol=1e-9, atol=0, err_msg=name, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "warm_up"),
    [("ema_fast", EMA_FAST - 1), ("ema_slow", EMA_SLOW - 1), ("rsi", RSI_PERIOD), ("atr", ATR_PERIOD)],
)
def test_warm_up_rows_are_none_and_no_others(name: str, warm_up: int) -> None:
    _, found = run(*series(7, bars=EMA_SLOW + 5))
    assert [getattr(each, name) is None for each in found] == [True] * warm_up + [False] * (EMA_SLOW + 5 - warm_up)


def test_a_flat_market_has_the_rsi_that_talib_gives_it() -> None:
    flat = np.full(RSI_PERIOD + 5, 3.5)
    _, found = run(flat, flat, flat)
    np.testing.assert_array_equal(column(found, "rsi"), talib.RSI(flat, RSI_PERIOD))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 300), max_size=4))
def test_a_series_gone_on_with_at_any_bar_is_the_same_to_the_last_bit(seed: int, cuts: list[int]) -> None:
    high, low, close = series(seed, bars=300)
    whole_state, whole = run(high, low, close)
    state, parts = IndicatorState(), []
    edges = [0, *sorted(cuts), 300]
    for start, end in itertools.pairwise(edges):
        state, found = run(high[start:end], low[start:end], close[start:end], state)
        parts += found
    assert parts == whole
    assert state == whole_state
