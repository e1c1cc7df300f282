"""A table with a real SQLite catalog and a log of numbers that writers land in it: for tests of the protocol.

The log is the offsets 0, 1, 2, ... of each topic-partition. A schedule is exact when the table holds every
offset below its `next_offset` once, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import FileSelector
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from streamforge.contracts import load_contracts
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.protocol import Batch, Move, SourceIdentity
from streamforge.settings import Settings

IDENTITY = SourceIdentity("market-gaps", "topic-id", "cluster-id")
RECREATED = SourceIdentity(IDENTITY.topic, "another-topic-id", IDENTITY.cluster_id)
_CONTRACT = "market-gaps"


class NotExactError(AssertionError):
    """Offsets are lost or doubled."""


class Writer:
    """One owner of topic-partitions: it lands offsets from where its claim says."""

    def __init__(self, rig: Rig, owner: str) -> None:
        self.rig = rig
        self.owner = owner
        self.table = rig.fresh()
        self.claimed: commit.Claim | None = None
        self.ends: dict[int, int] = {}

    def claim(self, *partitions: int, identity: SourceIdentity = IDENTITY) -> Mapping[int, int]:
        """Claim topic-partitions (0 where none is named) and return where they go on."""
        self.table, self.claimed = commit.claim(
            self.table,
            owner=self.owner,
            identity=identity,
            log_starts=dict.fromkeys(partitions or (0,), 0),
            deadline_s=20,
        )
        self.ends = dict(self.claimed.next_offsets)
        return self.claimed.next_offsets

    def land(self, *ends: int, rows: bool = True) -> commit.Committed:
        """Land the offsets of partition 0, 1, ... up to `ends`; without `rows` only the positions move."""
        return self.land_up_to(dict(enumerate(ends)), rows=rows)

    def land_up_to(self, ends: Mapping[int, int], *, rows: bool = True) -> commit.Committed:
        """Land the offsets of the partitions named, up to their ends."""
        claimed = self.claimed
        assert claimed is not None
        moves = {p: Move(self.ends[p], end, claimed.owner_epochs[p]) for p, end in ends.items()}
        offsets = [(p, offset) for p, move in moves.items() for offset in range(move.start, move.end)]
        files = commit.write_data_files(self.table, self.rig.rows(offsets)) if rows else []
        batch = Batch(self.owner, claimed.identity, claimed.epoch, moves, {})
        ranges = {str(claimed.epoch): {str(p): [move.start, move.end] for p, move in moves.items()}}
        summary = {commit.RANGES_KEY: json.dumps(ranges)}
        committed = commit.commit_batch(self.table, batch, added=files, summary=summary, deadline_s=20)
        self.table = committed.table
        self.ends |= ends
        return committed

    def restart(self) -> Writer:
        """Return the same slot as a new process."""
        return Writer(self.rig, f"{self.owner}'")


class Rig:
    """The table and what others do to it."""

    def __init__(self, home: Path, **store: Any) -> None:
        self.settings = Settings(_env_file=None, home=home, **store)  # type: ignore[call-arg]
        self.contract = load_contracts(self.settings.contracts_dir)[_CONTRACT]
        self.catalog: Catalog = open_catalog(self.settings)
        ensure_table(self.catalog, self.settings, self.contract)
        self.not_refused: list[str] = []

    @contextmanager
    def refuses(self, kind: type[Exception], match: str = "") -> Iterator[None]:
        """Go on when the block is refused, as the code must do, and also when it is not, to see what comes of it."""
        try:
            yield
        except kind as error:
            if not re.search(match, str(error)):
                raise
        else:
            self.not_refused.append(kind.__name__)

    def fresh(self) -> Table:
        """Load the table as another process does."""
        return open_catalog(self.settings).load_table((self.settings.namespace, "market_gaps"))

    def writer(self, owner: str = "a") -> Writer:
        """Return a writer."""
        return Writer(self, owner)

    def maintenance(self, *, retained: int) -> Maintenance:
        """Return the real maintenance, with a ledger."""
        contract = load_contracts(self.settings.contracts_dir)["commits"]
        return Maintenance(ensure_table(self.catalog, self.settings, contract), contract, retained=retained)

    def rows(self, offsets: list[tuple[int, int]]) -> pa.Table:
        """Return one row for each (partition, offset)."""
        columns: dict[str, Any] = {}
        for field in self.contract.arrow_schema:
            if pa.types.is_timestamp(field.type):
                value: Any = datetime(2026, 1, 1, tzinfo=UTC)
            else:
                value = "x" if pa.types.is_large_string(field.type) or pa.types.is_string(field.type) else 1
            columns[field.name] = pa.array([value] * len(offsets), field.type)
        columns["source_partition"] = pa.array([partition for partition, _ in offsets], pa.int32())
        columns["source_offset"] = pa.array([offset for _, offset in offsets], pa.int64())
        return pa.table(columns, schema=self.contract.arrow_schema)

    def content(self) -> Counter[tuple[int, int]]:
        """Return how often each (partition, offset) is in the table; rows of others have none and are left out."""
        rows = self.fresh().scan(selected_fields=("source_partition", "source_offset")).to_arrow()
        pairs = zip(rows["source_partition"].to_pylist(), rows["source_offset"].to_pylist(), strict=True)
        return Counter((p, o) for p, o in pairs if o >= 0)

    def stored_data_files(self) -> list[str]:
        """Return every data file that lies in the store, whether the table needs it or not."""
        table = self.fresh()
        folder = table.io.new_input(f"{table.location()}/data")
        found = folder._filesystem.get_file_info(FileSelector(folder._path, recursive=True))
        return [each.path for each in found if each.is_file]

    def assert_exact(self, *ends: int) -> None:
        """Check that every offset below `ends` is there once, and that the positions say so."""
        wanted = Counter((p, offset) for p, end in enumerate(ends) for offset in range(end))
        found = self.content()
        if found != wanted:
            msg = f"lost: {sorted(wanted - found)}, doubled: {sorted(found - wanted)}"
            raise NotExactError(msg)
        state = commit.view_of(self.fresh()).state
        assert state.next_offsets(max(state.sources)) == dict(enumerate(ends))

    # What others do

    def foreign_append(self) -> None:
        """Append a row as any PyIceberg user."""
        self.fresh().append(self.rows([(0, -1)]))

    def foreign_compaction(self) -> None:
        """Make a snapshot with the same rows, as compaction does."""
        self.fresh().append(self.rows([]))

    def foreign_property(self) -> None:
        """Set a property that is not ours, alone."""
        with self.fresh().transaction() as transaction:
            transaction.set_properties({"comment": "hello"})

    def expire_all_but_last(self) -> None:
        """Expire every snapshot that is not the head of `main`."""
        table = self.fresh()
        old = [item.snapshot_id for item in table.snapshots() if item.snapshot_id != table.metadata.current_snapshot_id]
        table.maintenance.expire_snapshots().by_ids(old).commit()

    def roll_back(self, snapshot_id: int) -> None:
        """Move `main` back, as a person does."""
        self.fresh().manage_snapshots().rollback_to_snapshot(snapshot_id).commit()


def before_send(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> None:
    """Do `actions`, one before each of the next sends of anyone."""
    real, left = commit.send_once, list(actions)

    def send(*arguments: Any) -> Table:
        if left:
            left.pop(0)()
        return real(*arguments)

    monkeypatch.setattr(commit, "send_once", send)
