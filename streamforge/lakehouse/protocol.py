"""The commit protocol as values: what a table's properties say, and what may be committed on top of it.

State lives in the table's properties, one property for each topic-partition and never one map, so that two
writers of different topic-partitions never overwrite each other:

    streamforge.protocol-version             version of this layout; a writer must know it or refuse
    streamforge.source.<epoch>               which topic (name, topic id, cluster id) the source epoch is
    streamforge.position.<epoch>.<partition> next_offset (first offset not yet written), owner, owner epoch
    streamforge.raw-topic.<epoch>            Kafka's topic id of the raw topic, for the column `raw_epoch`
    streamforge.last-commit                  snapshot id, sequence number and total-records of our last commit

They change only together with a new table snapshot, never alone: a commit of properties only carries no
assertion, so two of them would both pass. Everything here is pure; `commit.py` does the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import msgspec

from streamforge.errors import CommitError

PROTOCOL_VERSION = 1
FIRST_EPOCH = 1

PREFIX = "streamforge."
VERSION_KEY = f"{PREFIX}protocol-version"
LAST_COMMIT_KEY = f"{PREFIX}last-commit"
_SOURCE_KEY = f"{PREFIX}source."
_POSITION_KEY = f"{PREFIX}position."
_RAW_TOPIC_KEY = f"{PREFIX}raw-topic."

_Value = TypeVar("_Value", bound=msgspec.Struct)


class SourceIdentity(msgspec.Struct, frozen=True):
    """The topic that a source epoch stands for; a recreated topic has another topic id."""

    topic: str
    topic_id: str
    cluster_id: str


class Position(msgspec.Struct, frozen=True):
    """How far one topic-partition is written, and by whom; `owner_epoch` grows by 1 with every claim."""

    next_offset: int
    owner: str
    owner_epoch: int


class LastCommit(msgspec.Struct, frozen=True):
    """Our last commit, as known before it was sent."""

    snapshot_id: int
    sequence_number: int
    total_records: int


@dataclass(frozen=True, slots=True, order=True)
class SourcePartition:
    """A topic-partition number in one source epoch of a table."""

    epoch: int
    partition: int

    def __str__(self) -> str:
        return f"partition {self.partition} of source epoch {self.epoch}"


@dataclass(frozen=True, slots=True)
class TableState:
    """What a table's properties say about our commits."""

    sources: Mapping[int, SourceIdentity]
    positions: Mapping[SourcePartition, Position]
    raw_topics: Mapping[int, str]
    last_commit: LastCommit | None

    def epoch_of(self, topic: str) -> int | None:
        """Return the current source epoch of `topic`: the youngest one that names it."""
        return max((epoch for epoch, source in self.sources.items() if source.topic == topic), default=None)

    def next_offsets(self, epoch: int) -> dict[int, int]:
        """Return `next_offset` of each topic-partition number of `epoch`."""
        return {key.partition: value.next_offset for key, value in self.positions.items() if key.epoch == epoch}


@dataclass(frozen=True, slots=True)
class History:
    """What the comparison needs of a table's snapshots: `main`, its totals, and who descends from whom."""

    main_snapshot_id: int | None
    sequence_number: int
    total_records: int | None
    parents: Mapping[int, int | None]


class Verdict(StrEnum):
    """What a comparison found."""

    CLEAR = "clear"
    TOPIC_REPLACED = "topic_replaced"
    FENCED = "fenced"
    ROLLED_BACK = "rolled_back"
    MOVED = "moved"
    RAW_EPOCH_TAKEN = "raw_epoch_taken"
    CLAIMED_MEANWHILE = "claimed_meanwhile"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The verdict and, where it is not clear, where and what was expected and found."""

    verdict: Verdict
    expected: str = ""
    found: str = ""
    where: SourcePartition | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """`next_offset` of one topic-partition going from `start` to `end`, by the holder of `owner_epoch`."""

    start: int
    end: int
    owner_epoch: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one commit moves: all of it or nothing.

    Args:
        owner: our owner string.
        identity: the topic that the offsets belong to.
        epoch: source epoch that our claim was made in.
        moves: by topic-partition number.
        raw_topics: raw epochs that the rows carry, by raw topic id.
    """

    owner: str
    identity: SourceIdentity
    epoch: int
    moves: Mapping[int, Move]
    raw_topics: Mapping[str, int]


CLEAR = Comparison(Verdict.CLEAR)


