"""The raw table as the second source of a replay: what Kafka's retention has dropped is read from here.

A raw table holds the bytes of each record with its identity, so a record read from it parses as the one from Kafka
did. It is only asked for offsets below the log start, and only where it has all of them: the ledger of gaps knows none
of it in the range, its position has passed the range, and no row that would be replaced came from a record that it
lacks. Reads are in offset order, `WINDOW_OFFSETS` at a time, so memory is one window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
from pyiceberg.table import Table

from streamforge.contract_model import Contract, FieldSource
from streamforge.errors import ConfigurationError, RetentionGapError
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import load_table
from streamforge.lakehouse.kafka_reader import read_range
from streamforge.lakehouse.pipeline_gaps import gaps_of_table, read_ledger
from streamforge.lakehouse.protocol import SourceIdentity
from streamforge.lakehouse.replay_plan import SOURCE_COLUMNS, Lineage, numbers_of
from streamforge.lakehouse.replay_target import Target, files_with, read_file
from streamforge.log_reader import KeptRecord, log_starts
from streamforge.offsets import OffsetRange, below

if TYPE_CHECKING:
    from confluent_kafka import Message

WINDOW_OFFSETS = 50_000
_BATCH_RECORDS = 5_000
READ_TIMEOUT_S = 60.0


def parts_from_table(target: Target, ranges: Sequence[OffsetRange]) -> tuple[OffsetRange, ...]:
    """Return the parts of `ranges` (merged ones) that lie below the log start and come from the raw table.

    A topic-partition that the topic does not have gives none; `Target.checked` refuses it.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    if not has_raw_table(target.lineage):
        return ()
    known = {each.topic_partition for each in ranges if each.partition < target.source.partitions}
    return below(ranges, log_starts(target.settings, known))


def read_source(target: Target, wanted: OffsetRange) -> Iterator[Sequence[Message]]:
    """Yield the source records of a range in offset order: from the raw table below the log start, then from Kafka.

    Raises:
        SourceError: a part can be read from neither.
        CommitError: the raw table cannot be read.
    """
    for part in parts_from_table(target, [wanted]):
        raw = RawTable.of(target, part)
        raw.check_holds([part])  # Kafka may have removed more since the plan was checked
        yield from raw.read(part)
        wanted = OffsetRange(wanted.topic, wanted.partition, part.end, wanted.end)
    yield from read_range(target.settings, wanted, timeout_s=READ_TIMEOUT_S)


def has_raw_table(lineage: Lineage) -> bool:
    """Return whether a table keeps the source's records as they were; a table is no source of itself."""
    if lineage.is_direct or lineage.source.table is None:
        return False
    return any(item.source is FieldSource.PAYLOAD for item in lineage.source.fields)


