"""The rules of the design, each left out of the real code in turn: every one must be found by a scenario."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from confluent_kafka import TopicPartition as KafkaTopicPartition
from pyiceberg.table import Table as IcebergTable

from streamforge.errors import CommitConflictError
from streamforge.lakehouse import commit, held, protocol, repair
from streamforge.lakehouse import replay as replay_module
from streamforge.lakehouse.barrier import BarrierState
from streamforge.lakehouse.protocol import (
    CLEAR,
    Batch,
    Comparison,
    History,
    Position,
    SourceIdentity,
    SourcePartition,
    TableState,
    Verdict,
)
from streaming.writer import WriterWorker
from tests.model import steps, world

ONE_MAP_KEY = "streamforge.positions"


@dataclass(frozen=True)
class Bug:
    """A rule that is left out.

    Args:
        name: what is left out.
        scenario: the one that finds it.
        plant: leaves it out.
        says: part of what is found.
    """

    name: str
    scenario: str
    plant: Callable[[pytest.MonkeyPatch], None]
    says: str


def no_claim(patch: pytest.MonkeyPatch) -> None:
    """Start at the table's `next_offset` without making anything ours; where nobody owns, nothing is compared."""
    real = commit.claim

    def claim(table: IcebergTable, *, owner: str, identity: SourceIdentity, **named: Any) -> Any:
        state = commit.view_of(table).state
        epoch = state.epoch_of(identity.topic)
        found = {p: state.positions.get(SourcePartition(epoch or 0, p)) for p in named["log_starts"]}
        known = {p: position for p, position in found.items() if position is not None}
        if epoch is None or len(known) < len(found):
            return real(table, owner=owner, identity=identity, **named)
        epochs = {p: position.owner_epoch for p, position in known.items()}
        starts = {p: position.next_offset for p, position in known.items()}
        return table, commit.Claim(owner, identity, epoch, epochs, starts)

    patch.setattr(commit, "claim", claim)
    ignoring(patch, Verdict.FENCED)


def rebasing_retry(patch: pytest.MonkeyPatch) -> None:
    """Retry as the library does: what was refused is staged on the fresh metadata and sent again, not compared."""

    def commit_snapshot(table: IcebergTable, *, decide: commit.Decide, **named: Any) -> commit.Committed:
        drafted = {key: named[key] for key in ("added", "removed", "summary") if key in named}
        draft = commit.draft_snapshot(table, **drafted)
        properties = decide(commit.view_of(table))
        while True:
            staged = commit.stage_snapshot(table, draft, properties)
            try:
                landed = commit.send_once(table, staged.updates, staged.requirements)
            except CommitConflictError:
                table = commit.refresh(table)
            else:
                return commit.Committed(landed, draft.snapshot_id, 1, 0.0)

    patch.setattr(commit, "commit_snapshot", commit_snapshot)


def no_first_compare(patch: pytest.MonkeyPatch) -> None:
    """Compare only what meets a conflict."""
    _comparing_attempts(patch, lambda attempt: attempt > 1)


def no_compare_after_refresh(patch: pytest.MonkeyPatch) -> None:
    """Compare the first attempt only."""
    _comparing_attempts(patch, lambda attempt: attempt == 1)


def _comparing_attempts(patch: pytest.MonkeyPatch, is_compared: Callable[[int], bool]) -> None:
    real_commit, real_check, attempts = commit.commit_batch, commit.check_batch, [0]

    def commit_batch(*arguments: Any, **named: Any) -> commit.Committed:
        attempts[0] = 0
        return real_commit(*arguments, **named)

    def check_batch(view: commit.TableView, batch: Batch) -> None:
        attempts[0] += 1
        if is_compared(attempts[0]):
            real_check(view, batch)

    patch.setattr(commit, "commit_batch", commit_batch)
    patch.setattr(commit, "check_batch", check_batch)


def no_owner_compare(patch: pytest.MonkeyPatch) -> None:
    """Do not compare owner and owner epoch."""
    ignoring(patch, Verdict.FENCED)


def no_position_compare(patch: pytest.MonkeyPatch) -> None:
    """Do not compare `next_offset` with the start of the range."""
    ignoring(patch, Verdict.MOVED)


