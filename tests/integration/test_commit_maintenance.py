"""Bounded snapshots: summaries are copied once, tags stay, and a writer goes on beside it."""

from __future__ import annotations

import errno
import json

import pytest
from pyiceberg.table import Table

from streamforge.errors import CommitConflictError, CommitError
from streamforge.lakehouse import commit
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.tags import remove_tag, set_tag
from tests.object_store import on_both_stores
from tests.table_rig import Rig, Writer, before_send

RETAINED = 3


def test_expire_keeps_the_bound_and_copies_each_summary_once(rig: Rig) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=6)
    before = {item.snapshot_id: item for item in writer.table.snapshots()}
    writer.table = maintenance.expire(writer.table)
    left = {item.snapshot_id for item in rig.fresh().snapshots()}
    assert len(left) == RETAINED
    rows = _ledger_rows(rig)
    assert {row["snapshot_id"] for row in rows} == before.keys() - left
    assert len(rows) == len(before) - RETAINED
    assert all(row["table_name"] == "market.market_gaps" for row in rows)
    assert json.loads(rows[0]["summary"])[commit.KIND_KEY] == "claim"
    writer.land(70)
    writer.table = maintenance.expire(writer.table)
    again = [row["snapshot_id"] for row in _ledger_rows(rig)]
    assert len(again) == len(set(again)) == len(rows) + 1
    rig.assert_exact(70)


@on_both_stores
def test_expire_never_takes_a_tagged_snapshot(rig: Rig) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    pinned = writer.table.snapshots()[1].snapshot_id
    rig.fresh().manage_snapshots().create_tag(pinned, "model-1").commit()
    maintenance.expire(rig.fresh())
    table = rig.fresh()
    assert table.snapshot_by_name("model-1") is not None
    assert len(table.snapshots()) == RETAINED + 1
    writer.land(60)
    rig.assert_exact(60)


def test_a_tag_set_while_summaries_are_copied_is_kept_whoever_set_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    pinned = writer.table.snapshots()[1].snapshot_id
    before_send(monkeypatch, lambda: rig.fresh().manage_snapshots().create_tag(pinned, "model-1").commit())
    maintenance.expire(writer.table)
    assert _named(rig, "model-1") == pinned
    assert len(rig.fresh().snapshots()) == RETAINED + 1, "the others went"


def test_a_tag_set_right_before_the_expiry_is_sent_is_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    pinned = writer.table.snapshots()[1].snapshot_id
    before_send(monkeypatch, lambda: None, lambda: set_tag(rig.fresh(), "model-1", pinned))
    assert len(maintenance.expire(writer.table).snapshots()) == 6, "given up until the next time"
    assert _named(rig, "model-1") == pinned
    maintenance.expire(rig.fresh())
    assert _named(rig, "model-1") == pinned
    assert len(rig.fresh().snapshots()) == RETAINED + 1
    writer.land(60)
    rig.assert_exact(60)


def test_a_tag_moved_right_before_the_expiry_is_sent_is_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    first, second = (item.snapshot_id for item in writer.table.snapshots()[:2])
    set_tag(rig.fresh(), "model-1", first)

    def move() -> None:
        rig.fresh().manage_snapshots().remove_tag("model-1").commit()
        rig.fresh().manage_snapshots().create_tag(second, "model-1").commit()

    before_send(monkeypatch, lambda: None, move)
    maintenance.expire(rig.fresh())
    assert _named(rig, "model-1") == second


def test_a_tag_that_comes_after_the_expiry_says_that_the_snapshot_is_gone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    gone = writer.table.snapshots()[1].snapshot_id
    before_send(monkeypatch, lambda: maintenance.expire(rig.fresh()))
    with pytest.raises(CommitError, match="expired"):
        set_tag(rig.fresh(), "model-1", gone)
    assert _named(rig, "model-1") is None
    assert len(rig.fresh().snapshots()) == RETAINED


