"""Bars for tests of models: made by the synthetic market, as plain tables and as rows of the real ones."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from streamforge.contracts import Contract
from streamforge.gnn.features import FeatureSet, features_of
from streamforge.gnn.graph import MarketGraphs, graphs_of
from streamforge.gnn.panel import panel_of
from streamforge.gnn.synthetic import SyntheticMarket, synthetic_candles
from streamforge.gnn.training import Recipe

HOUR_NS = 3_600_000_000_000
FIRST_NS = 480_000 * HOUR_NS
MARKET = SyntheticMarket(groups=2, size=3)
RECIPE = Recipe()


def make_bars(
    *, intervals: int, seed: int = 1, market: SyntheticMarket = MARKET, interval: str = "1h", interval_ns: int = HOUR_NS
) -> pa.Table:
    """Return bars as a panel takes them, decimals included."""
    candles = synthetic_candles(market, intervals=intervals, interval_ns=interval_ns, first_ns=FIRST_NS, seed=seed)
    names = pc.binary_join_element_wise(candles["base"], pa.scalar("USDT.SIM"), "-")
    bars = candles.drop_columns(["base"]).append_column("instrument", names)
    bars = bars.append_column("interval", pa.array([interval] * bars.num_rows))
    for name in ("open", "high", "low", "close", "volume"):
        decimals = pc.cast(pc.round(bars[name], 12), pa.decimal128(38, 18))
        bars = bars.set_column(bars.column_names.index(name), name, decimals)
    return bars


def made_of(bars: pa.Table) -> tuple[FeatureSet, MarketGraphs]:
    """Return features and graphs of bars by the recipe of tests."""
    features = features_of(panel_of(bars), RECIPE.features)
    return features, graphs_of(features, RECIPE.graph)


def as_rows(bars: pa.Table, contract: Contract) -> pa.Table:
    """Fill the columns of a contract's table: what the bars have, and any value for the rest."""
    columns: dict[str, Any] = {}
    for field in contract.arrow_schema:
        if field.name in bars.column_names:
            columns[field.name] = pc.cast(bars[field.name], field.type)
        elif field.name in {"ts_start", "ts_end"}:
            columns[field.name] = pc.cast(pc.divide(bars[f"{field.name}_ns"], 1_000), field.type)
        else:
            columns[field.name] = pa.array([_any_value(field.type)] * bars.num_rows, field.type)
    return pa.table(columns, schema=contract.arrow_schema)


def _any_value(kind: pa.DataType) -> Any:
    if pa.types.is_timestamp(kind):
        return datetime(2026, 1, 1, tzinfo=UTC)
    return "x" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else 1
