"""Source ranges of a replay from other wishes than offsets: a time window, or all that Kafka holds."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from pyiceberg.expressions import And, GreaterThanOrEqual, LessThan

from streamforge.errors import ConfigurationError, PermanentSourceError
from streamforge.lakehouse import commit
from streamforge.lakehouse.kafka_reader import log_ranges, offsets_at
from streamforge.lakehouse.replay_plan import Lineage, compare_with, merged_ranges, numbers_of
from streamforge.lakehouse.replay_target import Target, files_with, read_file
from streamforge.offsets import OffsetRange
from streamforge.times import to_ns


def ranges_of_log(target: Target) -> tuple[OffsetRange, ...]:
    """Return everything that Kafka holds of the source topic, as ranges.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    logs = log_ranges(target.settings, [target.source.topic])
    return merged_ranges(OffsetRange(each.topic, each.partition, *log) for each, log in logs.items())


def ranges_by_produce_time(target: Target, start: datetime, end: datetime) -> tuple[OffsetRange, ...]:
    """Return the records of the source topic that were produced in `[start, end)`.

    A range begins at the first record produced at or after `start` and ends at the first one produced at or
    after `end`, in the order of the log: produce times of several producers are not strictly rising.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    starts = offsets_at(target.settings, [target.source.topic], _milliseconds(start))
    ends = offsets_at(target.settings, [target.source.topic], _milliseconds(end))
    return merged_ranges(
        OffsetRange(each.topic, each.partition, first, max(first, ends[each])) for each, first in starts.items()
    )


def ranges_by_event_time(target: Target, start: datetime, end: datetime) -> tuple[OffsetRange, ...]:
    """Return ranges that cover the source records of all rows whose time lies in `[start, end)`.

    The time is the column that the table is partitioned by (`time_column`). Of each topic-partition it is one
    range from the first such record to the last: records between them belong to it whatever their time, and
    records that gave no row are found only there.

    Raises:
        ConfigurationError: the table has no time column.
        PermanentSourceError: rows of the window were made from an earlier topic, which Kafka no longer has.
        CommitError: the table cannot be read.
    """
    table, lineage = target.load(), target.lineage
    column = time_column(lineage)
    epoch = target.epoch_in(commit.view_of(table).state)
    window = And(
        compare_with(GreaterThanOrEqual, column, start.astimezone(UTC).isoformat()),
        compare_with(LessThan, column, end.astimezone(UTC).isoformat()),
    )
    parts = [read_file(table, task, lineage.columns, window) for task in files_with(table, window)]
    rows = pa.concat_tables(parts) if parts else lineage.contract.arrow_schema.empty_table().select(lineage.columns)
    epochs, partitions, offsets, _ = (numbers_of(rows, name) for name in lineage.columns)
    earlier = int((epochs != epoch).sum())
    if earlier:
        msg = (
            f"{earlier} rows of {commit.table_name(table)} between {start} and {end} were not made from the topic "
            f"{target.source.topic} of now (topic id {target.source.topic_id}), so Kafka cannot give them again. "
            "Ask by --offsets for what the topic holds"
        )
        raise PermanentSourceError(msg)
    return merged_ranges(
        OffsetRange(
            target.source.topic,
            int(partition),
            int(offsets[partitions == partition].min()),
            int(offsets[partitions == partition].max()) + 1,
        )
        for partition in np.unique(partitions)
    )


def time_column(lineage: Lineage) -> str:
    """Return the column that a table is partitioned by in time, which is the time that its rows are asked by.

    Raises:
        ConfigurationError: the table is not partitioned by time.
    """
    for _, column in lineage.contract.table.partition_by if lineage.contract.table else ():
        if lineage.contract.field(column).type_name == "timestamptz":
            return column
    msg = f"table {lineage.contract.id} is not partitioned by time; ask by offsets or by produce time"
    raise ConfigurationError(msg)


def parse_time(text: str) -> datetime:
    """Read an ISO 8601 time; it has to say its offset from UTC.

    Raises:
        ConfigurationError: it is no time, or a naive one.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        msg = f"a time must be ISO 8601, for instance 2026-11-24T06:00:00Z, found {text!r}: {error}"
        raise ConfigurationError(msg) from error
    if found.tzinfo is None:
        msg = f"time {text!r} does not say its offset from UTC; end it with Z for UTC: 2026-11-24T06:00:00Z"
        raise ConfigurationError(msg)
    try:
        return found.astimezone(UTC)
    except OverflowError as error:
        msg = f"time {text!r} is before the year 1 or after 9999 in UTC"
        raise ConfigurationError(msg) from error


def _milliseconds(time: datetime) -> int:
    """Return milliseconds since 1970, rounded up: a record at the millisecond before is not in the window."""
    return -(-to_ns(time) // 1_000_000)