def decode_state(properties: Mapping[str, str]) -> TableState:
    """Read a table's properties; those that are not ours are ignored.

    Raises:
        CommitError: another protocol version, or a property of ours that cannot be read.
    """
    version = properties.get(VERSION_KEY, str(PROTOCOL_VERSION))
    if version != str(PROTOCOL_VERSION):
        msg = (
            f"the table speaks commit protocol version {version}, this program knows {PROTOCOL_VERSION}: "
            "use the version of streamforge that wrote it"
        )
        raise CommitError(msg)
    sources: dict[int, SourceIdentity] = {}
    positions: dict[SourcePartition, Position] = {}
    raw_topics: dict[int, str] = {}
    last_commit = None
    for key, value in properties.items():
        if key.startswith(_POSITION_KEY):
            epoch, partition = _numbers(key, _POSITION_KEY, 2)
            positions[SourcePartition(epoch, partition)] = _decode(key, value, Position)
        elif key.startswith(_SOURCE_KEY):
            sources[_numbers(key, _SOURCE_KEY, 1)[0]] = _decode(key, value, SourceIdentity)
        elif key.startswith(_RAW_TOPIC_KEY):
            raw_topics[_numbers(key, _RAW_TOPIC_KEY, 1)[0]] = value
        elif key == LAST_COMMIT_KEY:
            last_commit = _decode(key, value, LastCommit)
    return TableState(sources, positions, raw_topics, last_commit)


def encode_source(epoch: int, identity: SourceIdentity) -> dict[str, str]:
    """Return the property that says which topic `epoch` is."""
    return {f"{_SOURCE_KEY}{epoch}": _encode(identity)}


def encode_position(source: SourcePartition, position: Position) -> dict[str, str]:
    """Return the property of one topic-partition."""
    return {f"{_POSITION_KEY}{source.epoch}.{source.partition}": _encode(position)}


def encode_last_commit(last_commit: LastCommit) -> dict[str, str]:
    """Return the properties that every commit of ours sets."""
    return {VERSION_KEY: str(PROTOCOL_VERSION), LAST_COMMIT_KEY: _encode(last_commit)}


def encode_raw_topics(raw_topics: Mapping[str, int]) -> dict[str, str]:
    """Return the properties that register raw topic ids."""
    return {f"{_RAW_TOPIC_KEY}{epoch}": topic_id for topic_id, epoch in raw_topics.items()}


def raw_epochs(state: TableState, topic_ids: Iterable[str]) -> dict[str, int]:
    """Return the raw epoch of each of `topic_ids`; ids not seen yet get the next numbers, in sorted order."""
    known = {topic_id: epoch for epoch, topic_id in state.raw_topics.items()}
    found = {}
    following = max(state.raw_topics, default=FIRST_EPOCH - 1) + 1
    for topic_id in sorted(topic_ids):
        if topic_id in known:
            found[topic_id] = known[topic_id]
        else:
            found[topic_id] = following
            following += 1
    return found


def check_identity(state: TableState, identity: SourceIdentity) -> Comparison:
    """Compare the topic with the one that the table knows under its name; a name not known yet is clear."""
    epoch = state.epoch_of(identity.topic)
    if epoch is None or state.sources[epoch] == identity:
        return CLEAR
    stored = state.sources[epoch]
    return Comparison(
        Verdict.TOPIC_REPLACED,
        expected=f"topic id {stored.topic_id} in cluster {stored.cluster_id} (source epoch {epoch})",
        found=f"topic id {identity.topic_id} in cluster {identity.cluster_id}",
    )


def check_history(state: TableState, history: History) -> Comparison:
    """Compare `main` with our last commit: it must be there or behind `main`.

    Where another process has expired snapshots the chain is cut before our commit can be reached. Then
    the sequence number must not be older and `total-records` must agree: compaction keeps it, a rollback
    to older data does not.
    """
    last = state.last_commit
    if last is None:
        return CLEAR
    expected = f"main at or behind our table snapshot {last.snapshot_id} with {last.total_records} records"
    if history.main_snapshot_id is None:
        return Comparison(Verdict.ROLLED_BACK, expected, "no table snapshot at all")
    snapshot_id: int | None = history.main_snapshot_id
    while snapshot_id is not None and snapshot_id in history.parents:
        if snapshot_id == last.snapshot_id:
            return CLEAR
        snapshot_id = history.parents[snapshot_id]
    cut = last.snapshot_id not in history.parents
    if cut and history.sequence_number >= last.sequence_number and history.total_records == last.total_records:
        return CLEAR
    found = f"main at table snapshot {history.main_snapshot_id} with {history.total_records} records"
    return Comparison(Verdict.ROLLED_BACK, expected, found)


def check_unclaimed(loaded: TableState, state: TableState, topic: str, partitions: Iterable[int]) -> Comparison:
    """Compare the owner epochs of `partitions` with those of the earlier `loaded`: nobody may have claimed since."""
    epoch = state.epoch_of(topic)
    for partition in sorted(partitions):
        source = SourcePartition(epoch or 0, partition)
        before, now = loaded.positions.get(source), state.positions.get(source)
        if now is not None and (before is None or now.owner_epoch != before.owner_epoch):
            expected = f"owner epoch {before.owner_epoch}" if before else "no owner"
            found = f"{now.owner} (owner epoch {now.owner_epoch})"
            return Comparison(Verdict.CLAIMED_MEANWHILE, expected, found, source)
    return CLEAR