@dataclass(frozen=True, slots=True)
class RawTable:
    """The table of a raw topic.

    Args:
        target: of the replay that reads it.
        contract: of topic and table.
        table: as it is now.
        epoch: number of the topic's id in it.
    """

    target: Target
    contract: Contract
    table: Table
    epoch: int

    @classmethod
    def of(cls, target: Target, needed: OffsetRange) -> RawTable:
        """Load the raw table of a target's source.

        Args:
            target: of the replay.
            needed: what Kafka no longer has, for messages.

        Raises:
            RetentionGapError: there is none, or it does not know the topic.
            HistoryRolledBackError: a person moved it back.
        """
        contract, source = target.lineage.source, target.source
        gone = f"{needed}: Kafka has removed these offsets by retention"
        try:
            table = load_table(target.catalog, target.settings, contract)
        except ConfigurationError as error:
            msg = f"{gone}, and there is no other source: {error}"
            raise RetentionGapError(msg) from error
        view = commit.view_of(table)
        commit.check_not_rolled_back(view)
        wanted = SourceIdentity(source.topic, source.topic_id, source.cluster_id)
        epochs = [epoch for epoch, found in view.state.sources.items() if found == wanted]
        if not epochs:
            msg = (
                f"{gone}, and table {commit.table_name(table)} has nothing of topic id {source.topic_id}. Ask for a "
                "range that starts at the log start or later"
            )
            raise RetentionGapError(msg)
        return cls(target, contract, table, max(epochs))

    def check_holds(self, parts: Sequence[OffsetRange]) -> None:
        """Check that the table has every record of `parts`, which Kafka no longer has.

        Raises:
            RetentionGapError: it does not; names the range and what is missing.
            CommitError: it cannot be read.
        """
        landed = commit.view_of(self.table).state.next_offsets(self.epoch)
        for part in parts:
            next_offset = landed.get(part.partition, 0)
            if next_offset < part.end:
                raise self._lacks(part, f"has landed {part.topic_partition} up to offset {next_offset} only")
            self._check_no_gap(part)
            self._check_rows_have_records(part)

    def read(self, part: OffsetRange) -> Iterator[Sequence[Message]]:
        """Yield the records of a range in offset order, in lists of a few thousand, as a consumer would give them.

        Raises:
            CommitError: the table cannot be read.
        """
        keys = [item.name for item in self.contract.fields if item.source is FieldSource.KEY]
        headers = [item.name for item in self.contract.fields if item.source is FieldSource.HEADER]
        payloads = [item.name for item in self.contract.fields if item.source is FieldSource.PAYLOAD]
        columns = [*SOURCE_COLUMNS[1:3], *keys, *headers, *payloads]
        for start in range(part.start, part.end, WINDOW_OFFSETS):
            window = OffsetRange(part.topic, part.partition, start, min(start + WINDOW_OFFSETS, part.end))
            rows = self._rows(window, columns).sort_by(SOURCE_COLUMNS[2])
            for batch in rows.to_batches(max_chunksize=_BATCH_RECORDS):
                records = [
                    KeptRecord(
                        part.partition,
                        row[SOURCE_COLUMNS[2]],
                        row[keys[0]].encode() if keys and row[keys[0]] is not None else None,
                        row[payloads[0]],
                        [(name, None if row[name] is None else str(row[name]).encode()) for name in headers],
                    )
                    for row in batch.to_pylist()
                ]
                if records:
                    yield cast("list[Message]", records)

    def _check_no_gap(self, part: OffsetRange) -> None:
        ledger = self.target.ledger
        rows = read_ledger(self.target.settings, ledger) if ledger is not None else []
        for gap in gaps_of_table(rows, self.target.settings, self.contract):
            is_here = (gap.topic_id, gap.source_partition) == (self.target.source.topic_id, part.partition)
            if is_here and gap.start_offset < part.end and part.start < gap.end_offset:
                lacks = f"never had offsets [{gap.start_offset},{gap.end_offset}) of it (table pipeline_gaps)"
                raise self._lacks(part, lacks)

    def _check_rows_have_records(self, part: OffsetRange) -> None:
        """Refuse a part in which rows would go for want of the record that they were made of."""
        target = self.target
        table = target.load()
        row_filter = target.lineage.row_filter(target.epoch_in(commit.view_of(table).state), [part])
        column = target.lineage.columns[2]
        tasks = files_with(table, row_filter)
        made_of = [numbers_of(read_file(table, task, [column], row_filter), column) for task in tasks]
        held = numbers_of(self._rows(part, SOURCE_COLUMNS[2:3]), SOURCE_COLUMNS[2])
        missing = np.setdiff1d(np.concatenate([np.empty(0, np.int64), *made_of]), held)
        if len(missing):
            lacks = (
                f"lacks {len(missing)} records that rows of {commit.table_name(table)} were made of, the first at "
                f"offset {missing[0]}; a replay would take these rows away"
            )
            raise self._lacks(part, lacks)

    def _rows(self, part: OffsetRange, columns: Sequence[str]) -> pa.Table:
        own = Lineage(self.contract, self.contract)
        row_filter = own.row_filter(self.epoch, [part])
        schema = pa.schema([self.contract.arrow_schema.field(name) for name in columns])
        parts = [
            read_file(self.table, task, columns, row_filter).select(columns).cast(schema)
            for task in files_with(self.table, row_filter)
        ]
        return pa.concat_tables([schema.empty_table(), *parts])

    def _lacks(self, part: OffsetRange, what: str) -> RetentionGapError:
        return RetentionGapError(
            f"{part}: Kafka has removed these offsets by retention, and table {commit.table_name(self.table)} {what}. "
            f"Ask for a range without them; rows that came from them stay as they are"
        )
