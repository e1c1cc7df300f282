"""Candles of a market in which volatility spills over with a lag: for tests, and for a demo without history.

Instruments come in groups. A group's leader has volatility of its own; its followers do what the leader did one
interval before. What is seen of it is noisy, so a model that looks at neighbours can do better than one that does
not: by how much is known, because the truth is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from streamforge.gnn.panel import FloatArray

_LEADER_PERSISTENCE = 0.9
_LEADER_INNOVATION = 0.4
_FOLLOWER_PERSISTENCE = 0.1
_FOLLOWER_FROM_LEADER = 0.85
_FOLLOWER_INNOVATION = 0.1
_SEEN_NOISE = 0.25
_TYPICAL_VOLATILITY = 0.002
_FIRST_PRICE = 100.0
_RANGE_OF_VOLATILITY = math.sqrt(4 * math.log(2))


@dataclass(frozen=True, slots=True)
class SyntheticMarket:
    """How large a synthetic market is.

    Args:
        groups: groups of instruments that nothing connects.
        size: instruments of a group; the first leads.
        spillover: whether followers follow; without, every instrument leads itself.
    """

    groups: int = 3
    size: int = 4
    spillover: bool = True

    @property
    def symbols(self) -> list[str]:
        """Return the base assets, group by group."""
        return [f"G{group}M{member}" for group in range(self.groups) for member in range(self.size)]


def synthetic_candles(
    market: SyntheticMarket, *, intervals: int, interval_ns: int, first_ns: int, seed: int
) -> pa.Table:
    """Make candles: base, ts_start_ns, ts_end_ns, open, high, low, close, volume (float64), by base and start."""
    random = np.random.default_rng(seed)
    seen = _log_volatility(market, intervals, random)
    ranges = _RANGE_OF_VOLATILITY * _TYPICAL_VOLATILITY * np.exp(seen)
    returns = ranges * random.uniform(-0.8, 0.8, ranges.shape)
    closes = _FIRST_PRICE * np.exp(np.cumsum(returns, axis=0))
    opens = closes / np.exp(returns)
    above = (ranges - np.abs(returns)) * random.uniform(0.2, 0.8, ranges.shape)
    highs = np.maximum(opens, closes) * np.exp(above)
    lows = highs / np.exp(ranges)
    volumes = np.exp(random.normal(3.0, 0.3, ranges.shape) + 0.5 * seen)
    starts_ns = first_ns + np.arange(intervals, dtype=np.int64) * interval_ns
    count = len(market.symbols)
    prices = {"open": opens, "high": highs, "low": lows, "close": closes, "volume": volumes}
    columns: dict[str, Any] = {
        "base": np.repeat(np.array(market.symbols), intervals),
        "ts_start_ns": np.tile(starts_ns, count),
        "ts_end_ns": np.tile(starts_ns + interval_ns, count),
        **{name: values.T.reshape(-1) for name, values in prices.items()},
    }
    return pa.table(columns)


def _log_volatility(market: SyntheticMarket, intervals: int, random: np.random.Generator) -> FloatArray:
    """Return what is seen of log volatility around its mean, (intervals, instruments)."""
    shape = (intervals, market.groups, market.size)
    shocks, noise = random.normal(size=shape), random.normal(size=shape)
    true = np.zeros(shape)
    for now in range(1, intervals):
        before = true[now - 1]
        true[now] = _LEADER_PERSISTENCE * before + _LEADER_INNOVATION * shocks[now]
        if market.spillover:
            true[now, :, 1:] = (
                _FOLLOWER_PERSISTENCE * before[:, 1:]
                + _FOLLOWER_FROM_LEADER * before[:, :1]
                + _FOLLOWER_INNOVATION * shocks[now, :, 1:]
            )
    return (true + _SEEN_NOISE * noise).reshape(intervals, -1)