def compare(state: TableState, history: History, batch: Batch) -> Comparison:
    """Decide whether `batch` may be committed on exactly this metadata.

    The gravest finding wins: a replaced topic, then another owner of any topic-partition, then a table
    that was rolled back, then a position that is not the start of our range.
    """
    identity = check_identity(state, batch.identity)
    if identity.verdict is not Verdict.CLEAR:
        return identity
    for partition, move in sorted(batch.moves.items()):
        source = SourcePartition(batch.epoch, partition)
        position = state.positions.get(source)
        if position is None or (position.owner, position.owner_epoch) != (batch.owner, move.owner_epoch):
            found = "nobody" if position is None else f"{position.owner} (owner epoch {position.owner_epoch})"
            return Comparison(Verdict.FENCED, f"{batch.owner} (owner epoch {move.owner_epoch})", found, source)
    history_found = check_history(state, history)
    if history_found.verdict is not Verdict.CLEAR:
        return history_found
    for partition, move in sorted(batch.moves.items()):
        source = SourcePartition(batch.epoch, partition)
        if state.positions[source].next_offset != move.start:
            return Comparison(Verdict.MOVED, str(move.start), str(state.positions[source].next_offset), source)
    if raw_epochs(state, batch.raw_topics) != batch.raw_topics:
        return Comparison(Verdict.RAW_EPOCH_TAKEN, str(dict(batch.raw_topics)), str(dict(state.raw_topics)))
    return CLEAR


def batch_properties(batch: Batch) -> dict[str, str]:
    """Return the properties that the commit of `batch` sets."""
    properties = encode_raw_topics(batch.raw_topics)
    for partition, move in batch.moves.items():
        position = Position(move.end, batch.owner, move.owner_epoch)
        properties |= encode_position(SourcePartition(batch.epoch, partition), position)
    return properties


def claim_properties(
    state: TableState, *, owner: str, identity: SourceIdentity, log_starts: Mapping[int, int]
) -> dict[str, str]:
    """Return the properties that claim the topic-partitions of `log_starts` (their first offset in Kafka).

    A topic-partition that the table knows keeps its `next_offset` and gets the next owner epoch, whoever
    owned it; one that it does not know starts at its log start.
    """
    epoch = state.epoch_of(identity.topic)
    properties: dict[str, str] = {}
    if epoch is None:
        epoch = max(state.sources, default=FIRST_EPOCH - 1) + 1
        properties |= encode_source(epoch, identity)
    for partition, log_start in log_starts.items():
        source = SourcePartition(epoch, partition)
        known = state.positions.get(source)
        position = (
            Position(log_start, owner, FIRST_EPOCH)
            if known is None
            else Position(known.next_offset, owner, known.owner_epoch + 1)
        )
        properties |= encode_position(source, position)
    return properties


def rebind_properties(
    state: TableState, *, owner: str, identity: SourceIdentity, log_starts: Mapping[int, int]
) -> dict[str, str]:
    """Return the properties that start the next source epoch for the topic of `identity`, at its log starts.

    Earlier epochs keep theirs: they say of the old rows which topic they came from.
    """
    epoch = max(state.sources, default=FIRST_EPOCH - 1) + 1
    properties = encode_source(epoch, identity)
    for partition, log_start in log_starts.items():
        properties |= encode_position(SourcePartition(epoch, partition), Position(log_start, owner, FIRST_EPOCH))
    return properties


def reconcile_properties(
    state: TableState, *, owner: str, next_offsets: Mapping[SourcePartition, int]
) -> dict[str, str]:
    """Return the properties that set each of `next_offsets` and fence whoever owned a topic-partition before."""
    properties: dict[str, str] = {}
    for source, next_offset in next_offsets.items():
        properties |= encode_position(source, Position(next_offset, owner, state.positions[source].owner_epoch + 1))
    return properties


def _encode(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _decode(key: str, value: str, kind: type[_Value]) -> _Value:
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        msg = (
            f"table property {key} cannot be read: {error}; found {value!r}. Another program has written it: set it to "
            "its value in an earlier metadata file of the table"
        )
        raise CommitError(msg) from error


def _numbers(key: str, prefix: str, count: int) -> tuple[int, ...]:
    parts = key.removeprefix(prefix).split(".")
    if len(parts) != count or not all(part.isdecimal() for part in parts):
        msg = f"table property {key} is not one of ours although it begins with {prefix}; remove it"
        raise CommitError(msg)
    return tuple(int(part) for part in parts)
