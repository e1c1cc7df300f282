"""Bars of many instruments on one grid of intervals: where decimals become floats.

Finer bars are put together to coarser ones, so that a model of hours can be fed from bars of minutes.
An instrument without a bar in an interval has NaN there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from streamforge.errors import SchemaMismatchError
from streamforge.market.bars import latest_revision

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

PANEL_COLUMNS = ("instrument", "interval", "ts_start_ns", "ts_end_ns", "high", "low", "close", "volume")
REVISION_COLUMNS = ("replay_epoch", "revision")

LEAST_VOLATILITY = 1e-5
"""An interval whose high is its low has this volatility: the logarithm of 0 says nothing."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Values of N instruments in T intervals, NaN where there was no bar.

    Shapes:
        ts_start_ns (T,), strictly rising by interval_ns; the others (T, N).
    """

    instruments: tuple[str, ...]
    interval_ns: int
    ts_start_ns: IntArray
    close: FloatArray
    log_volatility: FloatArray
    log_volume: FloatArray


def panel_of(bars: pa.Table, *, interval_ns: int | None = None, max_intervals: int | None = None) -> Panel:
    """Put bars on a grid; an interval counts once its end has been reached by the latest bar of anyone.

    Args:
        bars: with `PANEL_COLUMNS` and, where there are revisions, `REVISION_COLUMNS`; any order.
        interval_ns: length of the panel's intervals; None takes that of the bars, which must then be one.
        max_intervals: only so many of the latest intervals.

    Raises:
        SchemaMismatchError: the bars are of several lengths, or do not divide `interval_ns`.
    """
    if "revision" in bars.column_names:
        bars = latest_revision(bars)
    lengths = np.unique(_ints(bars, "ts_end_ns") - _ints(bars, "ts_start_ns"))
    wanted_ns = _interval_ns(lengths, interval_ns)
    if bars.num_rows == 0:
        empty = np.empty((0, 0))
        return Panel((), wanted_ns, np.empty(0, np.int64), empty, empty, empty)
    starts_ns, ends_ns = _ints(bars, "ts_start_ns"), _ints(bars, "ts_end_ns")
    last_end_ns = int(ends_ns.max()) // wanted_ns * wanted_ns
    first_ns = -(-int(starts_ns.min()) // wanted_ns) * wanted_ns
    if max_intervals is not None:
        first_ns = max(first_ns, last_end_ns - max_intervals * wanted_ns)
    inside = (starts_ns >= first_ns) & (ends_ns <= last_end_ns)
    return _on_grid(bars.filter(pa.array(inside)), wanted_ns, first_ns, max(last_end_ns, first_ns))


def _interval_ns(lengths: IntArray, wanted_ns: int | None) -> int:
    if wanted_ns is None:
        if len(lengths) != 1:
            msg = f"bars of {len(lengths)} lengths ({lengths.tolist()} ns), expected one: choose the interval"
            raise SchemaMismatchError(msg)
        return int(lengths[0])
    bad = [int(item) for item in lengths if wanted_ns % item]
    if bad:
        msg = f"bars of {bad} ns cannot be put together to intervals of {wanted_ns} ns: give finer ones"
        raise SchemaMismatchError(msg)
    return wanted_ns


def _on_grid(bars: pa.Table, interval_ns: int, first_ns: int, end_ns: int) -> Panel:
    rows = (_ints(bars, "ts_start_ns") - first_ns) // interval_ns
    table = bars.select(["instrument", "ts_start_ns"]).append_column("row", pa.array(rows, pa.int64()))
    for name in ("high", "low", "close", "volume"):
        table = table.append_column(name, pc.cast(bars[name], pa.float64()))
    table = table.sort_by([("instrument", "ascending"), ("ts_start_ns", "ascending")])
    joined = table.group_by(["instrument", "row"], use_threads=False).aggregate(
        [("high", "max"), ("low", "min"), ("close", "last"), ("volume", "sum")]
    )
    instruments = tuple(sorted({str(name) for name in joined["instrument"].to_pylist()}))
    columns = np.searchsorted(np.array(instruments, dtype=object), joined["instrument"].to_numpy())
    place = (joined["row"].to_numpy(), columns)

    def grid(name: str) -> FloatArray:
        values = np.full(((end_ns - first_ns) // interval_ns, len(instruments)), np.nan)
        values[place] = joined[name].to_numpy()
        return values

    log_range = np.log(grid("high_max")) - np.log(grid("low_min"))
    volatility = log_range / math.sqrt(4 * math.log(2))
    with np.errstate(divide="ignore"):
        log_volume = np.log(grid("volume_sum"))
    return Panel(
        instruments=instruments,
        interval_ns=interval_ns,
        ts_start_ns=np.arange(first_ns, end_ns, interval_ns, dtype=np.int64),
        close=grid("close_last"),
        log_volatility=np.log(np.maximum(volatility, LEAST_VOLATILITY)),
        # A bar of a venue's history may have no volume at all.
        log_volume=np.where(np.isfinite(log_volume), log_volume, np.nan),
    )


def _ints(table: pa.Table, name: str) -> IntArray:
    values: IntArray = table[name].to_numpy().astype(np.int64)
    return values
