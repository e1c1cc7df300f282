"""A replay's two passes in Spark: the same functions, one task for each topic-partition.

A task gets the records of its topic-partition in offset order, rebuilds the state that the rows outside the
ranges give, and runs `make_plan` or `write_remade` as the process itself would. What it returns are parts that
add up: counts, content hashes, data files. Barrier, comparison and commit stay with `streamforge.lakehouse.replay`.

The memory of a replay (60 bytes a row of the ranges) is that of the largest topic-partition in each task.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
from pyiceberg.catalog.noop import NoopCatalog
from pyiceberg.io import FileIO
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata

from streamforge.errors import ConfigurationError, ProcessError, StreamForgeError
from streamforge.kafka import TopicIdentity
from streamforge.lakehouse.content_hash import ContentHash
from streamforge.lakehouse.remake import MakeRemake
from streamforge.lakehouse.replay_parts import merged_plan
from streamforge.lakehouse.replay_plan import Lineage, Plan, RowIndex
from streamforge.lakehouse.replay_run import (
    IN_PROCESS,
    DataFiles,
    Engine,
    check_repeated,
    index_rows,
    make_plan,
    write_kept,
    write_remade,
)
from streamforge.lakehouse.replay_target import Progress, Target, silent
from streamforge.offsets import OffsetRange, total_records
from streamforge.settings import Settings
from streamforge.spark.kafka_source import RecordStream, records_of
from streamforge.spark.session import failure_text, spark_failures, spark_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SPARK_FROM_RECORDS = 5_000_000
"""So many offsets make a replay large: below, starting Spark and its workers costs more than it saves."""

_RESULT = "result"
T = TypeVar("T")


class EngineChoice(StrEnum):
    """Where a replay runs."""

    AUTO = "auto"
    LOCAL = "local"
    SPARK = "spark"


def choose_engine(
    choice: EngineChoice, settings: Settings, ranges: Sequence[OffsetRange], *, from_table: Sequence[OffsetRange] = ()
) -> Engine:
    """Return the engine for a replay of `ranges`; of its own accord Spark only for many records, where installed.

    Spark reads Kafka alone: what comes `from_table` is re-run in this process.

    Raises:
        ConfigurationError: Spark was chosen and a part comes from the raw table.
        StreamForgeError: Spark was chosen and does not start.
    """
    if from_table and choice is EngineChoice.SPARK:
        msg = (
            f"{from_table[0]} is no longer in Kafka and comes from the raw table, which --engine spark does not read. "
            "Replay with --engine local, or ask for a range that starts at the log start"
        )
        raise ConfigurationError(msg)
    is_large = total_records(ranges) >= SPARK_FROM_RECORDS and not from_table and find_spec("pyspark") is not None
    if choice is EngineChoice.SPARK or (choice is EngineChoice.AUTO and is_large):
        return SparkEngine(spark_session(settings))
    return IN_PROCESS


class SparkEngine:
    """Both passes in Spark."""

    name = EngineChoice.SPARK.value

    def __init__(self, session: SparkSession) -> None:
        self._session = session

    def plan(self, target: Target, table: Table, ranges: Sequence[OffsetRange], progress: Progress) -> Plan:
        """Compare as `make_plan` does, topic-partition by topic-partition.

        Raises:
            StreamForgeError: as for `make_plan`.
            ProcessError: Spark failed.
        """
        total = total_records(ranges)
        progress("plan", 0, total)
        parts: list[Plan] = self._run(target, ranges, partial(_plan_part, _Work.of(target, table), tuple(ranges)))
        seen = {each.partition for part in parts for each in part.ranges}
        # A task without a record (all aborted, or only markers) cannot say which topic-partition it has.
        silent_ranges = [each for each in ranges if each.partition not in seen]
        if silent_ranges:
            parts.append(make_plan(target, table, silent_ranges, silent))
        progress("plan", total, total)
        return merged_plan(target.lineage, parts)

    def write(self, target: Target, table: Table, plan: Plan, commit_id: str, progress: Progress) -> list[DataFile]:
        """Write as `write_files` does; the rows that stay of replaced files are written here.

        Raises:
            DataQualityError: the re-run did not make the rows that the plan saw.
            StreamForgeError: as for `write_files`.
            ProcessError: Spark failed.
        """
        total = total_records(plan.ranges)
        progress("write", 0, total)
        shipped = replace(plan, touched=(), added=None)
        work = _Work.of(target, table)
        parts: list[_Written] = self._run(target, plan.ranges, partial(_write_part, work, shipped, commit_id))
        check_repeated(plan, sum((part.made for part in parts), ContentHash()))
        kept = DataFiles(target, table)
        write_kept(kept, plan)
        progress("write", total, total)
        return [*kept.closed(), *(each for part in parts for each in part.files)]

    def _run(self, target: Target, ranges: Sequence[OffsetRange], step: Callable[[RecordStream], T | None]) -> list[T]:
        records = records_of(self._session, target.settings, ranges)
        try:
            rows = records.mapInArrow(partial(_pickled, step), f"{_RESULT} binary").collect()
        except spark_failures() as error:
            msg = (
                f"Spark could not re-run {target.lineage.contract.id} from {target.source.topic}: "
                f"{failure_text(error)}. Nothing was changed; --engine local needs no Spark"
            )
            raise ProcessError(msg) from error
        results: list[T] = [pickle.loads(row[_RESULT]) for row in rows]  # noqa: S301  # our own workers wrote it
        for result in results:
            if isinstance(result, StreamForgeError):
                raise result
        return results


@dataclass(frozen=True, slots=True)
class _Work:
    """A target and a table without what cannot travel: connections of the catalog, decoders."""

    settings: Settings
    lineage: Lineage
    source: TopicIdentity
    make: MakeRemake
    identifier: tuple[str, ...]
    metadata: TableMetadata
    metadata_location: str
    io: FileIO

    @classmethod
    def of(cls, target: Target, table: Table) -> _Work:
        return cls(
            target.settings,
            target.lineage,
            target.source,
            target.make,
            table.name(),
            table.metadata,
            table.metadata_location,
            table.io,
        )

    def unpacked(self) -> tuple[Target, Table]:
        """Return target and table in a task; the catalog is not there: a task commits nothing."""
        catalog = NoopCatalog(self.settings.catalog_name)
        remake = self.make(self.lineage, self.source.topic_id)
        target = Target(self.settings, catalog, self.lineage, self.source, remake, self.make)
        return target, Table(self.identifier, self.metadata, self.metadata_location, self.io, catalog)


@dataclass(frozen=True, slots=True)
class _Written:
    files: list[DataFile] = field(default_factory=list)
    made: ContentHash = field(default_factory=ContentHash)


def _plan_part(work: _Work, ranges: Sequence[OffsetRange], stream: RecordStream) -> Plan | None:
    here = _ranges_of(stream, ranges)
    if not here:
        return None
    target, table = work.unpacked()
    return replace(make_plan(target, table, here, silent, stream.read), index=RowIndex(target.lineage, [], []))


def _write_part(work: _Work, plan: Plan, commit_id: str, stream: RecordStream) -> _Written | None:
    here = _ranges_of(stream, plan.ranges)
    if not here:
        return None
    target, table = work.unpacked()
    own = replace(plan, ranges=here)
    own = replace(own, index=index_rows(target, table, own))
    files = DataFiles(target, table)
    made = write_remade(files, own, commit_id, silent, stream.read)
    return _Written(files.closed(), made)


def _ranges_of(stream: RecordStream, ranges: Iterable[OffsetRange]) -> tuple[OffsetRange, ...]:
    partition = stream.partition()
    return tuple(each for each in ranges if each.partition == partition)


def _pickled(step: Callable[[RecordStream], Any], batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Run `step` in a task; an error of ours travels as a value, so that the caller gets it as it is."""
    try:
        result = step(RecordStream(batches))
    except StreamForgeError as error:
        result = error
    if result is not None:
        yield pa.RecordBatch.from_pydict({_RESULT: pa.array([pickle.dumps(result)], pa.binary())})