def ignoring(patch: pytest.MonkeyPatch, verdict: Verdict) -> None:
    """Let the comparison never find `verdict`."""
    real = protocol.compare

    def compare(*arguments: Any) -> Comparison:
        found = real(*arguments)
        return CLEAR if found.verdict is verdict else found

    patch.setattr(commit, "compare", compare)


def no_history_check(patch: pytest.MonkeyPatch) -> None:
    """Do not look whether `main` descends from our last commit."""
    patch.setattr(commit, "check_history", lambda *_: CLEAR)
    ignoring(patch, Verdict.ROLLED_BACK)


def no_totals_check(patch: pytest.MonkeyPatch) -> None:
    """Take every chain that expiry has cut for one that still holds our last commit."""
    real = protocol.check_history

    def check_history(state: TableState, history: History) -> Comparison:
        last = state.last_commit
        if last is None or last.snapshot_id in history.parents:
            return real(state, history)
        return CLEAR

    patch.setattr(commit, "check_history", check_history)
    real_compare = protocol.compare

    def compare(state: TableState, history: History, batch: Batch) -> Comparison:
        found = real_compare(state, history, batch)
        return check_history(state, history) if found.verdict is Verdict.ROLLED_BACK else found

    patch.setattr(commit, "compare", compare)


def unknown_is_failure(patch: pytest.MonkeyPatch) -> None:
    """Do not look whether a commit without an answer has landed, and send the batch again as a new one."""
    patch.setattr(commit, "has_landed", lambda *_: False)
    real = commit.stage_snapshot

    def stage_as_new(table: IcebergTable, draft: commit.SnapshotDraft, properties: Any) -> commit.StagedSnapshot:
        is_again = table.metadata.snapshot_by_id(draft.snapshot_id) is not None
        return real(
            table, replace(draft, snapshot_id=table.metadata.new_snapshot_id()) if is_again else draft, properties
        )

    patch.setattr(commit, "stage_snapshot", stage_as_new)
    ignoring(patch, Verdict.MOVED)


def unknown_is_success(patch: pytest.MonkeyPatch) -> None:
    """Take a commit without an answer for one that has landed."""
    patch.setattr(commit, "has_landed", lambda *_: True)


def no_assertion(patch: pytest.MonkeyPatch) -> None:
    """Send without asserting the `main` that was compared."""
    real = commit.stage_snapshot

    def stage_snapshot(*arguments: Any) -> commit.StagedSnapshot:
        return replace(real(*arguments), requirements=())

    patch.setattr(commit, "stage_snapshot", stage_snapshot)


def no_assertion_nor_sequence(patch: pytest.MonkeyPatch) -> None:
    """Send without assertion to a catalog that does not mind old sequence numbers."""
    no_assertion(patch)
    catalog_takes_any_sequence(patch)


def catalog_takes_any_sequence(patch: pytest.MonkeyPatch) -> None:
    """Let the catalog take snapshots whose sequence number is not new."""
    for module in (world, steps):
        patch.setattr(module, "is_sequence_stale", lambda *_: False)


def no_barrier(patch: pytest.MonkeyPatch) -> None:
    """Plan a replay without waiting until its ranges are landed."""
    patch.setattr(replay_module, "_landed", lambda target, *_: (target.load(), BarrierState(())))


def no_replay_epoch(patch: pytest.MonkeyPatch) -> None:
    """Do not compare whether another replay, or a repair, came between plan and commit."""
    patch.setattr(replay_module, "replay_epoch", lambda _table: 0)


def position_at_commit(patch: pytest.MonkeyPatch) -> None:
    """Commit the consumer's position instead of the one that was captured with the batch."""
    real = WriterWorker.commit

    def commit_where_the_consumer_is(worker: WriterWorker) -> None:
        for topic, writer in worker._writers.items():
            for partition, item in writer._held.items():
                (found,) = worker._opened().position([KafkaTopicPartition(topic, partition)])
                item.end = found.offset
        real(worker)

    patch.setattr(WriterWorker, "commit", commit_where_the_consumer_is)


def no_confirmation(patch: pytest.MonkeyPatch) -> None:
    """Claim without asking the group whether the topic-partitions are still ours."""
    patch.setattr(WriterWorker, "_confirm_assignment", lambda *_: None)


