"""Tags beside a live writer: its next commit lands, expiry keeps what is tagged, and what is gone is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyiceberg.table import Table

from streamforge.errors import CommitConflictError, CommitError, CommitUnknownError
from streamforge.lakehouse import commit
from streamforge.lakehouse.tags import remove_tag, set_tag
from tests.table_rig import Rig, Writer, before_send

TAG = "model-volatility-1"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.fixture
def writer(rig: Rig) -> Writer:
    made = rig.writer()
    made.claim()
    made.land(10)
    return made


def test_a_writer_with_stale_metadata_lands_after_a_tag(rig: Rig, writer: Writer) -> None:
    pinned = _main(rig)
    set_tag(rig.fresh(), TAG, pinned)
    assert writer.land(20).attempts <= 2
    rig.assert_exact(20)
    assert _tagged(rig) == pinned != _main(rig)


def test_a_tag_lands_although_writers_commit_between(rig: Rig, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = _main(rig)
    before_send(monkeypatch, lambda: writer.land(20))
    set_tag(rig.fresh(), TAG, pinned)
    assert _tagged(rig) == pinned
    writer.land(30)
    rig.assert_exact(30)


@pytest.mark.parametrize("error", [CommitConflictError, CommitUnknownError])
@pytest.mark.parametrize("landed", [True, False])
def test_a_tag_whose_answer_is_lost_is_looked_for_and_set_once(
    rig: Rig, writer: Writer, monkeypatch: pytest.MonkeyPatch, error: type[CommitError], *, landed: bool
) -> None:
    real, sends = commit.send_once, 0

    def send(*arguments: Any) -> Table:
        nonlocal sends
        sends += 1
        if landed or sends > 1:
            table = real(*arguments)
        if sends == 1:
            raise error
        return table

    monkeypatch.setattr(commit, "send_once", send)
    set_tag(rig.fresh(), TAG, _main(rig))
    assert _tagged(rig) == _main(rig)
    assert sends == (1 if landed else 2)


def test_a_tag_changes_neither_main_nor_properties(rig: Rig, writer: Writer) -> None:
    before = rig.fresh().metadata
    set_tag(rig.fresh(), TAG, _main(rig))
    after = rig.fresh().metadata
    assert (after.current_snapshot_id, after.properties) == (before.current_snapshot_id, before.properties)
    assert commit.view_of(rig.fresh()).state == commit.view_of(writer.table).state


def test_a_tagged_snapshot_outlives_expiry_until_the_tag_is_removed(rig: Rig, writer: Writer) -> None:
    maintenance, pinned = rig.maintenance(retained=1), _main(rig)
    set_tag(rig.fresh(), TAG, pinned)
    writer.land(20)
    maintenance.expire(rig.fresh())
    assert {item.snapshot_id for item in rig.fresh().snapshots()} == {pinned, _main(rig)}
    assert rig.fresh().scan(snapshot_id=pinned).to_arrow().num_rows == 10
    remove_tag(rig.fresh(), TAG)
    assert _tagged(rig) is None
    writer.land(30)
    for _ in range(2):  # the guard of the tag goes first
        maintenance.expire(rig.fresh())
    assert {item.snapshot_id for item in rig.fresh().snapshots()} == {_main(rig)}
    writer.land(40)
    rig.assert_exact(40)


def test_a_snapshot_outlives_expiry_while_one_tag_takes_over_from_another(rig: Rig, writer: Writer) -> None:
    maintenance, pinned = rig.maintenance(retained=1), _main(rig)
    set_tag(rig.fresh(), "training-now", pinned)
    writer.land(20)
    maintenance.expire(rig.fresh())
    set_tag(rig.fresh(), TAG, pinned)
    remove_tag(rig.fresh(), "training-now")
    for end in (30, 40):
        writer.land(end)
        maintenance.expire(rig.fresh())
    assert _tagged(rig) == pinned
    assert {item.snapshot_id for item in rig.fresh().snapshots()} == {pinned, _main(rig)}
    assert rig.fresh().scan(snapshot_id=pinned).to_arrow().num_rows == 10


def test_setting_and_removing_twice_is_the_same_as_once(rig: Rig, writer: Writer) -> None:
    pinned = _main(rig)
    set_tag(rig.fresh(), TAG, pinned)
    location = rig.fresh().metadata_location
    set_tag(writer.table, TAG, pinned)
    assert rig.fresh().metadata_location == location
    remove_tag(writer.table, TAG)
    remove_tag(writer.table, TAG)
    assert _tagged(rig) is None


def test_a_tag_is_never_moved(rig: Rig, writer: Writer) -> None:
    pinned = _main(rig)
    set_tag(rig.fresh(), TAG, pinned)
    writer.land(20)
    with pytest.raises(CommitError, match=f"{pinned}.*another name"):
        set_tag(rig.fresh(), TAG, _main(rig))
    assert _tagged(rig) == pinned


def test_an_expired_snapshot_cannot_be_tagged(rig: Rig, writer: Writer) -> None:
    gone = _main(rig)
    writer.land(20)
    rig.expire_all_but_last()
    with pytest.raises(CommitError, match="expired"):
        set_tag(writer.table, TAG, gone)


def _main(rig: Rig) -> int:
    snapshot = rig.fresh().current_snapshot()
    assert snapshot is not None
    return snapshot.snapshot_id


def _tagged(rig: Rig) -> int | None:
    reference = rig.fresh().metadata.refs.get(TAG)
    return None if reference is None else reference.snapshot_id
