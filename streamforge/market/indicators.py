"""Technical indicators of a series of bars, one bar at a time: what a mart adds to bars.

Each indicator is a fold: the state after a bar is all that the next one needs, so a series can be gone on with
at any bar, and the result is the same to the last bit as that of a run over all of it. Numbers, first values and
rounding follow TA-Lib with its default settings (`EMA`, `RSI`, `ATR`; unstable period 0):

- EMA of n starts at bar n with the mean of the first n closes; each next one moves by 2 / (n + 1) of the distance.
- RSI of n starts at bar n + 1: Wilder's means of rises and falls begin with the plain means of the first n changes.
  Where nothing moved it is 0.
- ATR of n starts at bar n + 1: the first bar has no true range, Wilder's mean begins with that of the next n.

Before its first value an indicator is None, and its state holds the running sums.
"""

from __future__ import annotations

from typing import NamedTuple

EMA_FAST = 50
EMA_SLOW = 200
RSI_PERIOD = 14
ATR_PERIOD = 30
_NOTHING_MOVED = 1e-14
"""TA-Lib's own bound under which a sum counts as zero."""


class IndicatorState(NamedTuple):
    """What the next bar needs of all those before; sums before warm-up, means after it.

    Args:
        bars: number of bars so far.
        close: close of the last bar.
        ema_fast: EMA of `EMA_FAST`, or the sum of closes.
        ema_slow: EMA of `EMA_SLOW`, or the sum of closes.
        rise: mean rise of `RSI_PERIOD`, or the sum of rises.
        fall: mean fall, not negative, or the sum of falls.
        true_range: mean true range of `ATR_PERIOD`, or the sum of true ranges.
    """

    bars: int = 0
    close: float = 0.0
    ema_fast: float = 0.0
    ema_slow: float = 0.0
    rise: float = 0.0
    fall: float = 0.0
    true_range: float = 0.0


class Indicators(NamedTuple):
    """The indicators of one bar; None while they warm up."""

    ema_fast: float | None
    ema_slow: float | None
    rsi: float | None
    atr: float | None


def add_bar(state: IndicatorState, high: float, low: float, close: float) -> tuple[IndicatorState, Indicators]:
    """Return the state and the indicators after the next bar of the series."""
    bars = state.bars + 1
    ema_fast = _exponential(state.ema_fast, close, bars, EMA_FAST)
    ema_slow = _exponential(state.ema_slow, close, bars, EMA_SLOW)
    rise, fall, true_range = state.rise, state.fall, state.true_range
    if state.bars:
        change = close - state.close
        rise = _wilder(rise, max(change, 0.0), state.bars, RSI_PERIOD)
        fall = _wilder(fall, max(-change, 0.0), state.bars, RSI_PERIOD)
        widest = max(high - low, abs(state.close - high), abs(state.close - low))
        true_range = _wilder(true_range, widest, state.bars, ATR_PERIOD)
    indicators = Indicators(
        ema_fast=ema_fast if bars >= EMA_FAST else None,
        ema_slow=ema_slow if bars >= EMA_SLOW else None,
        rsi=_strength(rise, fall) if bars > RSI_PERIOD else None,
        atr=true_range if bars > ATR_PERIOD else None,
    )
    return IndicatorState(bars, close, ema_fast, ema_slow, rise, fall, true_range), indicators


def _exponential(before: float, value: float, count: int, period: int) -> float:
    """Return the sum of the first values, their mean with the last of `period`, the EMA from then on."""
    if count > period:
        return (value - before) * (2.0 / (period + 1)) + before
    total = before + value
    return total / period if count == period else total


def _wilder(before: float, value: float, count: int, period: int) -> float:
    """Return the sum of the first values, their mean with the last of `period`, Wilder's mean from then on."""
    if count > period:
        return (before * (period - 1) + value) / period
    total = before + value
    return total / period if count == period else total


def _strength(rise: float, fall: float) -> float:
    total = rise + fall
    return 100.0 * (rise / total) if total >= _NOTHING_MOVED else 0.0
