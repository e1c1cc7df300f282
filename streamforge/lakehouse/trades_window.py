"""Trades of a window of event time, read from their table for the batch path: in bounded pieces, each trade once.

A trade's place in `trades` (topic-partition and offset) decides between two trades of one event time, and a bar
names the range that it was made of. A trade that a replay added has no typed record and so no place: it takes
that of the trade before it in its bar, in the order of raw, or of the one behind it, or 0 where the bar has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import pyarrow as pa
from pyiceberg.expressions import And, BooleanExpression, GreaterThanOrEqual, LessThan
from pyiceberg.table import Table

from streamforge.lakehouse.column_bounds import newest_first, upper_bound
from streamforge.lakehouse.replay_plan import RAW_COLUMNS, compare_with
from streamforge.lakehouse.replay_target import files_with, read_file
from streamforge.lakehouse.rows import SOURCE_OFFSET, SOURCE_PARTITION
from streamforge.market.bars import INTERVAL_NS, SourcedTrade, bar_start_ns
from streamforge.market.records import AggressorSide, Trade
from streamforge.times import iso_text

PIECE_NS = 10 * INTERVAL_NS
"""Event time that is read at once: whole bars, and of a busy market some hundred thousand trades."""

_EVENT, _EVENT_NS = "ts_event", "ts_event_ns"
_TRADE_FIELDS = tuple(field.name for field in msgspec.structs.fields(Trade))
_COLUMNS = tuple(dict.fromkeys([*_TRADE_FIELDS, *RAW_COLUMNS, SOURCE_PARTITION, SOURCE_OFFSET]))


def trades_between(table: Table, start_ns: int, end_ns: int) -> Iterator[list[SourcedTrade]]:
    """Yield the trades with an event time in `[start_ns, end_ns)`, both on full minutes, a piece at a time.

    Raises:
        CommitError: the table cannot be read.
    """
    for piece_ns in range(start_ns, end_ns, PIECE_NS):
        window = within(_EVENT, piece_ns, min(end_ns, piece_ns + PIECE_NS))
        parts = [read_file(table, task, _COLUMNS, window) for task in files_with(table, window)]
        rows = pa.concat_tables(parts) if parts else None
        if rows is not None and rows.num_rows:
            yield sourced(rows)


def sourced(rows: pa.Table) -> list[SourcedTrade]:
    """Return rows of the table as trades with their places, in the order of raw; of two with one id the first."""
    ordered = rows.sort_by([(name, "ascending") for name in RAW_COLUMNS])
    columns: dict[str, list[Any]] = {name: ordered[name].to_pylist() for name in _COLUMNS}
    for name in ("price", "size"):
        columns[name] = [format(value, "f") for value in columns[name]]
    columns["aggressor_side"] = [AggressorSide(value) for value in columns["aggressor_side"]]
    seen: set[tuple[str, str, str]] = set()
    trades: list[Trade] = []
    places: list[tuple[int | None, int | None]] = []
    for values, place in zip(
        zip(*(columns[name] for name in _TRADE_FIELDS), strict=True),
        zip(columns[SOURCE_PARTITION], columns[SOURCE_OFFSET], strict=True),
        strict=True,
    ):
        trade = Trade(*values)
        identity = (trade.venue, trade.symbol, trade.trade_id)
        if identity not in seen:
            seen.add(identity)
            trades.append(trade)
            places.append(place)
    return _placed(trades, places)


def latest_events(table: Table, partitions: Sequence[int], start_ns: int, needed_ns: int) -> Mapping[int, int]:
    """Return the latest event time of each of `partitions` of `trades`, as far as it matters.

    Files are read newest first, until every topic-partition has an event at `needed_ns` or later. Events before
    `start_ns` are not looked at. What is landed of a topic-partition is a prefix of it, so its latest event time
    says what the watermark of the stream was there.

    Raises:
        CommitError: the table cannot be read.
    """
    wanted = set(partitions)
    latest: dict[int, int] = {}
    since = compare_with(GreaterThanOrEqual, _EVENT, iso_text(start_ns))
    for task in newest_first(table, files_with(table, since), _EVENT_NS):
        bound = upper_bound(table, task.file, _EVENT_NS)
        if all(latest.get(item, -1) >= min(needed_ns, bound or needed_ns) for item in wanted):
            break
        rows = read_file(table, task, (SOURCE_PARTITION, _EVENT_NS), since)
        found = rows.group_by(SOURCE_PARTITION).aggregate([(_EVENT_NS, "max")])
        for partition, event_ns in zip(*(column.to_pylist() for column in found.columns), strict=True):
            if partition in wanted and event_ns > latest.get(partition, -1):
                latest[partition] = event_ns
    return latest


def within(column: str, start_ns: int, end_ns: int) -> BooleanExpression:
    """Return the filter for `[start_ns, end_ns)` of a column of times; both are whole microseconds."""
    return And(
        compare_with(GreaterThanOrEqual, column, iso_text(start_ns)), compare_with(LessThan, column, iso_text(end_ns))
    )


def _placed(trades: list[Trade], places: list[tuple[int | None, int | None]]) -> list[SourcedTrade]:
    known: dict[tuple[str, int], tuple[int, int]] = {}
    for trade, (partition, offset) in zip(trades, places, strict=True):
        if partition is not None and offset is not None:
            known.setdefault((trade.instrument, bar_start_ns(trade.ts_event_ns)), (partition, offset))
    result = []
    for trade, (partition, offset) in zip(trades, places, strict=True):
        bar = (trade.instrument, bar_start_ns(trade.ts_event_ns))
        if partition is not None and offset is not None:
            known[bar] = (partition, offset)
        place = known.get(bar, (trade.raw_partition, 0))
        result.append(SourcedTrade(trade, trade.raw_topic_id, *place))
    return result
