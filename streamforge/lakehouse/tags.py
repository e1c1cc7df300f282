"""Tags: names for table snapshots that must outlive expiry, set beside a live writer.

A tag changes neither `main` nor the properties of a table, so a writer's comparison holds before and after it:
its next attempt meets a changed metadata file, compares again and lands. Setting a tag is idempotent, so an
unknown outcome is looked up and tried again.

Iceberg removes the tags of a snapshot together with the snapshot, and a commit cannot require that a snapshot has
no tag, only that a ref of a known name is absent. So each tag is set together with a guard, a tag whose name follows
from the snapshot's id, and expiry requires that no snapshot it takes has one. It also clears away guards that guard
nothing. A tag that another program sets has no guard: expiry keeps it if it is there when expiry reads the table.
"""

from __future__ import annotations

import stamina
from pyiceberg.table import Table
from pyiceberg.table.refs import SnapshotRefType
from pyiceberg.table.update import (
    AssertRefSnapshotId,
    AssertTableUUID,
    RemoveSnapshotRefUpdate,
    SetSnapshotRefUpdate,
    TableUpdate,
)

from streamforge.errors import CommitConflictError, CommitError, CommitUnknownError
from streamforge.lakehouse import commit

_ATTEMPTS = 20
_DEADLINE_S = 60.0
_GUARD = "streamforge-kept-"
_retried = stamina.retry(on=(CommitConflictError, CommitUnknownError), attempts=_ATTEMPTS, timeout=_DEADLINE_S)


def guard_of(snapshot_id: int) -> str:
    """Return the name of the tag that stands beside every tag of a table snapshot."""
    return f"{_GUARD}{snapshot_id}"


def idle_guards(table: Table) -> tuple[str, ...]:
    """Return the guards of table snapshots that nothing else names any more."""
    refs = table.metadata.refs
    named = {ref.snapshot_id for name, ref in refs.items() if not name.startswith(_GUARD)}
    return tuple(name for name, ref in refs.items() if name.startswith(_GUARD) and ref.snapshot_id not in named)


@_retried
def set_tag(table: Table, name: str, snapshot_id: int, *, max_age_ms: int | None = None) -> Table:
    """Name a table snapshot; nothing happens where it already has the name.

    Args:
        table: may be stale.
        name: of the tag.
        snapshot_id: what it names.
        max_age_ms: Spark's expiry may drop the tag when it is older; ours keeps it until it is removed.

    Raises:
        CommitError: the snapshot has expired, or the name is another snapshot's.
    """
    table = commit.refresh(table)
    found = table.metadata.refs.get(name)
    if found is not None and found.snapshot_id == snapshot_id:
        return table
    where = f"table {commit.table_name(table)}, tag {name}"
    if found is not None:
        msg = f"{where}: names table snapshot {found.snapshot_id}, expected {snapshot_id}. Choose another name"
        raise CommitError(msg)
    if table.snapshot_by_id(snapshot_id) is None:
        msg = f"{where}: table snapshot {snapshot_id} is gone, it has expired. Read the table again"
        raise CommitError(msg)
    updates = tuple(
        SetSnapshotRefUpdate(
            ref_name=each, type=SnapshotRefType.TAG, snapshot_id=snapshot_id, max_ref_age_ms=max_age_ms
        )
        for each in (name, guard_of(snapshot_id))
    )
    return _send(table, updates, name, None)


@_retried
def remove_tag(table: Table, name: str) -> Table:
    """Take a name away; nothing happens where there is none.

    If that was the last one, the next expiry takes the guard and the one after it the snapshot.

    Raises:
        CommitError: the table is gone or the catalog does not answer.
    """
    table = commit.refresh(table)
    found = table.metadata.refs.get(name)
    if found is None:
        return table
    return _send(table, (RemoveSnapshotRefUpdate(ref_name=name),), name, found.snapshot_id)


def _send(table: Table, updates: tuple[TableUpdate, ...], name: str, expected: int | None) -> Table:
    asserted = (
        AssertTableUUID(uuid=table.metadata.table_uuid),
        AssertRefSnapshotId(ref=name, snapshot_id=expected),
    )
    return commit.send_once(table, updates, asserted)