def no_unclaimed_check(patch: pytest.MonkeyPatch) -> None:
    """Claim over a claim that came after the group was asked."""
    patch.setattr(commit, "check_unclaimed", lambda *_: CLEAR)


def first_partition_only(patch: pytest.MonkeyPatch) -> None:
    """Compare only one topic-partition of a batch."""
    real = protocol.compare

    def compare(state: TableState, history: History, batch: Batch) -> Comparison:
        return real(state, history, replace(batch, moves=dict([min(batch.moves.items())])))

    patch.setattr(commit, "compare", compare)


def one_map(patch: pytest.MonkeyPatch) -> None:
    """Keep all positions in one property, which each commit writes with what it moves."""
    real_decode, real_batch, real_claim = protocol.decode_state, protocol.batch_properties, protocol.claim_properties

    def as_map(properties: Mapping[str, str]) -> dict[str, str]:
        positions = real_decode(properties).positions
        texts = {f"{source.epoch}.{source.partition}": position for source, position in positions.items()}
        kept = {key: value for key, value in properties.items() if ".position." not in key}
        return kept | {ONE_MAP_KEY: msgspec.json.encode(texts).decode()}

    def decode_state(properties: Mapping[str, str]) -> TableState:
        found = msgspec.json.decode(properties.get(ONE_MAP_KEY, "{}"), type=dict[str, Position])
        positions = {SourcePartition(*map(int, key.split("."))): value for key, value in found.items()}
        kept = {key: value for key, value in properties.items() if key != ONE_MAP_KEY}
        return replace(real_decode(kept), positions=positions)

    patch.setattr(commit, "decode_state", decode_state)
    patch.setattr(world, "decode_state", decode_state)
    patch.setattr(commit, "batch_properties", lambda batch: as_map(real_batch(batch)))
    patch.setattr(commit, "claim_properties", lambda *args, **named: as_map(real_claim(*args, **named)))


def reconcile_trusts_what_is_left(patch: pytest.MonkeyPatch) -> None:
    """Take the first commit that expiry has left for the first that there was."""
    patch.setattr(held, "_goes_back_to_the_first", lambda *_: True)


def reconcile_keeps_positions(patch: pytest.MonkeyPatch) -> None:
    """Mend a moved table without setting its positions back."""
    patch.setattr(repair.PartitionRepair, "restart", property(lambda item: item.next_offset))


BUGS = (
    Bug("no claim", "handover", no_claim, "fenced"),
    Bug("retry rebases as the library's", "handover", rebasing_retry, "back from its heir"),
    Bug("no compare before a first attempt", "maintained", no_first_compare, "fenced"),
    Bug("no compare after a refresh", "handover", no_compare_after_refresh, "fenced"),
    Bug("owner and owner epoch not compared", "handover", no_owner_compare, "fenced"),
    Bug("next_offset not compared", "two owners", no_position_compare, "doubled"),
    Bug("only one topic-partition compared", "together", first_partition_only, "fenced"),
    Bug("rollback not looked for", "rolled back", no_history_check, "moved back"),
    Bug("totals not compared where expiry cut the chain", "rolled back and expired", no_totals_check, "moved back"),
    Bug("unknown outcome taken for failure", "handover", unknown_is_failure, "doubled"),
    Bug("unknown outcome taken for success", "handover", unknown_is_success, "is fenced"),
    Bug("main not asserted", "handover", no_assertion, "back from its heir"),
    Bug("main not asserted and sequence numbers not checked", "replay", no_assertion_nor_sequence, "changed"),
    Bug("sequence numbers not checked", "rolled back", catalog_takes_any_sequence, "moved back"),
    Bug("replay without barrier", "replay unlanded", no_barrier, "doubled"),
    Bug("replays do not see each other", "replay killed", no_replay_epoch, "a replay changed"),
    Bug("position at commit time", "ahead", position_at_commit, "lost"),
    Bug("claim without asking the group", "to and fro", no_confirmation, "back from its heir"),
    Bug("claim over a later claim", "to and fro", no_unclaimed_check, "back from its heir"),
    Bug("one map of positions, overwritten", "two owners", one_map, "is fenced"),
    Bug("reconcile keeps positions", "rolled back", reconcile_keeps_positions, "lost"),
    Bug("reconcile trusts the first commit left", "rolled back and maintained", reconcile_trusts_what_is_left, "lost"),
)
