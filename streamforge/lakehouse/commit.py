"""The commit protocol at work: claim, compare and set, send once, look.

Every commit of ours, of the writer and of replays, goes through `commit_snapshot`:

1. stage the snapshot on some metadata, after `decide` has compared that very metadata;
2. send it once, asserting the `main` that was compared;
3. whatever is raised is an unknown outcome: load fresh metadata and look for our snapshot id;
4. not there: compare again on the fresh metadata, stage again (manifests, not data), send again.

The library's own retry is never used: it rebases without comparing, and deletes manifests of commits that
landed. Nothing is deleted here after a commit was sent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pyiceberg.exceptions import CommitFailedException, NoSuchTableError
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.update import TableRequirement, TableUpdate

from streamforge import faults
from streamforge.errors import (
    CommitConflictError,
    CommitError,
    CommitUnknownError,
    FencedError,
    HistoryRolledBackError,
    TopicIdentityError,
)
from streamforge.lakehouse.catalog import CATALOG_ERRORS
from streamforge.lakehouse.manifests import (
    TOTAL_RECORDS,
    FilesGoneError,
    SnapshotDraft,
    StagedSnapshot,
    draft_snapshot,
    stage_snapshot,
    write_data_files,
)
from streamforge.lakehouse.protocol import (
    Batch,
    Comparison,
    History,
    SourceIdentity,
    SourcePartition,
    TableState,
    Verdict,
    batch_properties,
    check_history,
    check_identity,
    check_unclaimed,
    claim_properties,
    compare,
    decode_state,
)

COMMIT_DEADLINE_S = 60.0
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0

COMMIT_ID_KEY = "streamforge.commit-id"
RANGES_KEY = "streamforge.source-ranges"
KIND_KEY = "streamforge.kind"
OWNER_KEY = "streamforge.owner"


class PositionsMovedError(CommitConflictError):
    """The table's `next_offset` is not the start of our range: forget the batch, seek, go on."""


class ClaimedMeanwhileError(CommitConflictError):
    """Another has claimed since we read the owner epochs: ask Kafka whose the topic-partitions are, then claim."""


@dataclass(frozen=True, slots=True)
class TableView:
    """The metadata that a decision is made on, and what of it the protocol reads."""

    table: Table
    state: TableState
    history: History


@dataclass(frozen=True, slots=True)
class Committed:
    """One commit that landed: the table with the metadata it made, and what it took."""

    table: Table
    snapshot_id: int
    attempts: int
    commit_s: float


@dataclass(frozen=True, slots=True)
class Claim:
    """Topic-partitions that are ours, and where each goes on.

    Args:
        owner: our owner string.
        identity: the topic.
        epoch: source epoch of the topic in this table.
        owner_epochs: by topic-partition number.
        next_offsets: by topic-partition number, from the metadata that the claim itself made.
    """

    owner: str
    identity: SourceIdentity
    epoch: int
    owner_epochs: Mapping[int, int]
    next_offsets: Mapping[int, int]


Decide = Callable[[TableView], Mapping[str, str]]
"""Compares the metadata of an attempt and returns the properties to set on it; raises to give up."""


def view_of(table: Table) -> TableView:
    """Read what the protocol needs from the table's metadata.

    Raises:
        CommitError: another protocol version, or unreadable properties; names the table.
    """
    try:
        state = decode_state(table.metadata.properties)
    except CommitError as error:
        msg = f"table {table_name(table)}: {error}"
        raise CommitError(msg) from error
    return TableView(table, state, _history(table.metadata))


def table_name(table: Table) -> str:
    """Return the table's name with its namespace."""
    return ".".join(table.name())


def send_once(table: Table, updates: tuple[TableUpdate, ...], requirements: tuple[TableRequirement, ...]) -> Table:
    """Send requirements and updates once through the catalog; return the table with the metadata they made.

    Raises:
        CommitConflictError: the catalog says that a requirement did not hold. It may be mistaken: an answer
            can be lost and a proxy repeat the request, so look as after any other error.
        CommitUnknownError: anything else went wrong; the commit may have landed.
    """
    try:
        response = table.catalog.commit_table(table, requirements, updates)
    except CommitFailedException as error:
        msg = f"table {table_name(table)}: the catalog refused the commit: {error}"
        raise CommitConflictError(msg) from error
    except CATALOG_ERRORS as error:
        msg = f"table {table_name(table)}: the outcome of a commit is unknown: {type(error).__name__}: {error}"
        raise CommitUnknownError(msg) from error
    return _with_metadata(table, response.metadata, response.metadata_location)


