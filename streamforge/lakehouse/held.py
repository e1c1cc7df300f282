"""What `main` of a table holds of each topic-partition: by the commits it descends from, and by its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot

from streamforge.lakehouse import commit
from streamforge.lakehouse.protocol import SourcePartition
from streamforge.lakehouse.replay_plan import SOURCE_COLUMNS
from streamforge.lakehouse.replay_target import storage_errors

_COLUMNS = SOURCE_COLUMNS[:3]
FIRST_SEQUENCE_NUMBER = 1
_GROUPED = (*_COLUMNS[:2], f"{_COLUMNS[2]}_max")


def ends_of_commits(view: commit.TableView) -> dict[SourcePartition, int]:
    """Return the end of the last source range that a retained commit behind `main` brought."""
    by_id = {item.snapshot_id: item for item in view.table.metadata.snapshots}
    ends: dict[SourcePartition, int] = {}
    snapshot_id = view.history.main_snapshot_id
    while snapshot_id is not None and snapshot_id in by_id:
        for source, _, end in _ranges(by_id[snapshot_id]):
            ends.setdefault(source, end)
        snapshot_id = by_id[snapshot_id].parent_snapshot_id
    return ends


def starts_of_commits(view: commit.TableView) -> dict[SourcePartition, int]:
    """Return the start of the first source range that any commit brought, behind `main` or not.

    A commit tells it only where every snapshot before it is retained: expiry takes the first commits first, and the
    start of a later one lies behind rows that are missing.
    """
    starts: dict[SourcePartition, int] = {}
    for snapshot in view.table.metadata.snapshots:
        if _goes_back_to_the_first(view, snapshot):
            for source, start, _ in _ranges(snapshot):
                starts[source] = min(start, starts.get(source, start))
    return starts


def ends_of_rows(table: Table) -> tuple[dict[SourcePartition, int], int]:
    """Return the greatest source offset + 1 of the rows in `main`, and how many rows have none.

    Raises:
        CommitError: the rows cannot be read.
    """
    ends: dict[SourcePartition, int] = {}
    without_source = 0
    with storage_errors(table, "read"):
        for batch in table.scan(selected_fields=_COLUMNS).to_arrow_batch_reader():
            rows = pa.Table.from_batches([batch])
            placed = rows.drop_null()
            without_source += rows.num_rows - placed.num_rows
            greatest: Any = placed.group_by(list(_COLUMNS[:2])).aggregate([(_COLUMNS[2], "max")])
            for epoch, partition, offset in zip(*(greatest[name].to_pylist() for name in _GROUPED), strict=True):
                source = SourcePartition(epoch, partition)
                ends[source] = max(offset + 1, ends.get(source, 0))
    return ends, without_source


def _goes_back_to_the_first(view: commit.TableView, snapshot: Snapshot) -> bool:
    """Return whether nothing before `snapshot` has expired; some catalogs then drop its parent's id, others keep it."""
    by_id = {item.snapshot_id: item for item in view.table.metadata.snapshots}
    first: Snapshot | None = snapshot
    while first is not None and first.parent_snapshot_id is not None:
        first = by_id.get(first.parent_snapshot_id)
    return first is not None and first.sequence_number == FIRST_SEQUENCE_NUMBER


def _ranges(snapshot: Snapshot) -> Iterator[tuple[SourcePartition, int, int]]:
    summary = snapshot.summary.additional_properties if snapshot.summary else {}
    for epoch, ranges in json.loads(summary.get(commit.RANGES_KEY, "{}")).items():
        for partition, (start, end) in ranges.items():
            yield SourcePartition(int(epoch), int(partition)), start, end
