"""What a replay works on: the table, the topic that its rows are made from, and the re-run between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import BooleanExpression
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.table import FileScanTask, Table

from streamforge.contract_model import Contract, Contracts, TopicSettings
from streamforge.errors import CommitError, ConfigurationError, SchemaMismatchError, TopicIdentityError
from streamforge.kafka import TopicIdentity
from streamforge.lakehouse import commit
from streamforge.lakehouse.barrier import Barrier
from streamforge.lakehouse.catalog import CATALOG_ERRORS, load_table, open_catalog
from streamforge.lakehouse.kafka_reader import check_within_log, log_ranges, topic_identity
from streamforge.lakehouse.pipeline_gaps import LEDGER_ID
from streamforge.lakehouse.protocol import SourceIdentity, TableState, raw_epochs
from streamforge.lakehouse.remake import RECIPES, MakeRemake, Reland, Remake, lineage_of
from streamforge.lakehouse.replay_plan import Lineage, merged_ranges
from streamforge.offsets import OffsetRange, below, without
from streamforge.settings import Settings

Progress = Callable[[str, int, int], None]
"""Hears a stage (`barrier`, `plan`, `write`, `commit`), how much of it is done, and how much there is."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody how far a replay is."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a replay works on.

    Args:
        settings: which cluster and catalog.
        catalog: opened.
        lineage: how the table's rows point at the source's records.
        source: the source topic as it is now.
        remake: the re-run.
        make: makes the re-run anew, in another process.
        ledger: contract of the ledger of retention gaps; None in a task that checks nothing.
    """

    settings: Settings
    catalog: Catalog
    lineage: Lineage
    source: TopicIdentity
    remake: Remake[Any]
    make: MakeRemake
    ledger: Contract | None = field(default=None, kw_only=True)

    def load(self) -> Table:
        """Load the table as it is now and check its shape.

        Raises:
            ConfigurationError: it does not exist.
            SchemaMismatchError: it is not as the contract says, or has fields that this contract does not know.
        """
        table = load_table(self.catalog, self.settings, self.lineage.contract)
        unknown = sorted(set(table.schema().column_names) - set(self.lineage.contract.arrow_schema.names))
        if unknown:
            msg = (
                f"table {commit.table_name(table)} has fields that contract {self.lineage.contract.version} lacks: "
                f"{', '.join(unknown)}. Re-made rows would lose them: replay with the newer contract"
            )
            raise SchemaMismatchError(msg)
        return table

    def epoch_in(self, state: TableState) -> int:
        """Return the number of the source topic's id in the table; a raw topic not seen yet gets the next one.

        Raises:
            TopicIdentityError: the table is fed from the topic and knows it with another id, or not at all.
        """
        if not self.lineage.is_direct:
            return raw_epochs(state, [self.source.topic_id])[self.source.topic_id]
        found = SourceIdentity(self.source.topic, self.source.topic_id, self.source.cluster_id)
        epoch = state.epoch_of(found.topic)
        if epoch is None or state.sources[epoch] != found:
            stored = "no topic of this name" if epoch is None else f"topic id {state.sources[epoch].topic_id}"
            msg = (
                f"topic {found.topic} has topic id {found.topic_id} in cluster {found.cluster_id}; "
                f"table {self.lineage.contract.id} knows {stored}. Let the writer land it first "
                "(`streamforge run writer`), or start a new source epoch with `streamforge rebind`"
            )
            raise TopicIdentityError(msg)
        return epoch

    def barrier(self, ranges: Iterable[OffsetRange]) -> Barrier:
        """Return what has to be landed before `ranges` may be replayed."""
        contract = self.lineage.contract
        recipe = RECIPES.get(contract.id)
        topic = topic_settings(self.lineage.contract.topic).name

        def next_offsets() -> Mapping[int, int]:
            state = commit.view_of(self.load()).state
            epoch = state.epoch_of(topic)
            return {} if epoch is None else state.next_offsets(epoch)

        return Barrier(
            settings=self.settings,
            ranges=tuple(ranges),
            table=f"{self.settings.namespace}.{contract.table.name if contract.table else contract.id}",
            group=f"{self.settings.topic_prefix}{recipe.group_kind}" if recipe else None,
            topic=topic,
            next_offsets=next_offsets,
        )

    def checked(self, ranges: Iterable[OffsetRange]) -> tuple[OffsetRange, ...]:
        """Return `ranges` merged; refuse what neither Kafka nor, below the log start, the raw table holds.

        Raises:
            ConfigurationError: there are none, or one is not of the source topic.
            RetentionGapError: one starts below its log start, and there is no raw table that has the rest.
            PermanentSourceError: one ends beyond the last stable offset.
        """
        merged = merged_ranges(ranges)
        if not merged:
            msg = (
                f"nothing to replay in {self.lineage.contract.id}: expected ranges of {self.source.topic} that hold "
                "offsets, found none"
            )
            raise ConfigurationError(msg)
        # Imported here: the raw table is read by the functions of this module.
        from streamforge.lakehouse.raw_table import RawTable, has_raw_table  # noqa: PLC0415

        logs = log_ranges(self.settings, [self.source.topic])
        for each in merged:
            if each.topic_partition not in logs:
                msg = (
                    f"{each}: the rows of {self.lineage.contract.id} are made from {self.source.topic}, which has "
                    f"partitions 0 to {self.source.partitions - 1}"
                )
                raise ConfigurationError(msg)
        starts = {item: log.log_start for item, log in logs.items()}
        from_table = below(merged, starts) if has_raw_table(self.lineage) else ()
        for each in without(merged, from_table):
            check_within_log(each, logs[each.topic_partition])
        if from_table:
            RawTable.of(self, from_table[0]).check_holds(from_table)
        return merged


def open_target(
    settings: Settings, contracts: Contracts, table_name: str, recompute: MakeRemake | None = None
) -> Target:
    """Find what a replay of `table_name` works on.

    Args:
        settings: which cluster and catalog.
        contracts: all of them.
        table_name: table name or contract id.
        recompute: makes the re-run instead of the one in `RECIPES`.

    Raises:
        ConfigurationError: there is no such table.
        PermanentSourceError: there is no source topic.
    """
    lineage = lineage_of(contracts, table_name)
    catalog = open_catalog(settings)
    load_table(catalog, settings, lineage.contract)
    source = topic_identity(settings, topic_settings(lineage.source.topic).name)
    recipe = RECIPES.get(lineage.contract.id)
    make = recompute or (recipe.make(settings) if recipe else Reland)
    remake = make(lineage, source.topic_id)
    return Target(settings, catalog, lineage, source, remake, make, ledger=contracts[LEDGER_ID])


def topic_settings(topic: TopicSettings | None) -> TopicSettings:
    """Return the topic of a lineage, which always has one."""
    if topic is None:
        msg = "a table without a topic has no lineage"
        raise ConfigurationError(msg)
    return topic


def files_with(table: Table, row_filter: BooleanExpression) -> list[FileScanTask]:
    """Return the data files that may hold rows for which `row_filter` is true.

    Raises:
        CommitError: the table's metadata cannot be read.
    """
    with storage_errors(table, "looked up"):
        return list(table.scan(row_filter=row_filter).plan_files())


def files_since(table: Table, snapshot_id: int | None) -> list[FileScanTask] | None:
    """Return the data files that the table snapshots after `snapshot_id` brought; None: it is no ancestor any more.

    Raises:
        CommitError: the table's metadata cannot be read.
    """
    new: set[int] = set()
    found = table.metadata.current_snapshot_id
    while found != snapshot_id:
        snapshot = table.metadata.snapshot_by_id(found) if found is not None else None
        if snapshot is None:
            return None
        new.add(snapshot.snapshot_id)
        found = snapshot.parent_snapshot_id
    now = table.metadata.current_snapshot()
    if now is None or not new:
        return []
    with storage_errors(table, "looked up"):
        old = table.metadata.snapshot_by_id(snapshot_id) if snapshot_id is not None else None
        known = {each.manifest_path for each in old.manifests(table.io)} if old is not None else set()
        manifests = [each for each in now.manifests(table.io) if each.manifest_path not in known]
        entries = [entry for each in manifests for entry in each.fetch_manifest_entry(table.io)]
    return [FileScanTask(entry.data_file) for entry in entries if entry.snapshot_id in new]


def read_file(table: Table, task: FileScanTask, columns: Iterable[str], row_filter: BooleanExpression) -> pa.Table:
    """Return columns of those rows of one data file for which `row_filter` is true.

    Raises:
        CommitError: the file cannot be read.
    """
    schema = table.schema().select(*columns)
    with storage_errors(table, f"read ({task.file.file_path})"):
        return ArrowScan(table.metadata, table.io, schema, row_filter).to_table([task])


@contextmanager
def storage_errors(table: Table, what: str) -> Iterator[None]:
    """Turn what the catalog and its files raise into an error of ours."""
    try:
        yield
    except CATALOG_ERRORS as error:
        msg = (
            f"table {commit.table_name(table)}: data files cannot be {what}: {type(error).__name__}: {error}. "
            "Nothing was changed; mend the storage and try again"
        )
        raise CommitError(msg) from error
