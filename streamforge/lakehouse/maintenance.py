"""Bounded snapshots: summaries go to the table `commits`, then the oldest snapshots expire.

A commit costs about 1 ms of CPU for each snapshot that the table retains, so the writer expires them as it
goes. Tagged snapshots and heads of branches are never expired, also where the tag is set meanwhile: see
`streamforge.lakehouse.tags`. Nothing is deleted here: files that no snapshot needs any more are orphans, removed
by age.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import suppress

import pyarrow as pa
import stamina
from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.table.update import (
    AssertRefSnapshotId,
    AssertTableUUID,
    RemoveSnapshotRefUpdate,
    RemoveSnapshotsUpdate,
    TableRequirement,
    TableUpdate,
)

from streamforge.contract_model import Contract
from streamforge.errors import CommitConflictError, CommitUnknownError
from streamforge.lakehouse import commit
from streamforge.lakehouse.replay_target import storage_errors
from streamforge.lakehouse.tags import guard_of, idle_guards
from streamforge.times import from_ns

_LEDGER_KIND = "commits"
_COPIED_KEY = "streamforge.copied."
_COPY_ATTEMPTS = 5
_EXPIRE_ATTEMPTS = 5


class Maintenance:
    """Keeps tables at a bounded number of snapshots.

    Args:
        ledger: the table `commits`.
        contract: its contract.
        retained: snapshots that stay, beside tagged ones and heads of branches.
    """

    def __init__(self, ledger: Table, contract: Contract, *, retained: int) -> None:
        self._ledger = ledger
        self._contract = contract
        self._retained = retained

    def expire(self, table: Table) -> Table:
        """Expire the oldest snapshots of `table` beyond the bound, their summaries copied first.

        Expiry that meets another commit is given up until the next time: nothing depends on it.

        Returns:
            The table with the metadata after it.

        Raises:
            CommitError: the summaries could not be copied; nothing was expired.
        """
        try:
            return self._expire_once(table)
        except (CommitConflictError, CommitUnknownError):
            return commit.refresh(table)

    def expire_or_fail(self, table: Table) -> Table:
        """Expire as `expire` does, for whoever has no next time soon: tried again where it meets another commit.

        Returns:
            The table with the metadata after it.

        Raises:
            CommitConflictError: others were always faster; their table snapshots are all still there.
            CommitUnknownError: the answer to the last attempt was lost.
            CommitError: the summaries could not be copied; nothing was expired.
        """
        tried = 0
        try:
            for attempt in stamina.retry_context(
                on=(CommitConflictError, CommitUnknownError),
                attempts=_EXPIRE_ATTEMPTS,
                timeout=None,
                wait_initial=0.05,
                wait_max=1.0,
                wait_jitter=0.2,
            ):
                with attempt:
                    tried = attempt.num
                    table = self._expire_once(table if tried == 1 else commit.refresh(table))
        except (CommitConflictError, CommitUnknownError) as error:
            msg = (
                f"table {commit.table_name(table)}: {len(table.metadata.snapshots)} table snapshots, more than the "
                f"{self._retained} to keep, and expiry met another commit in each of {tried} attempts, the last: "
                f"{error}. Run it again when fewer programs write to the table"
            )
            raise type(error)(msg) from error
        return table

    def _expire_once(self, table: Table) -> Table:
        by_age = sorted(table.metadata.snapshots, key=lambda item: item.sequence_number or 0)
        old = by_age[: -self._retained]
        if old and table.metadata.table_uuid != self._ledger.metadata.table_uuid:
            self._copy(table, old)  # the ledger's own summaries say nothing of sources
        table = commit.refresh(table)  # copying took a while; tags may have come and gone
        expirable, guards = _unnamed(table, old), idle_guards(table)
        if not expirable and not guards:
            return table
        updates: list[TableUpdate] = [RemoveSnapshotRefUpdate(ref_name=name) for name in guards]
        if expirable:
            updates.append(RemoveSnapshotsUpdate(snapshot_ids=expirable))
        return commit.send_once(table, tuple(updates), _refs_as_read(table, expirable))

    def _copy(self, table: Table, snapshots: Sequence[Snapshot]) -> None:
        """Append the summaries that the ledger does not have yet, each once.

        The ledger's property for the table, set in the same commit, says up to which sequence number it has
        them; it is compared in every attempt, so that two maintainers do not copy one snapshot twice. Tagged
        snapshots are copied too, because the number passes them.
        """
        key = f"{_COPIED_KEY}{table.metadata.table_uuid}"
        newest = max(item.sequence_number or 0 for item in snapshots)
        for _ in range(_COPY_ATTEMPTS):
            self._ledger = commit.refresh(self._ledger)
            copied = int(self._ledger.metadata.properties.get(key, 0))
            missing = [item for item in snapshots if (item.sequence_number or 0) > copied]
            if not missing:
                return

            def decide(view: commit.TableView, copied: int = copied) -> dict[str, str]:
                found = int(view.table.metadata.properties.get(key, 0))
                if found != copied:
                    msg = f"summaries were copied up to sequence number {found} meanwhile, expected {copied}"
                    raise commit.PositionsMovedError(msg)
                return {key: str(newest)}

            with storage_errors(self._ledger, "written"):
                files = commit.write_data_files(self._ledger, self._rows(table, missing))
            summary = {commit.KIND_KEY: _LEDGER_KIND, commit.COMMIT_ID_KEY: uuid.uuid4().hex}
            with suppress(commit.PositionsMovedError):
                self._ledger = commit.commit_snapshot(self._ledger, decide=decide, added=files, summary=summary).table
                return
        msg = f"table {commit.table_name(self._ledger)}: other maintainers were always faster"
        raise CommitConflictError(msg)

    def _rows(self, table: Table, snapshots: Sequence[Snapshot]) -> pa.Table:
        rows = []
        for item in snapshots:
            summary = dict(item.summary.additional_properties) if item.summary else {}
            rows.append(
                {
                    "table_name": commit.table_name(table),
                    "snapshot_id": item.snapshot_id,
                    "commit_id": summary.get(commit.COMMIT_ID_KEY, ""),
                    "operation": str(item.summary.operation.value) if item.summary else "",
                    "ts_committed": from_ns(item.timestamp_ms * 1_000_000),
                    "added_rows": int(summary.get("added-records", 0)),
                    "source_ranges": summary.get(commit.RANGES_KEY, "{}"),
                    "summary": json.dumps(summary, sort_keys=True),
                }
            )
        return pa.Table.from_pylist(rows, schema=self._contract.arrow_schema)


def _unnamed(table: Table, old: Sequence[Snapshot]) -> list[int]:
    """Return the ids of those of `old` that are still there and that no ref names."""
    named = {ref.snapshot_id for ref in table.metadata.refs.values()}
    there = {item.snapshot_id for item in table.metadata.snapshots}
    return [item.snapshot_id for item in old if item.snapshot_id in there - named]


def _refs_as_read(table: Table, expirable: Sequence[int]) -> tuple[TableRequirement, ...]:
    """Require the refs that are there to be as they are, and no snapshot that goes to have been tagged meanwhile."""
    expected = dict.fromkeys([MAIN_BRANCH, *map(guard_of, expirable)])
    found = {name: ref.snapshot_id for name, ref in table.metadata.refs.items()}
    return (
        AssertTableUUID(uuid=table.metadata.table_uuid),
        *(AssertRefSnapshotId(ref=name, snapshot_id=wanted) for name, wanted in (expected | found).items()),
    )
