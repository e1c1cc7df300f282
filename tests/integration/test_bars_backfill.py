"""A backfill of bars: equal to the stream, mends what is wrong, leaves alone what is open, and lands once."""

from __future__ import annotations

import signal
import uuid
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
from pyiceberg.expressions import And, EqualTo

from streamforge.errors import ConfigurationError
from streamforge.lakehouse.bars_backfill import BACKFILL_STEPS, KIND, BackfillReport, Window, backfill_bars, plan_bars
from streamforge.lakehouse.commit import KIND_KEY
from streamforge.settings import Settings
from tests.bars_support import (
    FIRST,
    HOUR,
    LATE,
    SECOND,
    append_bars,
    expected_bars,
    hash_of,
    landed,
    latest_bars,
    market,
    stream,
)
from tests.forked import streamforge
from tests.pipeline_support import (
    Pipeline,
    environment,
    make_pipeline,
    make_trade,
    produce_trades,
    running,
    wait_for_positions,
)
from tests.replay_support import open_table, positions_of, rows_of, snapshot_ids
from tests.table_rig import before_send
from tests.writer_support import running_writer, wait_for_landed, writer_settings

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def streamed(broker_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = make_pipeline(broker_settings, tmp_path_factory.mktemp("bars"), f"t{uuid.uuid4().hex[:8]}.")
    stream(pipeline, market())
    return pipeline


@pytest.fixture
def tables(streamed: Pipeline, tmp_path: Path) -> Pipeline:
    return landed(streamed, tmp_path / "home")


def backfill(tables: Pipeline, window: Window = FIRST) -> BackfillReport:
    return backfill_bars(tables.settings, tables.contracts, window)


def spoil(tables: Pipeline) -> tuple[str, str]:
    """Delete one bar of the first hour and give another a wrong correction; return their instruments."""
    rows = latest_bars(tables, FIRST).to_pylist()
    gone, wrong = rows[0], rows[-1]
    table = open_table(tables, "bars")
    table.delete(And(EqualTo("instrument", gone["instrument"]), EqualTo("ts_start_ns", gone["ts_start_ns"])))
    append_bars(open_table(tables, "bars"), [wrong | {"revision": wrong["revision"] + 1, "close": wrong["low"] / 2}])
    return gone["instrument"], wrong["instrument"]


def test_backfill_of_what_the_stream_made_is_equal_and_makes_no_commit(tables: Pipeline) -> None:
    before = snapshot_ids(tables, "bars")
    report = backfill(tables)
    assert report.committed is None
    assert report.plan.equal == len(expected_bars(tables, FIRST)) > 30
    assert report.plan.hash_built == report.plan.hash_now == hash_of(tables, latest_bars(tables, FIRST))
    assert (report.plan.still_open, report.plan.without_trades) == (0, 0)
    assert snapshot_ids(tables, "bars") == before
    assert any(row["revision"] > 0 for row in rows_of(tables, "bars")), "the stream corrected bars"


def test_backfill_mends_a_deleted_and_a_wrong_bar_in_one_commit_and_then_none(tables: Pipeline) -> None:
    spoil(tables)
    before, positions = snapshot_ids(tables, "bars"), positions_of(tables, "bars")
    report = backfill(tables)
    assert (report.plan.missing, report.plan.different) == (1, 1)
    assert len(snapshot_ids(tables, "bars")) == len(before) + 1
    assert hash_of(tables, latest_bars(tables, FIRST)) == report.plan.hash_built
    assert {
        (row["instrument"], row["ts_start_ns"]): row["trade_count"] for row in latest_bars(tables, FIRST).to_pylist()
    } == {key: bar.trade_count for key, bar in expected_bars(tables, FIRST).items()}
    made = [row for row in rows_of(tables, "bars") if row["replay_epoch"]]
    assert [(row["replay_epoch"], row["revision"], row["commit_id"]) for row in made] == [(1, 0, report.commit_id)] * 2
    assert {row[name] for row in made for name in row if name.startswith("source_")} == {None}
    assert positions_of(tables, "bars") == positions
    assert backfill(tables).committed is None
    assert plan_bars(tables.settings, tables.contracts, FIRST).equal == report.plan.equal + 2


def test_backfill_builds_the_bar_that_a_trade_came_too_late_for_and_leaves_open_bars_alone(tables: Pipeline) -> None:
    table = latest_bars(tables, SECOND)
    report = backfill(tables, SECOND)
    assert (report.plan.missing, report.plan.different) == (0, 1)
    [made] = [row for row in rows_of(tables, "bars") if row["replay_epoch"]]
    assert (made["instrument"], made["ts_start_ns"]) == (LATE, SECOND.start_ns)
    [before] = [r for r in table.to_pylist() if (r["instrument"], r["ts_start_ns"]) == (LATE, SECOND.start_ns)]
    assert made["trade_count"] == before["trade_count"] + 1
    # The last trade is at minute 9: with 1 s out of order and 5 minutes of lateness, bars up to minute 3:59 are final.
    final = {key for key in expected_bars(tables, SECOND) if key[1] < SECOND.start_ns + 3 * 60 * 10**9}
    assert report.plan.equal + 1 == len(final)
    assert report.plan.still_open == len(expected_bars(tables, SECOND)) - len(final)


def test_backfill_leaves_a_wrong_bar_that_is_still_open_to_the_stream(tables: Pipeline) -> None:
    spoil(tables)
    patient = tables._replace(settings=tables.settings.model_copy(update={"bars_allowed_lateness_s": 7_200.0}))
    report = backfill(patient)
    assert report.committed is None
    assert report.plan.still_open == len(expected_bars(tables, FIRST))


def test_backfill_keeps_a_bar_whose_trades_are_gone_and_counts_it(tables: Pipeline) -> None:
    rows = latest_bars(tables, FIRST).to_pylist()
    stray = rows[0] | {"instrument": "GONE-USDT.SIM"}
    append_bars(open_table(tables, "bars"), [stray])
    report = backfill(tables)
    assert (report.committed, report.plan.without_trades) == (None, 1)


def test_two_backfills_at_once_land_a_bar_once(tables: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(tables)
    inner: list[BackfillReport] = []
    before_send(monkeypatch, lambda: inner.append(backfill(tables)))
    outer = backfill(tables)
    assert inner[0].committed is not None
    assert (outer.committed, outer.plans) == (None, 2)
    assert Counter(row["replay_epoch"] for row in rows_of(tables, "bars"))[1] == 2


def test_backfill_killed_at_each_step_lands_once_when_repeated(tables: Pipeline, tmp_path: Path) -> None:
    arguments = ["backfill", "bars", "--from", HOUR.isoformat(), "--to", (HOUR + timedelta(hours=1)).isoformat()]
    for rounds, step in enumerate(BACKFILL_STEPS, 1):
        spoil(tables)
        victim = streamforge(arguments, environment(tables.settings, STREAMFORGE_KILL_AT=step), log=tmp_path / "log")
        assert victim.wait() == -signal.SIGKILL, f"not killed at {step}: {victim.said()}"
        report = backfill(tables)
        assert (report.committed is None) == (step == "backfill.commit_sent")
        assert hash_of(tables, latest_bars(tables, FIRST)) == report.plan.hash_built
        kinds = Counter(
            item.summary[KIND_KEY]
            for item in open_table(tables, "bars").metadata.snapshots
            if item.summary and KIND_KEY in item.summary.additional_properties
        )
        assert kinds[KIND] == rounds


def test_backfills_beside_a_live_writer_all_land_and_the_writer_goes_on(
    broker_settings: Settings, tmp_path: Path
) -> None:
    tables = make_pipeline(broker_settings, tmp_path, f"t{uuid.uuid4().hex[:8]}.")
    stream(tables, market())
    landed(tables, tables.settings.home)
    settings = writer_settings(tables.settings, writer_contracts=("bars",))
    rounds = 4
    with running_writer(settings, tables.contracts) as writer, running(tables, "bars") as bars:
        for number in range(rounds):
            minute_ms = int((HOUR + timedelta(hours=3, minutes=number)).timestamp() * 1000)
            produce_trades(tables, [make_trade(LATE, 10_000 + 10 * number + n, minute_ms + n) for n in range(10)])
            spoil(tables)
            assert backfill(tables).committed is not None
        wait_for_positions(tables, bars, "trades")
        wait_for_landed(settings, tables.contracts, tables.topic("bars"), "bars", writer=writer)
    assert writer.exit_code == 0
    rows = rows_of(tables, "bars")
    revisions = Counter((r["instrument"], r["ts_start_ns"], r["replay_epoch"], r["revision"]) for r in rows)
    assert set(revisions.values()) == {1}
    live = [row for row in rows if row["ts_start_ns"] >= SECOND.end_ns]
    assert len(live) == rounds - 2, "the watermark is 1 s behind the first trades of the last bar"
    assert backfill(tables).committed is None


@pytest.mark.parametrize(
    ("start_s", "end_s", "said"),
    [(0, 0, "holds nothing"), (60, 0, "holds nothing"), (1, 60, "start cuts a bar"), (0, 61, "end cuts a bar")],
)
def test_window_that_is_empty_or_cuts_a_bar_is_refused(start_s: int, end_s: int, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Window.of(HOUR + timedelta(seconds=start_s), HOUR + timedelta(seconds=end_s))
