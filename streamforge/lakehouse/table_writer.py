"""One table's side of the writer: what is buffered for it, what of it is ours, and its commits.

No Kafka client here: records come in, `next_offset`s come out. Between two calls either a topic-partition's
buffer begins at the table's `next_offset` and ends at the consumer's position, or it is empty.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from confluent_kafka import Message
from pyiceberg.table import Table

from streamforge import faults
from streamforge.contract_model import Contract
from streamforge.errors import CommitError
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import CATALOG_ERRORS
from streamforge.lakehouse.freshness import time_summary
from streamforge.lakehouse.protocol import FIRST_EPOCH, Batch, Move, SourceIdentity, raw_epochs
from streamforge.lakehouse.rows import Refused, RowDecoder, finish_rows, raw_topic_ids

STEPS = ("claim_staged", "claim_sent", "data_written", "commit_staged", "commit_sent")
"""Kill points of claim and commit, in order, each after the prefix `writer.`."""


@dataclass(slots=True)
class _Held:
    """One topic-partition of ours: durable from `start`, taken in up to `end`, rows in between."""

    owner_epoch: int
    start: int
    end: int
    rows: list[pa.Table] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Landed:
    """What one commit brought."""

    rows: pa.Table
    positions: Mapping[int, int]
    committed: commit.Committed


class TableWriter:
    """Buffers, claims and commits of one table.

    Args:
        contract: of topic and table.
        table: the live table.
        owner: our owner string.
        deadline_s: seconds after which a commit is given up.
    """

    def __init__(self, contract: Contract, table: Table, *, owner: str, deadline_s: float) -> None:
        self.contract = contract
        self.table = table
        self.rows = 0
        self.bytes = 0
        self._owner = owner
        self._deadline_s = deadline_s
        self._decoder = RowDecoder(contract)
        self._identity: SourceIdentity | None = None
        self._epoch = 0
        self._held: dict[int, _Held] = {}

    @property
    def moved(self) -> bool:
        """Return whether there is anything to commit, if only positions."""
        return any(held.end > held.start for held in self._held.values())

    @property
    def positions(self) -> Mapping[int, int]:
        """Return the durable `next_offset` by topic-partition number."""
        return {partition: held.start for partition, held in self._held.items()}

    def look(self, topic: str) -> Mapping[int, int]:
        """Load the table, which a claim then goes by, and return the `next_offset`s that it knows of `topic`."""
        self.table = commit.refresh(self.table)
        state = commit.view_of(self.table).state
        return state.next_offsets(state.epoch_of(topic) or 0)

    def epoch_of(self, topic: str) -> int:
        """Return the source epoch of a topic, or the one that its first claim begins, by the table as last loaded."""
        state = commit.view_of(self.table).state
        return state.epoch_of(topic) or max(state.sources, default=FIRST_EPOCH - 1) + 1

    def claim(self, identity: SourceIdentity, log_starts: Mapping[int, int]) -> Mapping[int, int]:
        """Make topic-partitions ours and return `next_offset` of each; see `commit.claim`."""
        self.table, claim = commit.claim(
            self.table,
            owner=self._owner,
            identity=identity,
            log_starts=log_starts,
            deadline_s=self._deadline_s,
            steps="writer.claim",
        )
        self._identity, self._epoch = identity, claim.epoch
        for partition, next_offset in claim.next_offsets.items():
            self._held[partition] = _Held(claim.owner_epochs[partition], next_offset, next_offset)
        return claim.next_offsets

    def skip_to(self, partition: int, offset: int) -> None:
        """Let the next commit move a topic-partition to `offset` without rows."""
        self._held[partition].end = offset

    def release(self, partitions: Iterable[int]) -> None:
        """Forget topic-partitions and what is buffered of them."""
        for partition in partitions:
            self._held.pop(partition, None)
        self._recount()

    def take(self, messages: Sequence[Message], positions: Mapping[int, int]) -> Sequence[Refused]:
        """Take in records and the positions after them; return those that cannot be decoded."""
        decoded = self._decoder.decode(messages)
        for partition, table in decoded.rows.items():
            self._held[partition].rows.append(table)
            self.rows += table.num_rows
            self.bytes += table.nbytes
        for partition, position in positions.items():
            self._held[partition].end = position
        return decoded.refused

    def check_live(self, live: SourceIdentity | None) -> None:
        """Check that what was taken in came from the topic that was claimed: `live` was read after the last fetch.

        Raises:
            TopicIdentityError: the topic was made anew since; nothing of what is buffered can be told apart.
        """
        if self._identity is not None:
            commit.check_live_identity(self.table, self._identity, live)

    def commit(self) -> Landed | None:
        """Commit all that was taken in, rows and positions together; None where nothing moved.

        Raises:
            PositionsMovedError: the table is elsewhere; `forget` and seek.
            CommitError: see `commit.commit_batch`; what is buffered stays.
        """
        moves = {
            partition: Move(held.start, held.end, held.owner_epoch)
            for partition, held in self._held.items()
            if held.end > held.start
        }
        if not moves or self._identity is None:
            return None
        commit_id = uuid.uuid4().hex
        rows, epochs = self._finished(moves, commit_id)
        try:
            files = commit.write_data_files(self.table, rows)
        except CATALOG_ERRORS as error:
            msg = (
                f"table {commit.table_name(self.table)}: {rows.num_rows} rows could not be written as data files: "
                f"{error}. Nothing is lost: free space or mend the storage, a restart reads them again from Kafka"
            )
            raise CommitError(msg) from error
        faults.step("writer.data_written")
        committed = commit.commit_batch(
            self.table,
            Batch(self._owner, self._identity, self._epoch, moves, epochs),
            added=files,
            summary=self._summary(moves, commit_id, rows),
            deadline_s=self._deadline_s,
            steps="writer.commit",
        )
        self.table = committed.table
        for partition, move in moves.items():
            self._held[partition] = _Held(move.owner_epoch, move.end, move.end)
        self._recount()
        return Landed(rows, {partition: move.end for partition, move in moves.items()}, committed)

    def forget(self) -> Mapping[int, int]:
        """Drop everything buffered and return the table's `next_offset`s, to seek to."""
        self.table = commit.refresh(self.table)
        found = commit.view_of(self.table).state.next_offsets(self._epoch)
        for partition, held in self._held.items():
            next_offset = found.get(partition, held.start)
            self._held[partition] = _Held(held.owner_epoch, next_offset, next_offset)
        self._recount()
        return self.positions

    def _finished(self, moves: Mapping[int, Move], commit_id: str) -> tuple[pa.Table, Mapping[str, int]]:
        """Return the rows in source order, and the raw epochs that they carry."""
        parts = [table for partition in sorted(moves) for table in self._held[partition].rows]
        if not parts:
            return self.contract.arrow_schema.empty_table(), {}
        rows = pa.concat_tables(parts)
        epochs = raw_epochs(commit.view_of(self.table).state, raw_topic_ids(rows))
        finished = finish_rows(self.contract, rows, commit_id=commit_id, source_epoch=self._epoch, raw_epochs=epochs)
        return finished, epochs

    def _summary(self, moves: Mapping[int, Move], commit_id: str, rows: pa.Table) -> dict[str, str]:
        ranges = {str(partition): [move.start, move.end] for partition, move in sorted(moves.items())}
        return {
            commit.KIND_KEY: "write",
            commit.COMMIT_ID_KEY: commit_id,
            commit.OWNER_KEY: self._owner,
            commit.RANGES_KEY: json.dumps({str(self._epoch): ranges}, separators=(",", ":")),
            **time_summary(rows),
        }

    def _recount(self) -> None:
        self.rows = sum(table.num_rows for held in self._held.values() for table in held.rows)
        self.bytes = sum(table.nbytes for held in self._held.values() for table in held.rows)