def test_a_snapshot_goes_when_its_last_tag_is_gone_and_nothing_is_left_of_it(rig: Rig) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    pinned = writer.table.snapshots()[1].snapshot_id
    for name in ("reading", "model-1"):
        set_tag(rig.fresh(), name, pinned)
    remove_tag(rig.fresh(), "reading")
    for _ in range(2):
        maintenance.expire(rig.fresh())
    assert _named(rig, "model-1") == pinned
    remove_tag(rig.fresh(), "model-1")
    for _ in range(2):
        maintenance.expire(rig.fresh())
    assert rig.fresh().snapshot_by_id(pinned) is None
    assert set(rig.fresh().metadata.refs) == {"main"}
    assert len(rig.fresh().snapshots()) == RETAINED


def test_expire_that_meets_another_commit_expires_nothing_and_the_next_run_does(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    stale = writer.table
    before_send(monkeypatch, lambda: None, lambda: writer.land(60))
    seen = maintenance.expire(stale)
    assert len(seen.snapshots()) == 7
    assert len(maintenance.expire(rig.fresh()).snapshots()) == RETAINED
    ids = [row["snapshot_id"] for row in _ledger_rows(rig)]
    assert len(ids) == len(set(ids)) == 4
    rig.assert_exact(60)


def test_expire_or_fail_that_meets_another_commit_tries_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    before_send(monkeypatch, lambda: None, rig.foreign_compaction)
    table = maintenance.expire_or_fail(writer.table)
    assert len(table.snapshots()) == len(rig.fresh().snapshots()) == RETAINED
    ids = [row["snapshot_id"] for row in _ledger_rows(rig)]
    assert len(ids) == len(set(ids)) == 4
    writer.land(60)
    rig.assert_exact(60)


def test_expire_or_fail_that_always_meets_another_commit_ends_and_says_so(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)
    before = {item.snapshot_id for item in writer.table.snapshots()}
    before_send(monkeypatch, *[rig.foreign_compaction] * 50)
    with pytest.raises(CommitConflictError, match=r"market_gaps: .* more than the 3 to keep, .* in each of 5 attempts"):
        maintenance.expire_or_fail(writer.table)
    assert before < {item.snapshot_id for item in rig.fresh().snapshots()}, "nothing was expired"


def test_two_maintainers_copy_each_summary_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, writer = _maintenance(rig), _maintenance(rig), _busy_writer(rig, commits=5)
    before_send(monkeypatch, lambda: second.expire(rig.fresh()))
    first.expire(writer.table)
    ids = [row["snapshot_id"] for row in _ledger_rows(rig)]
    assert len(ids) == len(set(ids)) == 3


def test_expire_summaries_that_cannot_be_copied_expires_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)

    def refuse(*_: object) -> list[object]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commit, "write_data_files", refuse)
    with pytest.raises(CommitError, match="No space left on device"):
        maintenance.expire(writer.table)
    assert len(rig.fresh().snapshots()) == 6


def test_manifests_are_merged_so_that_a_commit_stays_cheap(rig: Rig) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=70)
    maintenance.expire(writer.table)
    head = rig.fresh().current_snapshot()
    assert head is not None
    assert len(head.manifests(writer.table.io)) < 36
    rig.assert_exact(700)


def _maintenance(rig: Rig) -> Maintenance:
    return rig.maintenance(retained=RETAINED)


def _busy_writer(rig: Rig, *, commits: int) -> Writer:
    writer = rig.writer()
    writer.claim()
    for number in range(1, commits + 1):
        writer.land(number * 10)
    return writer


def _named(rig: Rig, tag: str) -> int | None:
    """Return the snapshot that a tag names, if the snapshot is there."""
    reference = rig.fresh().metadata.refs.get(tag)
    if reference is None:
        return None
    assert rig.fresh().snapshot_by_id(reference.snapshot_id) is not None
    return reference.snapshot_id


def _ledger_rows(rig: Rig) -> list[dict[str, object]]:
    ledger: Table = rig.catalog.load_table((rig.settings.namespace, "commits"))
    return ledger.scan().to_arrow().sort_by("snapshot_id").sort_by("ts_committed").to_pylist()
