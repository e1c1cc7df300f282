"""Data files, manifests and manifest lists of one table snapshot, written before the commit is sent.

PyIceberg's own producers hide the attempt: they retry, they delete what they think is unused, and they copy
the whole metadata for each question. Here a snapshot is a draft with one id, staged anew on the metadata of
every attempt: data files and the manifest of added files are written once, the manifest list each time.
Nothing is ever deleted; what an attempt left behind is an orphan, removed by age.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.avro.codecs import AvroCompressionCodec
from pyiceberg.io.pyarrow import _dataframe_to_data_files, bin_pack_arrow_table, pyarrow_to_schema, write_file
from pyiceberg.manifest import (
    DataFile,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriter,
    write_manifest,
    write_manifest_list,
)
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey, PartitionSpec
from pyiceberg.table import Table, TableProperties, WriteTask
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.snapshots import (
    Operation,
    Snapshot,
    SnapshotSummaryCollector,
    Summary,
    update_snapshot_summaries,
)
from pyiceberg.table.update import (
    AddSnapshotUpdate,
    AssertRefSnapshotId,
    AssertTableUUID,
    SetPropertiesUpdate,
    SetSnapshotRefUpdate,
    TableRequirement,
    TableUpdate,
)

from streamforge.errors import CommitConflictError
from streamforge.lakehouse.protocol import LastCommit, encode_last_commit

MERGE_WIDTH = 32
"""So many manifests of about one size are merged into one, so that reading and committing stay cheap."""
MERGED_FILES_MAX = MERGE_WIDTH**2
"""A manifest with so many files is not merged again: the cost of a commit must not grow with the table."""
TOTAL_RECORDS = "total-records"


def total_rows(snapshot: Snapshot | None) -> int:
    """Return the rows of a table snapshot as its summary says; 0 without a snapshot, or where it does not say."""
    summary = snapshot.summary.additional_properties if snapshot is not None and snapshot.summary is not None else {}
    return int(summary.get(TOTAL_RECORDS) or 0)


class FilesGoneError(CommitConflictError):
    """A data file that a commit wanted to remove is no longer in the table: plan again."""


@dataclass
class SnapshotDraft:
    """One table snapshot to be, the same over all attempts to commit it."""

    snapshot_id: int
    commit_uuid: uuid.UUID
    spec_id: int
    added: tuple[DataFile, ...]
    removed: tuple[DataFile, ...]
    summary: Mapping[str, str]
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    added_manifests: list[ManifestFile] | None = None
    entries: dict[str, list[ManifestEntry]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StagedSnapshot:
    """What is sent for one attempt."""

    updates: tuple[TableUpdate, ...]
    requirements: tuple[TableRequirement, ...]


def write_data_files(table: Table, rows: pa.Table) -> list[DataFile]:
    """Write `rows` as Parquet files of the table, one at least for each table partition; nothing is committed."""
    if not rows.num_rows:
        return []
    metadata = table.metadata
    key = _only_partition(metadata, rows)
    if key is None:
        return list(_dataframe_to_data_files(table_metadata=metadata, df=rows, io=table.io, write_uuid=uuid.uuid4()))
    # Told the one table partition, PyIceberg does not copy the rows to find it.
    schema = pyarrow_to_schema(
        rows.schema, name_mapping=metadata.schema().name_mapping, format_version=metadata.format_version
    )
    write_uuid, numbers = uuid.uuid4(), itertools.count()
    target_bytes = int(
        metadata.properties.get(
            TableProperties.WRITE_TARGET_FILE_SIZE_BYTES, TableProperties.WRITE_TARGET_FILE_SIZE_BYTES_DEFAULT
        )
    )
    tasks = (
        WriteTask(write_uuid, next(numbers), schema, batches, partition_key=key)
        for batches in bin_pack_arrow_table(rows.combine_chunks(), target_bytes)
    )
    return list(write_file(table.io, metadata, tasks))


def draft_snapshot(
    table: Table,
    *,
    added: Sequence[DataFile] = (),
    removed: Sequence[DataFile] = (),
    summary: Mapping[str, str] | None = None,
) -> SnapshotDraft:
    """Give a snapshot its id and what it adds and removes."""
    return SnapshotDraft(
        snapshot_id=table.metadata.new_snapshot_id(),
        commit_uuid=uuid.uuid4(),
        spec_id=table.metadata.default_spec_id,  # a data file not yet read from a manifest does not know its own
        added=tuple(added),
        removed=tuple(removed),
        summary=dict(summary or {}),
    )


def stage_snapshot(table: Table, draft: SnapshotDraft, properties: Mapping[str, str]) -> StagedSnapshot:
    """Write manifests and manifest list of `draft` on top of the table's metadata, and say what to send.

    `properties` are set in the same commit, and so is the record of our last commit.

    Raises:
        FilesGoneError: a file to be removed is not in the table.
    """
    metadata = table.metadata
    parent = metadata.snapshot_by_name(MAIN_BRANCH)
    stage = _Stage(table, metadata, draft)
    manifests = stage.merged(stage.kept(parent))
    sequence_number = metadata.next_sequence_number()
    summary = _summary(metadata, parent, draft)
    path = table.location_provider().new_metadata_location(
        f"snap-{draft.snapshot_id}-{next(draft.numbers)}-{draft.commit_uuid}.avro"
    )
    with write_manifest_list(
        format_version=metadata.format_version,
        output_file=table.io.new_output(path),
        snapshot_id=draft.snapshot_id,
        parent_snapshot_id=parent.snapshot_id if parent else None,
        sequence_number=sequence_number,
        avro_compression=stage.compression,
    ) as writer:
        writer.add_manifests([*stage.added(), *manifests])
    snapshot = Snapshot(
        snapshot_id=draft.snapshot_id,
        parent_snapshot_id=parent.snapshot_id if parent else None,
        manifest_list=path,
        sequence_number=sequence_number,
        summary=summary,
        schema_id=metadata.current_schema_id,
    )
    last = LastCommit(draft.snapshot_id, sequence_number, int(summary[TOTAL_RECORDS] or 0))
    return StagedSnapshot(
        updates=(
            AddSnapshotUpdate(snapshot=snapshot),
            SetSnapshotRefUpdate(ref_name=MAIN_BRANCH, type=SnapshotRefType.BRANCH, snapshot_id=draft.snapshot_id),
            SetPropertiesUpdate(updates={**properties, **encode_last_commit(last)}),
        ),
        requirements=(
            AssertTableUUID(uuid=metadata.table_uuid),
            AssertRefSnapshotId(ref=MAIN_BRANCH, snapshot_id=parent.snapshot_id if parent else None),
        ),
    )


@dataclass
class _Stage:
    """Writes the manifests of one attempt."""

    table: Table
    metadata: TableMetadata
    draft: SnapshotDraft

    @property
    def compression(self) -> AvroCompressionCodec:
        return cast(
            AvroCompressionCodec,
            self.metadata.properties.get(
                TableProperties.WRITE_AVRO_COMPRESSION, TableProperties.WRITE_AVRO_COMPRESSION_DEFAULT
            ),
        )

    def added(self) -> list[ManifestFile]:
        """Return the manifests of added files, written at the first attempt: they do not depend on the parent."""
        if self.draft.added_manifests is None:
            actions = ((ManifestWriter.add, _new_entry(item)) for item in self.draft.added)
            self.draft.added_manifests = [self.write(self.draft.spec_id, actions)] if self.draft.added else []
        return self.draft.added_manifests

    def kept(self, parent: Snapshot | None) -> list[ManifestFile]:
        """Return the parent's manifests, without the files that are removed."""
        manifests = [] if parent is None else parent.manifests(self.table.io)
        live = [item for item in manifests if item.has_added_files() or item.has_existing_files()]
        removed = {item.file_path for item in self.draft.removed}
        if not removed:
            return live
        missing = set(removed)
        kept = []
        for manifest in live:
            entries = self.entries(manifest) if manifest.content == ManifestContent.DATA else []
            found = {entry.data_file.file_path for entry in entries} & removed
            missing -= found
            kept.append(self.without(manifest, entries, found) if found else manifest)
        if missing:
            msg = (
                f"table {'.'.join(self.table.name())}: {len(missing)} of {len(removed)} data files to be replaced "
                f"are not in table snapshot {parent.snapshot_id if parent else None}, for instance {min(missing)}: "
                "plan again"
            )
            raise FilesGoneError(msg)
        return kept

    def without(self, manifest: ManifestFile, entries: Iterable[ManifestEntry], found: set[str]) -> ManifestFile:
        return self.write(
            manifest.partition_spec_id,
            (
                (ManifestWriter.delete if entry.data_file.file_path in found else ManifestWriter.existing, entry)
                for entry in entries
            ),
        )

    def merged(self, manifests: list[ManifestFile]) -> list[ManifestFile]:
        """Merge the smallest group of `MERGE_WIDTH` like manifests, if there is one: at most one merge a commit."""
        groups: dict[tuple[int, int], list[ManifestFile]] = defaultdict(list)
        for manifest in manifests:
            files = (manifest.added_files_count or 0) + (manifest.existing_files_count or 0)
            mergeable = manifest.content == ManifestContent.DATA and not manifest.deleted_files_count
            if mergeable and 0 < files < MERGED_FILES_MAX:
                groups[int(math.log(files, MERGE_WIDTH)), manifest.partition_spec_id].append(manifest)
        for (_, spec_id), group in sorted(groups.items()):
            if len(group) >= MERGE_WIDTH:
                entries = itertools.chain.from_iterable(self.entries(item) for item in reversed(group))
                merged = self.write(spec_id, ((ManifestWriter.existing, entry) for entry in entries))
                gone = {item.manifest_path for item in group}
                return [merged, *(item for item in manifests if item.manifest_path not in gone)]
        return manifests

    def entries(self, manifest: ManifestFile) -> list[ManifestEntry]:
        """Return the live entries of a manifest, read once over all attempts that need them for a removal."""
        if manifest.manifest_path not in self.draft.entries:
            self.draft.entries[manifest.manifest_path] = manifest.fetch_manifest_entry(self.table.io)
        return self.draft.entries[manifest.manifest_path]

    def write(
        self, spec_id: int, actions: Iterable[tuple[Callable[[ManifestWriter, ManifestEntry], object], ManifestEntry]]
    ) -> ManifestFile:
        spec: PartitionSpec = self.metadata.specs()[spec_id]
        path = self.table.location_provider().new_metadata_location(
            f"{self.draft.commit_uuid}-m{next(self.draft.numbers)}.avro"
        )
        with write_manifest(
            format_version=self.metadata.format_version,
            spec=spec,
            schema=self.metadata.schema(),
            output_file=self.table.io.new_output(path),
            snapshot_id=self.draft.snapshot_id,
            avro_compression=self.compression,
        ) as writer:
            for action, entry in actions:
                action(writer, entry)
        return writer.to_manifest_file()


