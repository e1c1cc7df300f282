"""The barrier: nothing is planned before the live path has landed the range, and what is behind is said."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from streamforge.errors import RetryableSourceError
from streamforge.lakehouse.barrier import BarrierState
from streamforge.lakehouse.replay import ReplayReport, commit_plan, preview, replay
from streamforge.lakehouse.replay_run import make_plan, write_files
from streamforge.lakehouse.replay_target import open_target, silent
from streamforge.offsets import OffsetRange
from tests.pipeline_support import Pipeline, RawFrame, produce_raw
from tests.replay_support import BTC, SteppedLine, frames, inverted, land, raw_ranges, rows_of
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


def look(pipeline: Pipeline, ranges: list[OffsetRange]) -> BarrierState:
    return open_target(pipeline.settings, pipeline.contracts, "trades").barrier(ranges).look()


def test_barrier_names_who_is_behind_and_by_how_much(pipeline: Pipeline) -> None:
    line = SteppedLine(pipeline)
    produce_raw(pipeline, frames(BTC, range(12)))
    (whole,) = raw_ranges(pipeline)
    with pytest.raises(
        RetryableSourceError,
        match=rf"consumer group \S+parser is at 0 of 12 on \S+raw-trades-{whole.partition}, 12 behind",
    ):
        replay(pipeline.settings, pipeline.contracts, "trades", [whole], wait_s=0)
    line.parse()
    with pytest.raises(RetryableSourceError, match=r"table market\.trades is at 0 of 1\d on \S+trades-\d, 1\d behind"):
        replay(pipeline.settings, pipeline.contracts, "trades", [whole], wait_s=0)
    line.land()
    assert not look(pipeline, [whole]).missing
    assert replay(pipeline.settings, pipeline.contracts, "trades", [whole], wait_s=0).committed is None


def test_barrier_counts_records_whose_commit_markers_are_still_to_come(pipeline: Pipeline) -> None:
    """The parser's offsets become visible before its records; the last stable offset is then too low an end."""
    line = SteppedLine(pipeline)
    produce_raw(pipeline, frames(BTC, range(8)))
    (whole,) = raw_ranges(pipeline)
    line.parse(commit=False)
    missing = look(pipeline, [whole]).missing
    assert [each.who for each in missing] == ["table market.trades"]
    assert missing[0].behind >= 8
    line.finish()
    line.land()
    assert not look(pipeline, [whole]).missing


def test_replay_waits_at_the_barrier_until_the_range_is_landed(pipeline: Pipeline) -> None:
    line = SteppedLine(pipeline, inverted(lambda _: True))
    produce_raw(pipeline, frames(BTC, range(20)))
    (whole,) = raw_ranges(pipeline)
    told: Counter[str] = Counter()
    reports: list[ReplayReport] = []

    def tell(stage: str, done: int, total: int) -> None:
        told[stage] += 1

    def run() -> None:
        reports.append(replay(pipeline.settings, pipeline.contracts, "trades", [whole], progress=tell))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: told["barrier"] > 2, what="the replay waits")
    line.parse()
    at_least = told["barrier"] + 2
    wait_until(lambda: told["barrier"] > at_least, what="the replay still waits, for the table")
    assert set(told) == {"barrier"}, "nothing is planned before"
    line.land()
    thread.join(60)
    assert reports[0].plan.counts.changed == 20
    assert {row["aggressor_side"] for row in rows_of(pipeline)} == {"SELL"}
    assert all(row["source_offset"] is not None for row in rows_of(pipeline))


def test_without_the_barrier_a_replay_doubles_what_is_still_under_way(pipeline: Pipeline) -> None:
    line = SteppedLine(pipeline)
    produce_raw(pipeline, frames(BTC, range(10)))
    line.parse()
    target = open_target(pipeline.settings, pipeline.contracts, "trades")
    table = target.load()
    plan = make_plan(target, table, raw_ranges(pipeline), silent)
    commit_plan(target, table, plan, write_files(target, table, plan, "early", silent), "early")
    line.land()
    found = Counter(row["trade_id"] for row in rows_of(pipeline))
    assert found == {str(n): 2 for n in range(10)}, "this is what the barrier is there for"


def test_preview_before_the_barrier_is_reached_says_so(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(5)))
    produce_raw(pipeline, [RawFrame(BTC, frame.payload) for frame in frames(BTC, range(5, 9))])
    plan, barrier = preview(pipeline.settings, pipeline.contracts, "trades", raw_ranges(pipeline))
    assert [(each.needed, each.reached, each.behind) for each in barrier.missing] == [(9, 5, 4)]
    assert (plan.counts.now, plan.counts.after) == (5, 9)
