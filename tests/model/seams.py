"""Where the real code meets the world of the model: each call of the catalog or of the group is a question.

A process is a function of the answers that it has got. It is run from the beginning of its current call with the
answers so far; at the first question without an answer the run ends (`Asks`). So nothing of it has to be kept but
those answers, two histories that lead to the same answers are one state, and each such run is made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import ManifestEntry, ManifestWriter
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.table.update import (
    AddSnapshotUpdate,
    AssertRefSnapshotId,
    RemoveSnapshotsUpdate,
    SetPropertiesUpdate,
    SetSnapshotRefUpdate,
)

from streamforge.lakehouse import commit, manifests
from streamforge.lakehouse.commit import KIND_KEY, RANGES_KEY
from streamforge.lakehouse.manifests import TOTAL_RECORDS
from tests.model.world import ModelFile, ModelManifest, ModelSnapshot, Request, Row, Table, interned

IDENTIFIER = ("market", "market_gaps")


class Lost(StrEnum):
    """Answers that do not say whether a commit has landed; the second one says no, and may be mistaken."""

    RESET = "connection reset"
    REFUSED = "409"


@dataclass(frozen=True, slots=True)
class Load:
    """Asks for the table as it is now."""


@dataclass(frozen=True, slots=True)
class Send:
    """Asks the catalog to commit; the answer is the table that it made, or `Lost`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Confirm:
    """Asks the group whether topic-partitions are still those of the asking member."""

    generations: tuple[tuple[int, int], ...]


Question = Load | Send | Confirm
Answer = Table | Lost | bool


class Asks(BaseException):
    """Ends a run at a question; no code catches it."""

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        self.question = question


@dataclass
class Port:
    """What one run of one process is connected to.

    Args:
        author: name of the process.
        number: of the process, part of the snapshot ids that it gives.
        answers: to the questions of this call, so far.
        drafts: snapshot ids given by the process, over all calls.
        generations: of the group, for which the call is made.
    """

    author: str
    number: int
    answers: Sequence[Answer]
    drafts: int
    generations: tuple[tuple[int, int], ...] = ()
    asked: int = 0
    files: int = 0
    lists: dict[str, tuple[ModelFile, ...]] = field(default_factory=dict)

    def ask(self, question: Question) -> Answer:
        """Return the recorded answer to the next question, or end the run there."""
        if self.asked == len(self.answers):
            raise Asks(question)
        self.asked += 1
        return self.answers[self.asked - 1]

    def table(self, value: Table) -> IcebergTable:
        """Return a table of the real class on the model's metadata and catalog."""
        metadata: Any = Metadata(value, self)
        catalog: Any = ModelCatalog(self)
        io: Any = SimpleNamespace(port=self, new_output=lambda path: SimpleNamespace(port=self, path=path))
        return IcebergTable(IDENTIFIER, metadata, "model", io, catalog)

    def new_file(self, rows: Iterable[Row]) -> ModelFile:
        """Return a data file with a name of its own."""
        self.files += 1
        return interned(ModelFile(f"{self.author}.{self.drafts}.{self.files}", tuple(sorted(rows))))


class Metadata:
    """The model's table as `TableMetadata`, so far as it is read."""

    table_uuid = "6f1f9f3c-0000-4000-8000-000000000000"
    location = "model"
    format_version = 2
    default_spec_id = current_schema_id = 0
    metadata_log = ()

    def __init__(self, value: Table, port: Port) -> None:
        self.value = value
        self._port = port
        self.properties = dict(value.properties)
        self.snapshots = list(value.snapshots)
        self.current_snapshot_id = value.main
        self.refs = {MAIN_BRANCH: SimpleNamespace(snapshot_id=value.main)} if value.main is not None else {}

    def snapshot_by_name(self, _name: str) -> ModelSnapshot | None:
        """Return the head of `main`."""
        return self.value.head

    def current_snapshot(self) -> ModelSnapshot | None:
        """Return the head of `main`."""
        return self.value.head

    def snapshot_by_id(self, snapshot_id: int) -> ModelSnapshot | None:
        """Return a retained snapshot."""
        return self.value.snapshot(snapshot_id)

    def new_snapshot_id(self) -> int:
        """Return the process's next snapshot id."""
        self._port.drafts += 1
        return self._port.number * 1000 + self._port.drafts

    def next_sequence_number(self) -> int:
        """Return the sequence number of the next snapshot."""
        return self.value.last_sequence_number + 1

    def schema(self) -> None:
        """Return no schema: no value is looked at."""

    def specs(self) -> dict[int, None]:
        """Return one partition spec, which is not looked at."""
        return {0: None}


