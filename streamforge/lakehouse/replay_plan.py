"""What a replay would replace, as values: ranges, the rows that came from them, and the comparison.

Everything here is pure. The rows of a table that came from a source range are known by their lineage: for
`trades` the raw identity (`raw_epoch, raw_partition, raw_offset, raw_index`), for a table that is fed from its
own topic the source identity (`source_*`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyiceberg.expressions import And, BooleanExpression, EqualTo, GreaterThanOrEqual, LessThan, Or
from pyiceberg.table import FileScanTask

from streamforge.contract_model import Contract
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.content_hash import ContentHash, content_schema, row_hashes
from streamforge.offsets import OffsetRange, without

SOURCE_COLUMNS = ("source_epoch", "source_partition", "source_offset", "source_index")
RAW_COLUMNS = ("raw_epoch", "raw_partition", "raw_offset", "raw_index")

_RANGE = re.compile(r"(\d+):(\d+)-(\d+)")
_INDEX_BITS = 31
_OFFSET_MAX = 2**63 - 1

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lineage:
    """How a table's rows point at the records that they were made of.

    Args:
        contract: of the table.
        source: of the topic that the rows are made from; the table's own where it is fed directly.
    """

    contract: Contract
    source: Contract

    @property
    def is_direct(self) -> bool:
        """Return whether the table is fed from the source topic itself, without a processor between."""
        return self.contract.id == self.source.id

    @property
    def columns(self) -> tuple[str, str, str, str]:
        """Return the columns that hold epoch, partition, offset and index of the source record."""
        return SOURCE_COLUMNS if self.is_direct else RAW_COLUMNS

    @property
    def compared(self) -> pa.Schema:
        """Return the columns by which two rows are the same row: content and identity, not who wrote it."""
        content = content_schema(self.contract)
        identity = [f for f in self.contract.arrow_schema if f.name in self.columns[1:] and f.name not in content.names]
        return pa.schema([*content, *identity])

    def row_filter(self, epoch: int, ranges: Sequence[OffsetRange]) -> BooleanExpression:
        """Return the filter that keeps every row of `ranges`."""
        epoch_column, partition_column, offset_column, _ = self.columns
        parts: list[BooleanExpression] = [
            And(
                compare_with(EqualTo, partition_column, each.partition),
                compare_with(GreaterThanOrEqual, offset_column, each.start),
                compare_with(LessThan, offset_column, each.end),
            )
            for each in ranges
        ]
        # All at once gives a tree that is as flat as can be; one after the other it is too deep for many ranges.
        within: BooleanExpression = Or(*parts) if len(parts) > 1 else parts[0]
        return And(compare_with(EqualTo, epoch_column, epoch), within)

    def before_epoch(self, epoch: int) -> BooleanExpression:
        """Return the filter that keeps every row made from an earlier source topic."""
        return compare_with(LessThan, self.columns[0], epoch)

    def within(self, rows: pa.Table, epoch: int, ranges: Iterable[OffsetRange]) -> npt.NDArray[np.bool_]:
        """Return which of `rows` came from `ranges`; a row without identity came from none of them.

        Shapes:
            result: `(rows.num_rows,)` bool
        """
        epochs, partitions, offsets, _ = (numbers_of(rows, name) for name in self.columns)
        found = np.zeros(rows.num_rows, dtype=np.bool_)
        for each in ranges:
            found |= (partitions == each.partition) & (offsets >= each.start) & (offsets < each.end)
        found &= epochs == epoch
        return found


class RowIndex:
    """The rows of the ranges as they are now: by identity, their typed position and hash.

    It is the part of a plan that grows with the rows: about 60 bytes for each.
    """

    def __init__(self, lineage: Lineage, parts: Sequence[pa.Table], hashes: Sequence[npt.NDArray[np.uint64]]) -> None:
        """Index rows with the columns of `keys_of`, and their hashes, part by part."""
        empty = lineage.contract.arrow_schema.empty_table().select(index_columns(lineage))
        rows = pa.concat_tables([empty, *parts]).combine_chunks()
        _, *key_columns = lineage.columns
        partitions, offsets, indexes = (numbers_of(rows, name) for name in key_columns)
        order = np.lexsort((indexes, offsets, partitions))
        self._partitions, self._offsets, self._indexes = partitions[order], offsets[order], indexes[order]
        self._positions = rows.select(SOURCE_COLUMNS).take(_indices(order))
        joined = np.concatenate([np.zeros((2, 0), dtype=np.uint64), *hashes], axis=1)
        self._hashes = joined[:, order]

    def __len__(self) -> int:
        return len(self._offsets)

    def find(self, lineage: Lineage, rows: pa.Table) -> Numbers:
        """Return where each of `rows` (of one topic-partition) stands in the index, -1 where it does not.

        Shapes:
            result: `(rows.num_rows,)` int64
        """
        if not rows.num_rows or not len(self):
            return np.full(rows.num_rows, -1, dtype=np.int64)
        _, *key_columns = lineage.columns
        partitions, offsets, indexes = (numbers_of(rows, name) for name in key_columns)
        first = int(np.searchsorted(self._partitions, partitions[0], side="left"))
        last = int(np.searchsorted(self._partitions, partitions[0], side="right"))
        base = int(offsets.min())
        low = first + int(np.searchsorted(self._offsets[first:last], base, side="left"))
        high = first + int(np.searchsorted(self._offsets[first:last], offsets.max(), side="right"))
        if low == high:
            return np.full(rows.num_rows, -1, dtype=np.int64)
        known = ((self._offsets[low:high] - base) << _INDEX_BITS) | self._indexes[low:high]
        wanted = ((offsets - base) << _INDEX_BITS) | indexes
        place = np.minimum(np.searchsorted(known, wanted, side="left"), len(known) - 1)
        return np.where(known[place] == wanted, place + low, -1)

    def same(self, places: Numbers, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which rows, found at `places`, have the hash that stands there."""
        if not len(self):
            return np.zeros(len(places), dtype=np.bool_)
        same: npt.NDArray[np.bool_] = (self._hashes[:, places] == hashes).all(axis=0)
        same &= places >= 0
        return same

    def typed_positions(self, places: Numbers) -> pa.Table:
        """Return the typed positions (`source_*`) that stand at `places`, null where nothing was found."""
        return self._positions.take(_indices(places))


