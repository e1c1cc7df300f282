"""The one function that the models need and SQL lacks: a fold over the ordered bars of each series.

`indicators(TABLE(...) PARTITION BY ... ORDER BY ts_start_ns)` gives one row for each bar. A row whose `is_state` is
true is no bar but the last one that already has its indicators: the series goes on from its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from streamforge.market.indicators import IndicatorState, add_bar

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_NAME = "indicators"
_RETURNS = """
    `instrument` string, `interval` string, `ts_start_ns` bigint,
    `ema_50` double, `ema_200` double, `rsi_14` double, `atr_30` double,
    `bar_number` bigint, `state_ema_50` double, `state_ema_200` double,
    `state_rise` double, `state_fall` double, `state_true_range` double
"""


class FoldIndicators:
    """Carry the state through the bars of one series; Spark makes one object for each."""

    def __init__(self) -> None:
        self._state = IndicatorState()

    def eval(self, row: Any) -> Iterator[tuple[Any, ...]]:
        """Take one row and give the indicators and the state after it."""
        if row["is_state"]:
            self._state = IndicatorState(
                bars=row["bar_number"],
                close=row["close"],
                ema_fast=row["state_ema_50"],
                ema_slow=row["state_ema_200"],
                rise=row["state_rise"],
                fall=row["state_fall"],
                true_range=row["state_true_range"],
            )
            return
        self._state, found = add_bar(self._state, row["high"], row["low"], row["close"])
        state = self._state
        yield (
            *(row["instrument"], row["interval"], row["ts_start_ns"]),
            *(found.ema_fast, found.ema_slow, found.rsi, found.atr),
            *(state.bars, state.ema_fast, state.ema_slow, state.rise, state.fall, state.true_range),
        )


def register_functions(session: SparkSession) -> None:
    """Make the functions known to SQL in `session`."""
    from pyspark.sql.udtf import UserDefinedTableFunction  # noqa: PLC0415  # heavy

    function = UserDefinedTableFunction(FoldIndicators, returnType=_RETURNS, deterministic=True)
    session.udtf.register(_NAME, function)