class ModelCatalog:
    """The catalog's two calls that the protocol makes, as questions."""

    def __init__(self, port: Port) -> None:
        self._port = port

    def load_table(self, _identifier: object) -> IcebergTable:
        """Return the table as it is now."""
        answer = self._port.ask(Load())
        assert isinstance(answer, Table)
        return self._port.table(answer)

    def commit_table(self, table: IcebergTable, requirements: Sequence[Any], updates: Sequence[Any]) -> Any:
        """Send requirements and updates; raise what a catalog raises."""
        answer = self._port.ask(Send(interned(_request(self._port, requirements, updates))))
        if answer is Lost.RESET:
            msg = "connection reset"
            raise ConnectionError(msg)
        if answer is Lost.REFUSED:
            msg = "requirement failed: main has changed"
            raise CommitFailedException(msg)
        assert isinstance(answer, Table)
        return SimpleNamespace(metadata=Metadata(answer, self._port), metadata_location="model")


def _request(port: Port, requirements: Sequence[Any], updates: Sequence[Any]) -> Request:
    asserted = tuple((item.ref, item.snapshot_id) for item in requirements if isinstance(item, AssertRefSnapshotId))
    snapshot, main, properties, expired = None, None, dict[str, str](), set[int]()
    for update in updates:
        match update:
            case AddSnapshotUpdate():
                snapshot = _snapshot(port, update.snapshot)
            case SetSnapshotRefUpdate(ref_name="main"):
                main = update.snapshot_id
            case SetPropertiesUpdate():
                properties |= update.updates
            case RemoveSnapshotsUpdate():
                expired |= set(update.snapshot_ids)
            case _:
                raise NotImplementedError(str(update))
    return Request(
        author=port.author,
        asserted=asserted,
        snapshot=snapshot,
        main=main,
        properties=tuple(sorted(properties.items())),
        expired=frozenset(expired),
        forgets_parents=True,
        generations=port.generations,
    )


def _snapshot(port: Port, staged: Snapshot) -> ModelSnapshot:
    texts = staged.summary.additional_properties if staged.summary else {}
    return interned(
        ModelSnapshot(
            snapshot_id=staged.snapshot_id,
            parent_snapshot_id=staged.parent_snapshot_id,
            sequence_number=staged.sequence_number or 0,
            files=port.lists[staged.manifest_list],
            kind=texts.get(KIND_KEY, ""),
            ranges=texts.get(RANGES_KEY, "{}"),
            total=int(texts[TOTAL_RECORDS]),
        )
    )


class _Stage(manifests._Stage):
    """The real staging of manifests, with the two steps that touch files replaced."""

    compression = "null"

    def entries(self, manifest: Any) -> list[ManifestEntry]:
        return [ManifestEntry.from_args(data_file=file) for file in manifest.files]

    def write(self, spec_id: int, actions: Iterable[Any]) -> Any:
        return ModelManifest(tuple(entry.data_file for action, entry in actions if action is not ManifestWriter.delete))


@contextmanager
def _write_manifest_list(*, output_file: Any, **_: Any) -> Iterator[Any]:
    written: list[ModelManifest] = []
    yield SimpleNamespace(add_manifests=written.extend)
    output_file.port.lists[output_file.path] = tuple(
        sorted((file for item in written for file in item.files), key=lambda file: file.file_path)
    )


def write_data_files(table: IcebergTable, rows: pa.Table) -> list[ModelFile]:
    """Return a data file with `rows`; it stands in for `commit.write_data_files`."""
    found = [Row(p, o) for p, o in zip(*(rows[name].to_pylist() for name in POSITION_COLUMNS), strict=True)]
    io: Any = table.io
    port: Port = io.port
    return [port.new_file(found)] if found else []


POSITION_COLUMNS = ("source_partition", "source_offset")


def rows_of(partition: int, offsets: Sequence[int]) -> pa.Table:
    """Return rows as the writer buffers them, so far as the protocol reads them."""
    columns = (pa.array([partition] * len(offsets), pa.int32()), pa.array(offsets, pa.int64()))
    return pa.table(dict(zip(POSITION_COLUMNS, columns, strict=True)))


def connect(patch: pytest.MonkeyPatch) -> None:
    """Connect the real commit loop to the model: files are names, and nobody waits."""
    patch.setattr(manifests, "_Stage", _Stage)
    patch.setattr(manifests, "write_manifest_list", _write_manifest_list)
    patch.setattr(commit, "write_data_files", write_data_files)
    defaults = commit.commit_snapshot.__kwdefaults__
    assert defaults is not None
    patch.setitem(defaults, "sleep", lambda _seconds: None)