@dataclass(frozen=True, slots=True)
class TouchedFile:
    """A data file with rows of the ranges: it is replaced, and its other rows are written again as they are."""

    task: FileScanTask
    rows_in_ranges: int


@dataclass(frozen=True, slots=True)
class Counts:
    """How the rows that are there compare with those that the re-run makes.

    Args:
        now: rows of the ranges in the table.
        after: rows that the re-run makes.
        equal: rows that are there and stay what they are.
        changed: rows that are there and become different.
    """

    now: int = 0
    after: int = 0
    equal: int = 0
    changed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def added(self) -> int:
        """Return the rows that are not there yet."""
        return self.after - self.equal - self.changed

    @property
    def gone(self) -> int:
        """Return the rows that are there and will not be, doubles included."""
        return self.now - self.equal - self.changed


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replay would do, on the table snapshot that it was planned on.

    Args:
        table: name with namespace.
        ranges: source ranges, sorted and disjoint.
        epoch: number of the source topic's id in the table.
        snapshot_id: main table snapshot that the plan is made on.
        replay_epoch: number of replays that the table has seen.
        touched: data files that would be replaced.
        kept_rows: rows of those files that came from elsewhere and stay what they are.
        counts: the comparison.
        hash_now: content hash of the ranges' rows in the table.
        hash_after: content hash of what the re-run makes.
        dropped: records and events that gave no row, by reason (dead letters, duplicates).
        index: the ranges' rows by identity.
        added: what the state keeps of the rows that are not there yet; None where the re-run has no state.
        from_table: parts of `ranges` that Kafka no longer has: their records came from the raw table.
    """

    table: str
    ranges: tuple[OffsetRange, ...]
    epoch: int
    snapshot_id: int | None
    replay_epoch: int
    touched: tuple[TouchedFile, ...]
    kept_rows: int
    counts: Counts
    hash_now: ContentHash
    hash_after: ContentHash
    dropped: Mapping[str, int]
    index: RowIndex = field(repr=False, compare=False)
    added: pa.Table | None = field(default=None, repr=False, compare=False)
    from_table: tuple[OffsetRange, ...] = ()

    @property
    def warning(self) -> str | None:
        """Return what the live processor does not know of such a replay, for people; None: there is nothing."""
        if self.added is None or not (self.counts.added or self.counts.gone):
            return None
        return (
            f"the live parser does not know the {self.counts.added:,} ids that a replay adds here, nor that it removes "
            f"{self.counts.gone:,} rows: an added trade that the venue repeats later lands twice (`streamforge verify` "
            "shows it as unexpected). To mend that, replay the same topic-partitions again up to the log's end"
        )

    @property
    def changes(self) -> bool:
        """Return whether a replay would change anything."""
        return self.hash_now != self.hash_after

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for a JSON report."""
        return {
            "table": self.table,
            "source_ranges": ranges_as_dict(self.ranges),
            "sources": {
                "table": ranges_as_dict(self.from_table),
                "kafka": ranges_as_dict(without(self.ranges, self.from_table)),
            },
            "source_epoch": self.epoch,
            "snapshot_id": self.snapshot_id,
            "changes": self.changes,
            "rows_now": self.counts.now,
            "rows_after": self.counts.after,
            "rows_equal": self.counts.equal,
            "rows_changed": self.counts.changed,
            "rows_added": self.counts.added,
            "rows_gone": self.counts.gone,
            "files_touched": len(self.touched),
            "rows_kept_in_files": self.kept_rows,
            "dropped": dict(self.dropped),
            "hash_now": str(self.hash_now),
            "hash_after": str(self.hash_after),
            "warning": self.warning,
        }


