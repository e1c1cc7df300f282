"""Bounded snapshots: summaries are copied once, tags stay, and a writer goes on beside it."""

from __future__ import annotations

import json

import pytest
from pyiceberg.table import Table

from streamforge.contracts import load_contracts
from streamforge.errors import CommitError
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import ensure_table
from streamforge.lakehouse.maintenance import Maintenance
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


def test_two_maintainers_copy_each_summary_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, writer = _maintenance(rig), _maintenance(rig), _busy_writer(rig, commits=5)
    before_send(monkeypatch, lambda: second.expire(rig.fresh()))
    first.expire(writer.table)
    ids = [row["snapshot_id"] for row in _ledger_rows(rig)]
    assert len(ids) == len(set(ids)) == 3


def test_expire_summaries_that_cannot_be_copied_expires_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    maintenance, writer = _maintenance(rig), _busy_writer(rig, commits=5)

    def refuse(*_: object) -> list[object]:
        msg = "no space"
        raise CommitError(msg)

    monkeypatch.setattr(commit, "write_data_files", refuse)
    with pytest.raises(CommitError):
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
    contract = load_contracts(rig.settings.contracts_dir)["commits"]
    return Maintenance(ensure_table(rig.catalog, rig.settings, contract), contract, retained=RETAINED)


def _busy_writer(rig: Rig, *, commits: int) -> Writer:
    writer = rig.writer()
    writer.claim()
    for number in range(1, commits + 1):
        writer.land(number * 10)
    return writer


def _ledger_rows(rig: Rig) -> list[dict[str, object]]:
    ledger: Table = rig.catalog.load_table((rig.settings.namespace, "commits"))
    return ledger.scan().to_arrow().sort_by("snapshot_id").sort_by("ts_committed").to_pylist()
