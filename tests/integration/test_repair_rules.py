"""`rebind` and `reconcile` on a real catalog: positions are set to what `main` holds, no more and no less.

Each schedule ends with a table that holds every offset once. Where it says so it also runs with a planted bug, and
the same check must fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pytest

from streamforge.errors import CommitConflictError, FencedError, HistoryRolledBackError, TopicIdentityError
from streamforge.lakehouse import commit
from streamforge.lakehouse.protocol import SourcePartition
from streamforge.lakehouse.repair import (
    KnownBy,
    PartitionRepair,
    Reconcile,
    commit_rebind,
    commit_reconcile,
    plan_rebind,
    plan_reconcile,
)
from tests.table_rig import IDENTITY, RECREATED, Rig, before_send


def plan_of(rig: Rig, *, log_start: int = 0, epoch: int = 1) -> Reconcile:
    """Return what a reconcile would do, with `epoch` the one that Kafka still has."""
    view = commit.view_of(rig.fresh())
    live = {source: log_start for source in view.state.positions if source.epoch == epoch}
    plan = plan_reconcile(view, live)
    assert plan is not None
    return plan


def reconcile(rig: Rig) -> Reconcile:
    plan = plan_of(rig)
    commit_reconcile(rig.fresh(), plan, owner="repair")
    return plan


def rebind(rig: Rig, log_starts: Mapping[int, int]) -> None:
    plan = plan_rebind(commit.view_of(rig.fresh()), RECREATED, log_starts)
    assert plan is not None
    commit_rebind(rig.fresh(), plan, owner="repair")


def roll_back_and_land_again(rig: Rig, *, cut: bool) -> None:
    writer = rig.writer()
    writer.claim(0, 1)
    kept = writer.land(10, 5)
    writer.land(20, 5)
    rig.roll_back(kept.snapshot_id)
    if cut:
        rig.foreign_compaction()
        rig.expire_all_but_last()
    with pytest.raises(HistoryRolledBackError):
        writer.restart().claim(0, 1)
    plan = reconcile(rig)
    assert [item.missing for item in plan.partitions] == [(10, 20), None]
    assert {item.known_by for item in plan.partitions} == {KnownBy.ROWS if cut else KnownBy.COMMITS}
    writer.table = rig.fresh()
    with pytest.raises(FencedError, match="repair"):
        writer.land(30, 10)
    again = writer.restart()
    again.claim(0, 1)
    again.land(30, 10)
    rig.assert_exact(30, 10)


@pytest.mark.parametrize("cut", [False, True], ids=["chain", "expired"])
def test_reconcile_rolled_back_table_lands_what_is_missing_once_and_fences_the_live_writer(
    rig: Rig, *, cut: bool
) -> None:
    roll_back_and_land_again(rig, cut=cut)


@pytest.mark.parametrize("bug", ["keeps next_offset", "restarts at 0"])
@pytest.mark.parametrize("cut", [False, True], ids=["chain", "expired"])
def test_reconcile_planted_bug_is_noticed(rig: Rig, monkeypatch: pytest.MonkeyPatch, bug: str, *, cut: bool) -> None:
    wrong = {"keeps next_offset": lambda item: item.next_offset, "restarts at 0": lambda _: 0}[bug]
    monkeypatch.setattr(PartitionRepair, "restart", property(wrong))
    with pytest.raises(AssertionError):
        roll_back_and_land_again(rig, cut=cut)
    assert (rig.content()[0, 0], rig.content()[0, 10]) == {"keeps next_offset": (1, 0), "restarts at 0": (2, 1)}[bug]


def test_reconcile_main_moved_forward_again_moves_next_offset_forward(rig: Rig) -> None:
    """`next_offset` is no bound: with the lesser of it and what main holds, offsets would be doubled."""
    writer = rig.writer()
    writer.claim()
    kept, later = writer.land(10), writer.land(20)
    rig.roll_back(kept.snapshot_id)
    reconcile(rig)
    again = writer.restart()
    again.claim()
    again.land(15)
    rig.fresh().manage_snapshots().set_current_snapshot(later.snapshot_id).commit()
    (found,) = reconcile(rig).partitions
    assert (found.next_offset, found.missing, found.restart) == (15, None, 20)
    last = again.restart()
    last.claim()
    last.land(25)
    rig.assert_exact(25)


@pytest.mark.parametrize("is_first_expired", [False, True], ids=["chain", "first commit expired"])
def test_reconcile_before_the_first_row_lands_all_of_it(rig: Rig, *, is_first_expired: bool) -> None:
    """The start of the first commit that is still there is no start when expiry has taken one before it."""
    writer = rig.writer()
    writer.claim()
    claimed = writer.table.metadata.current_snapshot_id
    first = writer.land(10)
    writer.land(20)
    assert claimed is not None
    rig.roll_back(claimed)
    if is_first_expired:
        rig.fresh().maintenance.expire_snapshots().by_ids([first.snapshot_id]).commit()
    (found,) = reconcile(rig).partitions
    assert (found.known_by, found.restart) == (KnownBy.NOTHING, 0)
    again = writer.restart()
    again.claim()
    again.land(20)
    rig.assert_exact(20)


def test_reconcile_behind_markers_and_replayed_rows_takes_the_commits_word_over_the_rows(rig: Rig) -> None:
    writer = rig.writer()
    writer.claim()
    writer.land(10)
    kept = writer.land(14, rows=False)
    writer.land(20)
    rig.roll_back(kept.snapshot_id)
    # A replay made a row anew and did not find its typed record.
    table = rig.fresh()
    row = rig.rows([(0, 0)])
    place = row.schema.get_field_index("source_offset")
    table.append(row.set_column(place, row.schema.field(place), pa.array([None], pa.int64())))
    plan = plan_of(rig)
    assert (plan.partitions[0].restart, plan.rows_without_source) == (14, 1)
    rig.expire_all_but_last()
    assert plan_of(rig).partitions[0].restart == 10


def test_reconcile_table_that_was_not_moved_has_nothing_to_do(rig: Rig) -> None:
    writer = rig.writer()
    writer.claim()
    writer.land(10)
    rig.foreign_compaction()
    assert plan_reconcile(commit.view_of(rig.fresh()), {}) is None


def test_reconcile_table_changed_meanwhile_changes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = rig.writer()
    writer.claim()
    kept = writer.land(10)
    writer.land(20)
    rig.roll_back(kept.snapshot_id)
    before_send(monkeypatch, rig.foreign_append)
    with pytest.raises(CommitConflictError, match="run it again"):
        reconcile(rig)
    assert commit.view_of(rig.fresh()).state.next_offsets(1) == {0: 20}
    reconcile(rig)
    assert commit.view_of(rig.fresh()).state.next_offsets(1) == {0: 10}


def test_reconcile_of_two_epochs_counts_an_old_one_as_complete_only_behind_a_later_one(rig: Rig) -> None:
    writer = rig.writer()
    writer.claim()
    writer.land(20)
    rebind(rig, {0: 0})
    again = writer.restart()
    again.claim(identity=RECREATED)
    kept = again.land(7)
    again.land(9)
    rig.roll_back(kept.snapshot_id)
    rig.expire_all_but_last()
    old, new = plan_of(rig, epoch=2).partitions
    assert (old.gap, old.known_by, new.missing) == (None, KnownBy.LATER_EPOCH, (7, 9))


def test_reconcile_into_an_old_epoch_says_that_its_topic_is_gone(rig: Rig) -> None:
    writer = rig.writer()
    writer.claim()
    half = writer.land(10)
    writer.land(20)
    rebind(rig, {0: 0})
    again = writer.restart()
    again.claim(identity=RECREATED)
    again.land(7)
    rig.roll_back(half.snapshot_id)
    old, new = plan_of(rig, epoch=2).partitions
    assert (old.gap, old.restart) == ((10, 20), 10)
    assert (new.missing, new.gap, new.restart) == ((0, 7), None, 0)


@pytest.mark.parametrize(
    ("next_offset", "held", "log_start", "gap", "restart"),
    [
        (20, 10, 0, None, 10),
        (20, 10, 10, None, 10),
        (20, 10, 13, (10, 13), 13),
        (20, 10, 25, (10, 20), 20),
        (20, 10, None, (10, 20), 10),
        (20, 20, 25, None, 20),
        (20, 20, None, None, 20),
        (15, 20, 0, None, 20),
    ],
)
def test_partition_repair_restarts_where_main_ends_or_behind_what_kafka_lacks(
    next_offset: int, held: int, log_start: int | None, gap: tuple[int, int] | None, restart: int
) -> None:
    found = PartitionRepair("t", SourcePartition(1, 0), next_offset, held, KnownBy.ROWS, log_start)
    assert (found.gap, found.restart) == (gap, restart)


def test_rebind_begins_an_epoch_at_the_log_start_and_keeps_what_was(rig: Rig) -> None:
    writer = rig.writer()
    writer.claim()
    writer.land(10)
    assert plan_rebind(commit.view_of(rig.fresh()), IDENTITY, {0: 0}) is None
    rebind(rig, {0: 3})
    assert plan_rebind(commit.view_of(rig.fresh()), RECREATED, {0: 3}) is None
    writer.table = rig.fresh()
    with pytest.raises(TopicIdentityError):
        writer.land(20)
    state = commit.view_of(rig.fresh()).state
    assert state.sources == {1: IDENTITY, 2: RECREATED}
    assert (state.next_offsets(1), state.next_offsets(2)) == ({0: 10}, {0: 3})
    again = writer.restart()
    assert again.claim(identity=RECREATED) == {0: 3}
    again.land(6)
    assert rig.content() == Counter((0, offset) for offset in [*range(10), 3, 4, 5])


def test_rebind_of_a_table_that_was_moved_refuses(rig: Rig) -> None:
    writer = rig.writer()
    writer.claim()
    kept = writer.land(10)
    writer.land(20)
    rig.roll_back(kept.snapshot_id)
    with pytest.raises(HistoryRolledBackError, match="streamforge reconcile"):
        rebind(rig, {0: 0})


def test_rebind_twice_at_once_begins_one_epoch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = rig.writer()
    writer.claim()
    writer.land(10)
    before_send(monkeypatch, lambda: rebind(rig, {0: 0}))
    with pytest.raises(CommitConflictError, match="run it again"):
        rebind(rig, {0: 0})
    assert len(commit.view_of(rig.fresh()).state.sources) == 2