class Comparison:
    """Compares re-made rows with those of the index, as they come."""

    def __init__(self, lineage: Lineage, index: RowIndex, history_columns: Sequence[str] = ()) -> None:
        self._lineage = lineage
        self._index = index
        self._history_columns = list(history_columns)
        self._added: list[pa.Table] = []
        self._compared = lineage.compared
        self._equal = self._changed = self._after = 0
        self.hash_after = ContentHash()
        self.dropped: Counter[str] = Counter()

    def add(self, rows: pa.Table, dropped: Mapping[str, int]) -> None:
        """Take in finished rows of one topic-partition, and what gave none."""
        self.dropped.update(dropped)
        if not rows.num_rows:
            return
        hashes = row_hashes(rows, self._compared)
        places = self._index.find(self._lineage, rows)
        same = int(self._index.same(places, hashes).sum())
        self._after += rows.num_rows
        self._equal += same
        self._changed += int((places >= 0).sum()) - same
        self.hash_after += ContentHash.of_rows(hashes)
        if self._history_columns:
            self._added.append(rows.filter(pa.array(places < 0)).select(self._history_columns))

    def added(self) -> pa.Table | None:
        """Return the history columns of the rows that are not there yet; None where there is no history."""
        if not self._history_columns:
            return None
        empty = self._lineage.contract.arrow_schema.empty_table().select(self._history_columns)
        return pa.concat_tables([empty, *self._added])

    def counts(self) -> Counts:
        """Return the counts of everything taken in."""
        return Counts(len(self._index), self._after, self._equal, self._changed)


def parse_offsets(texts: Iterable[str], topic: str) -> list[OffsetRange]:
    """Read ranges written as `PARTITION:START-END`, half-open.

    Raises:
        ConfigurationError: a text is not such a range, or it is empty or backwards.
    """
    ranges = []
    for text in texts:
        match = _RANGE.fullmatch(text.strip())
        if match is None:
            msg = f"offsets must look like PARTITION:START-END, for instance 0:1000-2000 (END excluded), found {text!r}"
            raise ConfigurationError(msg)
        partition, start, end = map(int, match.groups())
        if start >= end:
            msg = f"offsets {text!r} hold nothing: the range is half-open and needs START < END"
            raise ConfigurationError(msg)
        ranges.append(OffsetRange(topic, partition, start, end))
    return ranges


def merged_ranges(ranges: Iterable[OffsetRange]) -> tuple[OffsetRange, ...]:
    """Return the same offsets as sorted ranges that neither overlap nor touch nor are empty."""
    merged: list[OffsetRange] = []
    for each in sorted(ranges):
        if not len(each):
            continue
        if merged and merged[-1].topic_partition == each.topic_partition and each.start <= merged[-1].end:
            last = merged.pop()
            merged.append(OffsetRange(last.topic, last.partition, last.start, max(last.end, each.end)))
        else:
            merged.append(each)
    return tuple(merged)


def gaps_between(ranges: Sequence[OffsetRange]) -> list[OffsetRange]:
    """Return, for each topic-partition of `ranges` (merged ones), every offset that lies in none of them."""
    gaps = []
    for item, group in groupby(ranges, attrgetter("topic_partition")):
        start = 0
        for each in group:
            gaps.append(OffsetRange(item.topic, item.partition, start, each.start))
            start = each.end
        gaps.append(OffsetRange(item.topic, item.partition, start, _OFFSET_MAX))
    return [each for each in gaps if len(each)]


def ranges_as_dict(ranges: Iterable[OffsetRange]) -> dict[str, list[list[int]]]:
    """Return ranges as `{topic-partition: [[start, end], ...]}`."""
    found: dict[str, list[list[int]]] = {}
    for each in ranges:
        found.setdefault(str(each.topic_partition), []).append([each.start, each.end])
    return found


def index_columns(lineage: Lineage) -> list[str]:
    """Return the columns that a row index is made of."""
    return list(dict.fromkeys([*lineage.columns[1:], *SOURCE_COLUMNS]))


def _indices(places: Numbers) -> Any:
    """Return places to take rows from; a negative one takes nulls."""
    return pa.array(places, mask=places < 0)


def compare_with(comparison: Any, column: str, value: int | str) -> BooleanExpression:
    """Make a comparison; the types of PyIceberg's constructors do not say what they take."""
    expression: BooleanExpression = comparison(column, value)
    return expression


def numbers_of(rows: pa.Table, name: str) -> Numbers:
    """Return a whole-number column, -1 where it is null."""
    column: Any = rows[name].cast(pa.int64())
    numbers: Numbers = column.fill_null(-1).to_numpy()
    return numbers
