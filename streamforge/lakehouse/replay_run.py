"""The two passes of a replay over its rows: compare them to plan, write them to commit.

Both read what is there file by file and re-run the source list by list; neither commits anything. An engine says
where they run: `IN_PROCESS` here, `streamforge.spark.replay` in Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol

import pyarrow as pa
from confluent_kafka import Message
from pyiceberg.expressions import AlwaysTrue, BooleanExpression, Or
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from streamforge.errors import DataQualityError
from streamforge.lakehouse import commit
from streamforge.lakehouse.content_hash import ContentHash, row_hashes
from streamforge.lakehouse.protocol import FIRST_EPOCH, PREFIX
from streamforge.lakehouse.raw_table import parts_from_table, read_source
from streamforge.lakehouse.remake import Remade
from streamforge.lakehouse.replay_plan import (
    SOURCE_COLUMNS,
    Comparison,
    Plan,
    RowIndex,
    TouchedFile,
    gaps_between,
    index_columns,
)
from streamforge.lakehouse.replay_target import (
    Progress,
    Target,
    files_with,
    read_file,
    storage_errors,
)
from streamforge.lakehouse.rows import finish_rows
from streamforge.offsets import OffsetRange, total_records

REPLAY_EPOCH_KEY = f"{PREFIX}replay-epoch"
"""Table property that counts the replays that landed; every replay compares and raises it."""

FILE_ROWS = 500_000
FILE_BYTES = 128 * 1024 * 1024

ReadRange = Callable[[OffsetRange], Iterator[Sequence[Message]]]
"""Gives the committed records of a range in offset order, in lists."""


class Engine(Protocol):
    """Where the passes run."""

    @property
    def name(self) -> str:
        """Return the name by which people choose it."""

    def plan(self, target: Target, table: Table, ranges: Sequence[OffsetRange], progress: Progress) -> Plan:
        """Compare the rows of `ranges` with those that the re-run makes."""

    def write(self, target: Target, table: Table, plan: Plan, commit_id: str, progress: Progress) -> list[DataFile]:
        """Write what `plan` would add; nothing is committed."""


class InProcess:
    """Both passes in this process, one topic-partition after the other."""

    name = "local"

    def plan(self, target: Target, table: Table, ranges: Sequence[OffsetRange], progress: Progress) -> Plan:
        """Compare as `make_plan` does."""
        return make_plan(target, table, ranges, progress)

    def write(self, target: Target, table: Table, plan: Plan, commit_id: str, progress: Progress) -> list[DataFile]:
        """Write as `write_files` does."""
        return write_files(target, table, plan, commit_id, progress)


IN_PROCESS = InProcess()


def make_plan(
    target: Target,
    table: Table,
    ranges: Sequence[OffsetRange],
    progress: Progress,
    read: ReadRange | None = None,
) -> Plan:
    """Compare the rows of `ranges` in the table's main table snapshot with those that the re-run makes.

    Where `read` is not given the records come from Kafka and, below its log start, from the raw table.

    Raises:
        TopicIdentityError: the source topic is not the one that the table knows.
        SourceError: the source cannot be read.
        CommitError: the table cannot be read.
    """
    epoch = target.epoch_in(commit.view_of(table).state)
    touched, kept_rows, index, hash_now = _rows_now(target, table, epoch, ranges)
    comparison = Comparison(target.lineage, index, target.remake.history_columns)
    for remade in _rerun(target, table, epoch, ranges, partial(progress, "plan"), read=read):
        comparison.add(_finished(target, remade, index, epoch, commit_id=""), remade.dropped)
    return Plan(
        table=commit.table_name(table),
        ranges=tuple(ranges),
        epoch=epoch,
        snapshot_id=table.metadata.current_snapshot_id,
        replay_epoch=replay_epoch(table),
        touched=touched,
        kept_rows=kept_rows,
        counts=comparison.counts(),
        hash_now=hash_now,
        hash_after=comparison.hash_after,
        dropped=dict(comparison.dropped),
        index=index,
        added=comparison.added(),
        from_table=() if read else parts_from_table(target, ranges),
    )


def write_files(target: Target, table: Table, plan: Plan, commit_id: str, progress: Progress) -> list[DataFile]:
    """Write the re-made rows, and the rows that stay of the files that are replaced; nothing is committed.

    Raises:
        DataQualityError: the re-run did not make the rows that the plan saw.
        SourceError: the source cannot be read.
        CommitError: the table's files cannot be read or written.
    """
    files = DataFiles(target, table)
    write_kept(files, plan)
    check_repeated(plan, write_remade(files, plan, commit_id, progress))
    return files.closed()


def write_kept(files: DataFiles, plan: Plan) -> None:
    """Write the rows that stay of the files that are replaced.

    Raises:
        CommitError: the table's files cannot be read or written.
    """
    lineage = files.target.lineage
    for each in plan.touched:
        if each.rows_in_ranges == each.task.file.record_count:
            continue
        rows = read_file(files.table, each.task, lineage.contract.arrow_schema.names, AlwaysTrue())
        files.add(rows.filter(pa.array(~lineage.within(rows, plan.epoch, plan.ranges))))


def write_remade(
    files: DataFiles, plan: Plan, commit_id: str, progress: Progress, read: ReadRange | None = None
) -> ContentHash:
    """Write the rows that the re-run makes of the plan's ranges and return their content hash.

    Raises:
        SourceError: the source cannot be read.
        CommitError: the table's files cannot be read or written.
    """
    target, made = files.target, ContentHash()
    for remade in _rerun(target, files.table, plan.epoch, plan.ranges, partial(progress, "write"), read=read):
        rows = _finished(target, remade, plan.index, plan.epoch, commit_id=commit_id)
        made += ContentHash.of_rows(row_hashes(rows, target.lineage.compared))
        files.add(rows)
    return made


def check_repeated(plan: Plan, made: ContentHash) -> None:
    """Compare what was written with what the plan saw.

    Raises:
        DataQualityError: they differ.
    """
    if made != plan.hash_after:
        msg = (
            f"the re-run of {plan.table} is not repeatable: the plan saw {plan.hash_after}, now it made {made}. "
            "Nothing was changed; a parser must be a pure function of its records"
        )
        raise DataQualityError(msg)


def index_rows(target: Target, table: Table, plan: Plan) -> RowIndex:
    """Return the index of the rows of the plan's ranges, for a pass that does not share the plan's memory.

    Raises:
        CommitError: the table cannot be read.
    """
    return _rows_now(target, table, plan.epoch, plan.ranges)[2]


def replay_epoch(table: Table) -> int:
    """Return how many replays have landed in the table."""
    return int(table.metadata.properties.get(REPLAY_EPOCH_KEY, 0))


class DataFiles:
    """Gathers rows and writes them as data files of a bounded size, each in source order."""

    def __init__(self, target: Target, table: Table) -> None:
        self.target = target
        self.table = table
        self._schema = target.lineage.contract.arrow_schema
        self._order: Any = [(name, "ascending") for name in target.lineage.columns]
        self._gathered: list[pa.Table] = []
        self._rows = self._bytes = 0
        self._files: list[DataFile] = []

    def add(self, rows: pa.Table) -> None:
        """Take in rows."""
        if not rows.num_rows:
            return
        self._gathered.append(rows.cast(self._schema))
        self._rows += rows.num_rows
        self._bytes += rows.nbytes
        if self._rows >= FILE_ROWS or self._bytes >= FILE_BYTES:
            self._write()

    def closed(self) -> list[DataFile]:
        """Write what is left and return all files."""
        self._write()
        return self._files

    def _write(self) -> None:
        if self._gathered:
            rows = pa.concat_tables(self._gathered).sort_by(self._order)
            with storage_errors(self.table, "written"):
                self._files += commit.write_data_files(self.table, rows)
        self._gathered, self._rows, self._bytes = [], 0, 0


def _rows_now(
    target: Target, table: Table, epoch: int, ranges: Sequence[OffsetRange]
) -> tuple[tuple[TouchedFile, ...], int, RowIndex, ContentHash]:
    """Read the rows of `ranges`: the files that hold them, rows of others in those, their index and hash."""
    lineage = target.lineage
    columns = list(dict.fromkeys([*lineage.columns, *SOURCE_COLUMNS, *lineage.compared.names]))
    touched, parts, hashes = [], [], []
    kept_rows, hash_now = 0, ContentHash()
    wanted = index_columns(lineage)
    schema = pa.schema([lineage.contract.arrow_schema.field(name) for name in wanted])
    for task in files_with(table, lineage.row_filter(epoch, ranges)):
        rows = read_file(table, task, columns, AlwaysTrue())
        found = rows.filter(pa.array(lineage.within(rows, epoch, ranges)))
        if not found.num_rows:
            continue
        touched.append(TouchedFile(task, found.num_rows))
        kept_rows += rows.num_rows - found.num_rows
        parts.append(found.select(wanted).cast(schema))
        hashes.append(row_hashes(found, lineage.compared))
        hash_now += ContentHash.of_rows(hashes[-1])
    return tuple(touched), kept_rows, RowIndex(lineage, parts, hashes), hash_now


def _rerun(
    target: Target,
    table: Table,
    epoch: int,
    ranges: Sequence[OffsetRange],
    progress: Callable[[int, int], None],
    *,
    read: ReadRange | None,
) -> Iterator[Remade]:
    """Re-run `ranges` in order, from the state that the rows outside them give."""
    remake = target.remake
    read = read or partial(read_source, target)
    outside = _state_outside(target, table, epoch, ranges)
    done, total = 0, total_records(ranges)
    progress(done, total)
    for _, group in groupby(ranges, attrgetter("topic_partition")):
        state = outside
        for each in group:
            for messages in read(each):
                state, remade = remake.remake(state, messages)
                yield remade
                progress(done + (messages[-1].offset() or 0) + 1 - each.start, total)
            done += len(each)
            progress(done, total)


def _state_outside(target: Target, table: Table, epoch: int, ranges: Sequence[OffsetRange]) -> Any:
    """Return the state that the rows outside `ranges` give: those of their topic-partitions and of earlier topics.

    Rows behind a range count too: a trade that the venue sent twice may have landed from the second record,
    when the first could not be parsed. One state serves all topic-partitions: what it keeps belongs to an
    instrument, and an instrument to one topic-partition.
    """
    remake, lineage = target.remake, target.lineage
    state = remake.initial()
    if not remake.history_columns:
        return state
    row_filter: BooleanExpression = lineage.row_filter(epoch, gaps_between(ranges))
    if epoch > FIRST_EPOCH:
        row_filter = Or(row_filter, lineage.before_epoch(epoch))
    for task in files_with(table, row_filter):
        state = remake.remember(state, read_file(table, task, remake.history_columns, row_filter))
    return state


def _finished(target: Target, remade: Remade, index: RowIndex, epoch: int, *, commit_id: str) -> pa.Table:
    """Return re-made rows with every column: the typed position of the row that was there, null without one."""
    lineage, rows = target.lineage, remade.rows
    if not rows.num_rows:
        return lineage.contract.arrow_schema.empty_table()
    if not lineage.is_direct:
        positions = index.typed_positions(index.find(lineage, rows))
        for name in SOURCE_COLUMNS:
            rows = rows.append_column(name, positions[name])
    return finish_rows(
        lineage.contract, rows, commit_id=commit_id, source_epoch=epoch, raw_epochs={target.source.topic_id: epoch}
    )