def has_landed(table: Table, snapshot_id: int) -> bool:
    """Return whether the snapshot is in the metadata, or was our last commit and has been expired since."""
    if any(item.snapshot_id == snapshot_id for item in table.metadata.snapshots):
        return True
    last = view_of(table).state.last_commit
    return last is not None and last.snapshot_id == snapshot_id


def commit_snapshot(
    table: Table,
    *,
    decide: Decide,
    added: Sequence[DataFile] = (),
    removed: Sequence[DataFile] = (),
    summary: Mapping[str, str] | None = None,
    deadline_s: float = COMMIT_DEADLINE_S,
    steps: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Committed:
    """Commit one table snapshot that adds and removes data files, exactly once.

    Args:
        table: with the metadata to try first; it may be stale.
        decide: see `Decide`; called for every attempt with the metadata that the attempt is built on.
        added: data files, already written.
        removed: data files of the table that it replaces.
        summary: goes into the snapshot's summary.
        deadline_s: seconds after which no further attempt is made.
        steps: prefix of the kill points.
        sleep: waits between attempts.

    Raises:
        FilesGoneError: a file to be removed is gone; certainly nothing landed.
        CommitError: manifests could not be written; certainly nothing landed.
        CommitConflictError: others were always faster; certainly nothing landed.
        CommitUnknownError: the outcome could not be found out before the deadline.
    """
    draft = draft_snapshot(table, added=added, removed=removed, summary=summary)
    started_s = time.monotonic()
    for attempt in range(1, 1_000_000):
        view = view_of(table)
        properties = decide(view)
        staged = _stage(table, draft, properties)
        _step(steps, "staged")
        try:
            landed = send_once(table, staged.updates, staged.requirements)
        except (CommitConflictError, CommitUnknownError) as error:
            table = _look(table, draft.snapshot_id, started_s + deadline_s, sleep, error)
            if has_landed(table, draft.snapshot_id):
                return Committed(table, draft.snapshot_id, attempt, time.monotonic() - started_s)
            if time.monotonic() > started_s + deadline_s:
                raise
            sleep(_wait_s(attempt))
        else:
            _step(steps, "sent")
            _delete_old_metadata_files(table, landed)
            return Committed(landed, draft.snapshot_id, attempt, time.monotonic() - started_s)
    raise AssertionError  # pragma: no cover


def claim(
    table: Table,
    *,
    owner: str,
    identity: SourceIdentity,
    log_starts: Mapping[int, int],
    deadline_s: float = COMMIT_DEADLINE_S,
    steps: str | None = None,
) -> tuple[Table, Claim]:
    """Make the topic-partitions of `log_starts` (number -> first offset in Kafka) ours, by an empty append.

    Whoever owned them is fenced from here on. `next_offset` is read from the metadata that this commit made.
    A claim that came after `table` was loaded may be that of our heir, so ours is given up: load the table, make
    sure that Kafka still counts the topic-partitions as ours, only then claim.

    Raises:
        ClaimedMeanwhileError: another has claimed one of them since `table` was loaded; nothing landed.
        TopicIdentityError: the table's offsets belong to another topic id or cluster.
        HistoryRolledBackError: the table was moved back.
        FencedError: another claim came after ours before we could read its result.
    """
    loaded = view_of(table).state

    def decide(view: TableView) -> Mapping[str, str]:
        for found in (check_identity(view.state, identity), check_history(view.state, view.history)):
            _raise_unless_clear(view, found, identity)
        _raise_unless_clear(view, check_unclaimed(loaded, view.state, identity.topic, log_starts), identity)
        return claim_properties(view.state, owner=owner, identity=identity, log_starts=log_starts)

    summary = {KIND_KEY: "claim", OWNER_KEY: owner}
    committed = commit_snapshot(table, decide=decide, summary=summary, deadline_s=deadline_s, steps=steps)
    view = view_of(committed.table)
    epoch = view.state.epoch_of(identity.topic)
    owner_epochs, next_offsets = {}, {}
    for partition in log_starts:
        source = SourcePartition(epoch or 0, partition)
        position = view.state.positions.get(source)
        if position is None or position.owner != owner:
            found = position.owner if position else "nobody"
            _raise_unless_clear(view, Comparison(Verdict.FENCED, owner, found, source), identity)
            raise AssertionError  # pragma: no cover
        owner_epochs[partition] = position.owner_epoch
        next_offsets[partition] = position.next_offset
    return committed.table, Claim(owner, identity, epoch or 0, owner_epochs, next_offsets)


def commit_batch(
    table: Table,
    batch: Batch,
    *,
    added: Sequence[DataFile] = (),
    summary: Mapping[str, str] | None = None,
    deadline_s: float = COMMIT_DEADLINE_S,
    steps: str | None = None,
) -> Committed:
    """Commit data files and the positions that they bring, all or nothing.

    Raises:
        FencedError: another owner has one of the topic-partitions; names it.
        PositionsMovedError: a `next_offset` is not the start of our range.
        HistoryRolledBackError: the table was moved back by a person.
        TopicIdentityError: `streamforge rebind` has started another source epoch.
    """

    def decide(view: TableView) -> Mapping[str, str]:
        check_batch(view, batch)
        return batch_properties(batch)

    return commit_snapshot(table, decide=decide, added=added, summary=summary, deadline_s=deadline_s, steps=steps)


def check_batch(view: TableView, batch: Batch) -> None:
    """Raise what the comparison of `batch` with the metadata of `view` found, unless it is clear."""
    _raise_unless_clear(view, compare(view.state, view.history, batch), batch.identity)


def check_live_identity(table: Table, held: SourceIdentity, live: SourceIdentity | None) -> None:
    """Check that Kafka's topic is still the one that we hold; None where Kafka has no topic of that name.

    Raises:
        TopicIdentityError: it is another; names both.
    """
    if live == held:
        return
    found = f"topic id {live.topic_id} in cluster {live.cluster_id}" if live else "no topic of that name"
    expected = f"topic id {held.topic_id} in cluster {held.cluster_id}"
    _raise_unless_clear(view_of(table), Comparison(Verdict.TOPIC_REPLACED, expected, found), held)


def check_not_rolled_back(view: TableView) -> None:
    """Check that `main` still descends from our last commit; every `Decide` of a replay begins with it.

    Raises:
        HistoryRolledBackError: it does not.
    """
    _raise_unless_clear(view, check_history(view.state, view.history), None)


def refresh(table: Table) -> Table:
    """Load the table anew; the catalog's errors become ours.

    Raises:
        CommitError: the table is gone or the catalog does not answer.
    """
    try:
        return table.catalog.load_table(table.name())
    except NoSuchTableError as error:
        msg = f"table {table_name(table)} does not exist any more; `streamforge contracts apply` creates it"
        raise CommitError(msg) from error
    except CATALOG_ERRORS as error:
        msg = f"table {table_name(table)} cannot be loaded: {type(error).__name__}: {error}"
        raise CommitError(msg) from error


def _stage(table: Table, draft: SnapshotDraft, properties: Mapping[str, str]) -> StagedSnapshot:
    try:
        return stage_snapshot(table, draft, properties)
    except CATALOG_ERRORS as error:
        msg = (
            f"table {table_name(table)}: the manifests of a commit could not be written: {type(error).__name__}: "
            f"{error}. Nothing was sent; free space or mend the storage and start again"
        )
        raise CommitError(msg) from error


def _look(
    table: Table, snapshot_id: int, deadline_s: float, sleep: Callable[[float], None], cause: CommitError
) -> Table:
    """Load fresh metadata, again and again until the deadline: without it the outcome stays unknown."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return refresh(table)
        except CommitError as error:
            if time.monotonic() > deadline_s:
                msg = (
                    f"{cause}; and it cannot be looked up: {error}. If table snapshot {snapshot_id} is in "
                    f"{table_name(table)}, it landed. A restart finds out and goes on from the table's next_offset"
                )
                raise CommitUnknownError(msg) from error
            sleep(_wait_s(attempt))


def _raise_unless_clear(view: TableView, found: Comparison, identity: SourceIdentity | None) -> None:
    name, short = table_name(view.table), view.table.name()[-1]
    topic = identity.topic if identity else "its topics"
    where = f"table {name}, topic {topic}" + (f", {found.where}" if found.where else "")
    match found.verdict:
        case Verdict.CLEAR:
            return
        case Verdict.FENCED:
            msg = (
                f"{where}: owned by {found.found}, no longer by us, {found.expected}. Another process has claimed it: "
                "run one writer for each slot"
            )
            raise FencedError(msg)
        case Verdict.TOPIC_REPLACED:
            msg = (
                f"{where}: the table's offsets belong to {found.expected}, Kafka now has {found.found}. If the topic "
                f"was recreated on purpose, `streamforge rebind {short}` starts a new source epoch; old rows stay"
            )
            raise TopicIdentityError(msg)
        case Verdict.ROLLED_BACK:
            msg = (
                f"{where}: expected {found.expected}, found {found.found}: the table was moved back, so rows that its "
                f"positions count as written are gone. `streamforge reconcile {short}` mends the positions"
            )
            raise HistoryRolledBackError(msg)
        case Verdict.CLAIMED_MEANWHILE:
            msg = f"{where}: {found.found} has claimed it while we were about to, expected {found.expected}"
            raise ClaimedMeanwhileError(msg)
        case Verdict.MOVED | Verdict.RAW_EPOCH_TAKEN:
            msg = f"{where}: {found.verdict}: our range starts at {found.expected}, the table says {found.found}"
            raise PositionsMovedError(msg)


def _history(metadata: TableMetadata) -> History:
    main = metadata.snapshot_by_name(MAIN_BRANCH)
    summary = main.summary if main is not None else None
    total = summary.additional_properties.get(TOTAL_RECORDS) if summary is not None else None
    return History(
        main_snapshot_id=main.snapshot_id if main else None,
        sequence_number=(main.sequence_number or 0) if main else 0,
        total_records=int(total) if total is not None else None,
        parents={item.snapshot_id: item.parent_snapshot_id for item in metadata.snapshots},
    )


def _with_metadata(table: Table, metadata: TableMetadata, metadata_location: str) -> Table:
    return Table(
        identifier=table.name(),
        metadata=metadata,
        metadata_location=metadata_location,
        io=table.io,
        catalog=table.catalog,
        config=table.config,
    )


def _delete_old_metadata_files(before: Table, after: Table) -> None:
    """Delete the metadata files (never data or manifests) that fell off the log, where the table asks for it."""
    if after.metadata.properties.get("write.metadata.delete-after-commit.enabled") != "true":
        return
    kept = {entry.metadata_file for entry in after.metadata.metadata_log}
    for entry in before.metadata.metadata_log:
        if entry.metadata_file not in kept:
            try:
                after.io.delete(entry.metadata_file)
            except CATALOG_ERRORS:
                continue  # Another committer was first, or orphan removal will be.


def _wait_s(attempt: int) -> float:
    longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(attempt, 10))
    return longest_s * random.uniform(0.5, 1.0)  # noqa: S311


def _step(prefix: str | None, name: str) -> None:
    if prefix is not None:
        faults.step(f"{prefix}_{name}")


__all__ = [
    "COMMIT_DEADLINE_S",
    "COMMIT_ID_KEY",
    "KIND_KEY",
    "OWNER_KEY",
    "RANGES_KEY",
    "Claim",
    "ClaimedMeanwhileError",
    "Committed",
    "Decide",
    "FilesGoneError",
    "PositionsMovedError",
    "SnapshotDraft",
    "StagedSnapshot",
    "TableView",
    "check_batch",
    "check_live_identity",
    "check_not_rolled_back",
    "claim",
    "commit_batch",
    "commit_snapshot",
    "draft_snapshot",
    "has_landed",
    "refresh",
    "send_once",
    "stage_snapshot",
    "table_name",
    "view_of",
    "write_data_files",
]
