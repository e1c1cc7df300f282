"""Two sets of rows compared by identity, in bounded memory.

Each side is a `Spill`: rows go into buckets of one topic-partition and `WINDOW` offsets, as a key (place in the
bucket) and a hash of the row's values, 16 bytes a row. What does not fit the buffer lies in files of a temporary
folder. Buckets are then compared one at a time, so memory is one bucket and the buffer, whatever the table's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WINDOW = 1 << 20
"""Offsets in one bucket."""

BUFFER_ROWS = 4_000_000
EXAMPLES = 5
_INDEX_BITS = 31
_ROW = np.dtype([("key", "<i8"), ("hash", "<u8")])

Numbers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]


class Bucket(NamedTuple):
    """One topic-partition number and the number of its window of offsets."""

    partition: int
    window: int

    def place(self, key: int) -> str:
        """Return the identity behind a key as partition:offset:index."""
        offset = self.window * WINDOW + (key >> _INDEX_BITS)
        return f"{self.partition}:{offset}:{key & ((1 << _INDEX_BITS) - 1)}"


class Spill:
    """Rows by bucket; not thread-safe.

    Args:
        folder: an empty folder of ours for what does not fit.
        buffer_rows: rows that are held in memory.
    """

    def __init__(self, folder: Path, *, buffer_rows: int = BUFFER_ROWS) -> None:
        self._folder = folder
        self._buffer_rows = buffer_rows
        self._held: dict[Bucket, list[Rows]] = {}
        self._held_rows = 0
        self._files: set[Bucket] = set()
        self.rows = 0

    def add(self, partitions: Numbers, offsets: Numbers, indexes: Numbers, hashes: Hashes) -> None:
        """Add rows: one place in each array a row."""
        if not len(offsets):
            return
        rows = np.empty(len(offsets), _ROW)
        rows["key"] = ((offsets % WINDOW) << _INDEX_BITS) | indexes
        rows["hash"] = hashes
        windows = offsets // WINDOW
        order = np.lexsort((windows, partitions))
        ends = np.flatnonzero((np.diff(partitions[order]) != 0) | (np.diff(windows[order]) != 0)) + 1
        for part in np.split(order, ends):
            bucket = Bucket(int(partitions[part[0]]), int(windows[part[0]]))
            self._held.setdefault(bucket, []).append(rows[part])
        self.rows += len(rows)
        self._held_rows += len(rows)
        if self._held_rows > self._buffer_rows:
            self._flush()

    def buckets(self) -> set[Bucket]:
        """Return the buckets that have rows."""
        return self._files | set(self._held)

    def take(self, bucket: Bucket) -> Rows:
        """Return the rows of one bucket, in no order."""
        parts = self._held.get(bucket, [])
        if bucket in self._files:
            parts = [np.fromfile(self._path(bucket), _ROW), *parts]
        return np.concatenate(parts) if parts else np.empty(0, _ROW)

    def _flush(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for bucket, parts in self._held.items():
            with self._path(bucket).open("ab") as file:
                np.concatenate(parts).tofile(file)
            self._files.add(bucket)
        self._held, self._held_rows = {}, 0

    def _path(self, bucket: Bucket) -> Path:
        return self._folder / f"{bucket.partition}-{bucket.window}"


@dataclass(slots=True)
class Tally:
    """What a comparison of identities found.

    Args:
        records: rows that should be there.
        rows: rows that were compared.
        lost: records without a row.
        doubled: rows above the first of one record.
        different: records whose row says something else.
        unexpected: rows (first of each identity) without a record.
        examples: the first few places of each kind, as partition:offset:index.
    """

    records: int = 0
    rows: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    unexpected: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Return whether nothing is wrong."""
        return not (self.lost or self.doubled or self.different or self.unexpected)

    def note(self, kind: str, count: int, places: Iterator[str]) -> None:
        """Count `count` findings of a kind and keep the first few places."""
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            kept = self.examples.setdefault(kind, [])
            kept += [place for place, _ in zip(places, range(EXAMPLES - len(kept)), strict=False)]


def compare_bucket(tally: Tally, bucket: Bucket, expected: Rows, actual: Rows) -> None:
    """Add one bucket's findings to `tally`."""
    wanted, first = np.unique(expected["key"], return_index=True)
    found, counts = np.unique(actual["key"], return_counts=True)
    tally.records += len(wanted)
    tally.rows += len(actual)
    _note(tally, "lost", bucket, np.setdiff1d(wanted, found, assume_unique=True))
    _note(tally, "unexpected", bucket, np.setdiff1d(found, wanted, assume_unique=True))
    again = found[counts > 1]
    tally.note("doubled", int((counts - 1).sum()), map(bucket.place, again.tolist()))
    place = np.searchsorted(wanted, actual["key"])
    known = place < len(wanted)
    known[known] = wanted[place[known]] == actual["key"][known]
    other = known.copy()
    other[known] = expected["hash"][first[place[known]]] != actual["hash"][known]
    _note(tally, "different", bucket, np.unique(actual["key"][other]))


def within(rows: Rows, bucket: Bucket, start: int, end: int) -> Rows:
    """Return the rows whose offset lies in `[start, end)`."""
    offsets = bucket.window * WINDOW + (rows["key"] >> _INDEX_BITS)
    return rows[(offsets >= start) & (offsets < end)]


def doubled_in(tally: Tally, bucket: Bucket, rows: Rows) -> None:
    """Add what can be told of rows whose records are gone: those that are there twice."""
    found, counts = np.unique(rows["key"], return_counts=True)
    tally.note("doubled", int((counts - 1).sum()), map(bucket.place, found[counts > 1].tolist()))


def lost_in(tally: Tally, bucket: Bucket, expected: Rows, actual: Rows) -> None:
    """Add the records of one bucket that have no row, and nothing else."""
    _note(tally, "lost", bucket, np.setdiff1d(expected["key"], actual["key"]))


def _note(tally: Tally, kind: str, bucket: Bucket, keys: Numbers) -> None:
    tally.note(kind, len(keys), map(bucket.place, keys.tolist()))
