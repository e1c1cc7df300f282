"""Which hours of event time the replays of a table changed: what derived tables have to follow, and nothing more.

A replay replaces whole data files, with rows that it leaves as they are. So the rows of the files that went are
compared with those of the files that came, hour by hour and by content hash; an hour is named where they differ. Where
those are more rows than a look can read, the hours that the files span are named instead: what is built again and is
equal changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.manifest import ManifestEntry, ManifestEntryStatus
from pyiceberg.table import FileScanTask, Table
from pyiceberg.table.snapshots import Snapshot, ancestors_of

from streamforge.contracts import Contract
from streamforge.lakehouse.column_bounds import lower_bound, upper_bound
from streamforge.lakehouse.commit import KIND_KEY
from streamforge.lakehouse.content_hash import content_schema, row_hashes
from streamforge.lakehouse.replay import KIND as REPLAY
from streamforge.lakehouse.replay_target import read_file, storage_errors

HOUR_NS = 3_600_000_000_000
MOST_ROWS_COMPARED = 2_000_000
"""About ten seconds of reading; Dagster gives a sensor's look sixty."""

_Sums = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class ChangedHours:
    """What replays did to a table since somebody looked.

    Args:
        hours_ns: starts of the hours that say something else now, sorted.
        replays: table snapshots of replays that were compared.
        sequence_number: of the newest table snapshot that was looked at; look from here next time.
        is_complete: False where table snapshots in between have expired, so that a replay may have been missed.
    """

    hours_ns: tuple[int, ...]
    replays: tuple[int, ...]
    sequence_number: int
    is_complete: bool


def changed_hours(table: Table, contract: Contract, *, time_column: str, after: int) -> ChangedHours:
    """Return the hours that replays changed in the table snapshots after sequence number `after`.

    Args:
        table: loaded.
        contract: of the table.
        time_column: event time of a row, nanoseconds since 1970.
        after: sequence number of the last table snapshot that was looked at.

    Raises:
        CommitError: metadata or a data file cannot be read.
    """
    snapshots, is_complete = _ancestors(table, after)
    replays = [each for each in snapshots if each.summary is not None and each.summary.get(KIND_KEY) == REPLAY]
    found: set[int] = set()
    for snapshot in replays:
        found |= _hours_of(table, contract, time_column, snapshot)
    return ChangedHours(
        hours_ns=tuple(sorted(found)),
        replays=tuple(each.snapshot_id for each in reversed(replays)),
        sequence_number=newest_sequence_number(table),
        is_complete=is_complete,
    )


def newest_sequence_number(table: Table) -> int:
    """Return the sequence number of the newest table snapshot of `main`, 0 where there is none."""
    snapshot = table.metadata.current_snapshot()
    return 0 if snapshot is None else snapshot.sequence_number or 0


def _ancestors(table: Table, after: int) -> tuple[list[Snapshot], bool]:
    """Return the table snapshots of `main` after a sequence number, newest first, and whether none is missing."""
    ancestors = ancestors_of(table.metadata.current_snapshot(), table.metadata)
    found = list(takewhile(lambda each: (each.sequence_number or 0) > after, ancestors))
    # Expiry may have forgotten who the parent was, too: then only the numbers tell whether one is missing.
    parent = found[-1].parent_snapshot_id if found else None
    has_parent = parent is not None and table.metadata.snapshot_by_id(parent) is not None
    return found, not found or has_parent or found[-1].sequence_number == after + 1


def _hours_of(table: Table, contract: Contract, time_column: str, snapshot: Snapshot) -> set[int]:
    """Return the hours whose rows differ between the files that one table snapshot took away and those it brought."""
    entries = list(_entries(table, snapshot))
    if sum(entry.data_file.record_count for entry in entries) > MOST_ROWS_COMPARED:
        return {hour for entry in entries for hour in _span(table, entry, time_column)}
    schema = content_schema(contract)
    columns = list(dict.fromkeys([time_column, *schema.names]))
    balance: dict[int, _Sums] = defaultdict(lambda: np.zeros(3, dtype=np.uint64))
    for entry in entries:
        rows = read_file(table, FileScanTask(entry.data_file), columns, AlwaysTrue())
        hours = rows[time_column].to_numpy() // HOUR_NS
        hashes = np.concatenate([row_hashes(rows, schema), np.ones((1, rows.num_rows), dtype=np.uint64)])
        for hour in np.unique(hours):
            # Sums of hashes, modulo 2**64 as everything about them: what is on both sides cancels.
            total = hashes[:, hours == hour].sum(axis=1, dtype=np.uint64)
            if entry.status == ManifestEntryStatus.DELETED:
                balance[int(hour)] -= total
            else:
                balance[int(hour)] += total
    return {hour * HOUR_NS for hour, total in balance.items() if total.any()}


def _span(table: Table, entry: ManifestEntry, time_column: str) -> range:
    """Return the hours between the first and the last row of a file; none where the file does not tell them."""
    first = lower_bound(table, entry.data_file, time_column)
    last = upper_bound(table, entry.data_file, time_column)
    if first is None or last is None:
        return range(0)
    return range(first // HOUR_NS * HOUR_NS, last + 1, HOUR_NS)


def _entries(table: Table, snapshot: Snapshot) -> Iterator[ManifestEntry]:
    """Return what a table snapshot says of the files that it brought and took away."""
    with storage_errors(table, "looked up"):
        manifests = [each for each in snapshot.manifests(table.io) if each.added_snapshot_id == snapshot.snapshot_id]
        entries: list[Any] = [
            entry for each in manifests for entry in each.fetch_manifest_entry(table.io, discard_deleted=False)
        ]
    return (
        entry
        for entry in entries
        if entry.snapshot_id == snapshot.snapshot_id and entry.status != ManifestEntryStatus.EXISTING
    )
