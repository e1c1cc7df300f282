"""The world of the model as values: a table with its snapshots and properties, and a catalog that compares and sets.

Values that the real code reads carry the names that PyIceberg gives them (`snapshot_id`, `properties`, ...), so that
it takes them for the real thing. Two equal values are one object (`interned`), which makes them cheap to compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

from pyiceberg.manifest import DataFileContent, ManifestContent
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.snapshots import Operation

from streamforge.lakehouse.commit import KIND_KEY, RANGES_KEY
from streamforge.lakehouse.manifests import TOTAL_RECORDS
from streamforge.lakehouse.protocol import TableState, decode_state

T = TypeVar("T")
_known: dict[Any, Any] = {}


def interned(value: T) -> T:
    """Return the one object that stands for `value`."""
    known: T = _known.setdefault(value, value)
    return known


def forget_interned() -> None:
    """Let go of all values; none of an earlier search may be used any more."""
    _known.clear()
    difference_from_log.cache_clear()
    _state_of.cache_clear()


class Row(NamedTuple):
    """One row: the record that it came from, and the parser that made it."""

    partition: int
    offset: int
    parser: int = 1


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A data file, with what the real code reads of one."""

    file_path: str
    rows: tuple[Row, ...]
    content = DataFileContent.DATA
    partition = ()
    spec_id = 0

    @property
    def record_count(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    file_size_in_bytes = record_count


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A snapshot's summary: totals, and what a commit of ours says of itself."""

    additional_properties: dict[str, str]
    operation: Operation = Operation.APPEND


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """A manifest, with what the real code reads of one."""

    files: tuple[ModelFile, ...]
    partition_spec_id = 0
    content = ManifestContent.DATA
    existing_files_count = 0
    deleted_files_count = 0

    @property
    def manifest_path(self) -> str:
        """Return a name that goes by the files."""
        return "+".join(file.file_path for file in self.files)

    @property
    def added_files_count(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def has_added_files(self) -> bool:
        """Return whether there are any."""
        return bool(self.files)

    def has_existing_files(self) -> bool:
        """Return that there are no others."""
        return False


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """A table snapshot.

    Args:
        snapshot_id: its id.
        parent_snapshot_id: what it was built on.
        sequence_number: as its maker says.
        files: what it holds.
        kind: of a commit of ours (`claim`, `write`, ...); empty for others.
        ranges: the source ranges that its summary names.
        total: `total-records` of its summary.
        newest_of_ours: the youngest commit of ours at or behind it, however much expiry takes away.
    """

    snapshot_id: int
    parent_snapshot_id: int | None
    sequence_number: int
    files: tuple[ModelFile, ...]
    kind: str = ""
    ranges: str = "{}"
    total: int = 0
    newest_of_ours: int | None = None

    def __hash__(self) -> int:
        return hash((self.snapshot_id, self.parent_snapshot_id, self.sequence_number))

    @property
    def manifest_list(self) -> str:
        """Return its name."""
        return f"list-{self.snapshot_id}"

    @property
    def summary(self) -> ModelSummary:
        """Return totals and what our commits say."""
        texts = {
            TOTAL_RECORDS: str(self.total),
            "total-data-files": str(len(self.files)),
            "total-files-size": str(self.total),
            "total-delete-files": "0",
            "total-position-deletes": "0",
            "total-equality-deletes": "0",
            KIND_KEY: self.kind,
            RANGES_KEY: self.ranges,
        }
        return ModelSummary(texts)

    def manifests(self, _io: Any) -> list[ModelManifest]:
        """Return a manifest for each file."""
        return [ModelManifest((file,)) for file in self.files]

    @property
    def rows(self) -> Iterator[Row]:
        """Return the rows of all files."""
        return (row for file in self.files for row in file.rows)


@dataclass(frozen=True, slots=True)
class Table:
    """The metadata of the one table.

    Args:
        snapshots: retained ones, oldest first.
        main: id of the snapshot that `main` names.
        properties: sorted.
        last_sequence_number: greatest that was ever given.
    """

    snapshots: tuple[ModelSnapshot, ...] = ()
    main: int | None = None
    properties: tuple[tuple[str, str], ...] = ()
    last_sequence_number: int = 0

    def __hash__(self) -> int:
        return hash((self.main, self.last_sequence_number, len(self.snapshots), self.properties))

    def snapshot(self, snapshot_id: int | None) -> ModelSnapshot | None:
        """Return a retained snapshot."""
        return next((item for item in self.snapshots if item.snapshot_id == snapshot_id), None)

    @property
    def head(self) -> ModelSnapshot | None:
        """Return the snapshot that `main` names."""
        return self.snapshot(self.main)

    @property
    def ancestors(self) -> Iterator[ModelSnapshot]:
        """Return the retained snapshots behind `main`, without its head."""
        found = self.head
        while found is not None and (found := self.snapshot(found.parent_snapshot_id)) is not None:
            yield found

    @property
    def is_moved(self) -> bool:
        """Return whether our last commit is no longer at or behind `main`."""
        last = self.state.last_commit
        return last is not None and (self.head is None or self.head.newest_of_ours != last.snapshot_id)

    @property
    def state(self) -> TableState:
        """Return what the properties say."""
        return _state_of(self.properties)


@cache
def _state_of(properties: tuple[tuple[str, str], ...]) -> TableState:
    return decode_state(dict(properties))


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the catalog's commit.

    Args:
        author: who sent it.
        asserted: ref names and the snapshot ids that they must have.
        snapshot: to be added; None: only properties or an expiry.
        main: what `main` is set to; None: left alone.
        properties: to be set.
        expired: snapshots to be removed.
        forgets_parents: what remains loses the ids of parents that expire, as in PyIceberg; in Java it keeps them.
        generations: of the group, by topic-partition, for which a claim or a batch is made.
    """

    author: str
    asserted: tuple[tuple[str, int | None], ...]
    snapshot: ModelSnapshot | None = None
    main: int | None = None
    properties: tuple[tuple[str, str], ...] = ()
    expired: frozenset[int] = frozenset()
    forgets_parents: bool = False
    generations: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> str:
        """Return the kind of our commit; empty for one of others."""
        return self.snapshot.kind if self.snapshot else ""


def apply(table: Table, request: Request) -> Table | None:
    """Return the table after `request`, or None where the catalog refuses it.

    A catalog refuses a snapshot id that is there, and a sequence number that is not new: without the
    latter, a commit that was compared before a person moved `main` back and forth would pass the assertion.
    """
    if any(snapshot_id != table.main for ref, snapshot_id in request.asserted if ref == MAIN_BRANCH):
        return None
    added = request.snapshot
    if added is not None:
        if table.snapshot(added.snapshot_id) is not None:
            return None
        if is_sequence_stale(table, added):
            return None
        parent = table.snapshot(added.parent_snapshot_id)
        newest = added.snapshot_id if added.kind else parent.newest_of_ours if parent else None
        added = replace(added, newest_of_ours=newest)
    snapshots = [item for item in (*table.snapshots, added) if item and item.snapshot_id not in request.expired]
    if request.forgets_parents:
        snapshots = [_orphan(item) if item.parent_snapshot_id in request.expired else item for item in snapshots]
    return interned(
        Table(
            snapshots=tuple(snapshots),
            main=table.main if request.main is None else request.main,
            properties=tuple(sorted((dict(table.properties) | dict(request.properties)).items())),
            last_sequence_number=max(table.last_sequence_number, added.sequence_number if added else 0),
        )
    )


def _orphan(snapshot: ModelSnapshot) -> ModelSnapshot:
    return interned(replace(snapshot, parent_snapshot_id=None))


def is_sequence_stale(table: Table, added: ModelSnapshot) -> bool:
    """Return whether a catalog refuses the sequence number of a new snapshot."""
    return added.parent_snapshot_id is not None and added.sequence_number <= table.last_sequence_number


@dataclass(frozen=True, slots=True)
class Log:
    """What one topic-partition holds below `end`; what is not named is a hole, an aborted record or a marker.

    Args:
        records: offsets of committed records that the live parser makes rows of.
        end: where it ends.
        dead_letters: offsets of committed records that only a corrected parser, in a replay, makes rows of.
    """

    records: tuple[int, ...]
    end: int
    dead_letters: tuple[int, ...] = ()

    def within(self, start: int, end: int, *, corrected: bool = False) -> tuple[int, ...]:
        """Return the offsets in `[start, end)` that the live parser, or the corrected one, makes rows of."""
        made = (*self.records, *self.dead_letters) if corrected else self.records
        return tuple(offset for offset in made if start <= offset < end)


@cache
def difference_from_log(table: Table, logs: tuple[Log, ...]) -> str:
    """Say how rows and positions of the table disagree; empty where they do not.

    Every record below `next_offset` is there once, and none from there on; a dead letter is there once or not at all.
    """
    next_offsets = {source.partition: position.next_offset for source, position in table.state.positions.items()}
    wanted = Counter((p, o) for p, log in enumerate(logs) for o in log.within(0, next_offsets.get(p, 0)))
    found = Counter((row.partition, row.offset) for row in (table.head.rows if table.head else ()))
    for p, log in enumerate(logs):
        for offset in log.dead_letters:
            wanted[p, offset] = min(1, found[p, offset]) if offset < next_offsets.get(p, 0) else 0
    wanted, found = +wanted, +found
    if found == wanted:
        return ""
    names = (("lost", wanted - found), ("doubled or ahead of next_offset", found - wanted))
    return "; ".join(f"{name}: {_said(items)}" for name, items in names if items)


def _said(items: Counter[tuple[int, int]]) -> str:
    return ", ".join(f"offset {offset} of partition {partition}" for partition, offset in sorted(items))
