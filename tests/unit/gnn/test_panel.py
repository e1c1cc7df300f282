"""Panels: decimals become floats, revisions and finer bars become one value, unfinished intervals stay out."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from streamforge.errors import SchemaMismatchError
from streamforge.gnn.panel import LEAST_VOLATILITY, panel_of

MINUTE_NS = 60_000_000_000
HOUR_NS = 60 * MINUTE_NS


def test_panel_of_decimals_gives_parkinson_volatility() -> None:
    panel = panel_of(_table([_bar("A", 0, high="110", low="100")]))
    assert panel.log_volatility[0, 0] == pytest.approx(math.log(math.log(1.1) / math.sqrt(4 * math.log(2))))
    assert panel.close[0, 0] == 105.0


def test_panel_of_a_bar_without_range_has_the_least_volatility() -> None:
    panel = panel_of(_table([_bar("A", 0, high="100", low="100")]))
    assert panel.log_volatility[0, 0] == pytest.approx(math.log(LEAST_VOLATILITY))


def test_panel_of_missing_bars_has_nan_and_every_interval() -> None:
    panel = panel_of(_table([_bar("B", 3), _bar("A", 0), _bar("A", 1)]))
    assert panel.instruments == ("A", "B")
    assert panel.ts_start_ns.tolist() == [number * MINUTE_NS for number in range(4)]
    assert np.isfinite(panel.close).tolist() == [[True, False], [True, False], [False, False], [False, True]]


def test_panel_of_revisions_takes_the_latest_by_replay_epoch_then_revision() -> None:
    rows = [
        _bar("A", 0, close="1", replay_epoch=1, revision=0),
        _bar("A", 0, close="2", replay_epoch=0, revision=5),
        _bar("A", 1, close="3", replay_epoch=0, revision=0),
        _bar("A", 1, close="4", replay_epoch=0, revision=1),
    ]
    for table in (_table(rows), _table(rows[::-1])):
        assert panel_of(table).close[:, 0].tolist() == [1.0, 4.0]


def test_panel_of_zero_volume_is_not_known() -> None:
    assert np.isnan(panel_of(_table([_bar("A", 0, volume="0")])).log_volume[0, 0])


def test_panel_of_finer_bars_puts_them_together_without_the_unfinished_ends() -> None:
    rows = [
        _bar("A", minute, high=str(200 + minute), low=str(190 - minute), close=str(minute)) for minute in range(150)
    ]
    panel = panel_of(_table(rows[30:][::-1]), interval_ns=HOUR_NS)
    assert panel.ts_start_ns.tolist() == [HOUR_NS]
    assert panel.log_volatility[0, 0] == pytest.approx(math.log(math.log(319 / 71) / math.sqrt(4 * math.log(2))))
    assert panel.close[0, 0] == 119.0
    assert panel.log_volume[0, 0] == pytest.approx(math.log(60))


def test_panel_of_bars_of_two_lengths_is_refused() -> None:
    rows = [_bar("A", 0), _bar("A", 60, interval_ns=HOUR_NS)]
    with pytest.raises(SchemaMismatchError, match="2 lengths"):
        panel_of(_table(rows))


def test_panel_of_coarser_bars_than_asked_for_is_refused() -> None:
    with pytest.raises(SchemaMismatchError, match="finer"):
        panel_of(_table([_bar("A", 0, interval_ns=HOUR_NS)]), interval_ns=MINUTE_NS)


def test_panel_of_max_intervals_keeps_the_latest() -> None:
    panel = panel_of(_table([_bar("A", number) for number in range(10)]), max_intervals=3)
    assert panel.ts_start_ns.tolist() == [7 * MINUTE_NS, 8 * MINUTE_NS, 9 * MINUTE_NS]


def _bar(instrument: str, number: int, *, interval_ns: int = MINUTE_NS, **values: Any) -> dict[str, Any]:
    start_ns = number * MINUTE_NS
    row = {"high": "110", "low": "100", "close": "105", "volume": "1", "replay_epoch": 0, "revision": 0} | values
    prices = {name: Decimal(row[name]) for name in ("high", "low", "close", "volume")}
    return (
        row
        | prices
        | {
            "instrument": instrument,
            "interval": "1m" if interval_ns == MINUTE_NS else "1h",
            "ts_start_ns": start_ns,
            "ts_end_ns": start_ns + interval_ns,
        }
    )


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows)
    for name in ("high", "low", "close", "volume"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.decimal128(38, 18)))
    return table