def _only_partition(metadata: TableMetadata, rows: pa.Table) -> PartitionKey | None:
    """Return the table partition of all rows; None if they have several, or if the least and greatest do not tell."""
    schema, values = metadata.schema(), []
    for item in metadata.spec().fields:
        source = schema.find_field(item.source_id)
        if source.name not in rows.column_names or not item.transform.preserves_order:
            return None
        column = rows[source.name]
        bounds: Any = pc.min_max(column)
        ends = pa.array([bounds["min"].as_py(), bounds["max"].as_py()], column.type)
        least, greatest = item.transform.pyarrow_transform(source.field_type)(ends).to_pylist()
        if column.null_count or least != greatest:
            return None
        values.append(PartitionFieldValue(item, least))
    return PartitionKey(values, metadata.spec(), schema) if values else None


def _new_entry(data_file: DataFile) -> ManifestEntry:
    return ManifestEntry.from_args(
        status=ManifestEntryStatus.ADDED,
        snapshot_id=None,
        sequence_number=None,
        file_sequence_number=None,
        data_file=data_file,
    )


def _summary(metadata: TableMetadata, parent: Snapshot | None, draft: SnapshotDraft) -> Summary:
    collector = SnapshotSummaryCollector()
    schema, specs = metadata.schema(), metadata.specs()
    for data_file in draft.added:
        collector.add_file(data_file, partition_spec=specs[draft.spec_id], schema=schema)
    for data_file in draft.removed:
        collector.remove_file(data_file, partition_spec=specs[data_file.spec_id], schema=schema)
    operation = Operation.OVERWRITE if draft.removed else Operation.APPEND
    return update_snapshot_summaries(
        summary=Summary(operation=operation, **collector.build(), **draft.summary),
        previous_summary=parent.summary.additional_properties if parent and parent.summary else None,
    )
