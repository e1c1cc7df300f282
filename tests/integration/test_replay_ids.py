"""Replays and trade ids: none is forgotten, none lands twice unseen, and the live parser's limits hold everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import pytest
from typer.testing import CliRunner

from cli.app import app
from streamforge.errors import ConfigurationError, DataQualityError
from streamforge.lakehouse.replay import StalePlanError, preview, replay
from streamforge.lakehouse.replay_target import Progress
from streamforge.lakehouse.verify import verify_tables
from streamforge.market.dedupe import MAX_INTERVALS, SeenIds
from streamforge.market.parsing import parse_records
from streamforge.settings import Settings
from tests.pipeline_support import Pipeline, RawFrame, environment, produce_raw, trade_frame
from tests.replay_support import (
    BTC,
    SteppedLine,
    blind,
    frames,
    inverted,
    land,
    partition_of,
    raw_range,
    raw_ranges,
    rows_of,
    snapshot_ids,
    with_parser,
)

pytestmark = pytest.mark.integration


def ids_of(pipeline: Pipeline) -> list[int]:
    return [int(row["trade_id"]) for row in rows_of(pipeline)]


def unexpected(pipeline: Pipeline, settings: Settings | None = None) -> dict[str, int]:
    """Return the findings of verify for `trades`; every other finding fails."""
    found = verify_tables(settings or pipeline.settings, pipeline.contracts, ["trades"])
    assert not any(item.tally.lost or item.tally.doubled or item.tally.different for item in found), found
    return {item.against: item.tally.unexpected for item in found}


def once(stage: str, act: Callable[[], object]) -> Progress:
    """Return a listener that acts one time, at the end of a stage."""
    left = [act]

    def hear(name: str, done: int, total: int) -> None:
        if name == stage and done == total and left:
            left.pop()()

    return hear


def test_replay_of_an_old_range_with_many_gaps_behind_it_keeps_its_rows(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, [*range(50), *range(100, 100 + 2 * (MAX_INTERVALS + 2), 2)]))
    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 50)]
    report = replay(pipeline.settings, pipeline.contracts, "trades", ranges)
    assert report.committed is None
    assert (report.plan.counts.equal, dict(report.plan.dropped)) == (50, {})
    assert unexpected(pipeline) == {"typed": 0, "raw": 0}


def test_replay_whose_parser_forgets_ids_is_refused_before_rows_go(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(20)))
    snapshots = snapshot_ids(pipeline)
    forgets = with_parser(lambda _, records: parse_records({BTC: SeenIds.from_text("[10]")}, records))
    with pytest.raises(DataQualityError, match="refused 10 trades as too_old_to_dedupe"):
        replay(pipeline.settings, pipeline.contracts, "trades", raw_ranges(pipeline), recompute=forgets)
    assert snapshot_ids(pipeline) == snapshots


def test_replay_is_planned_again_when_the_venue_repeats_a_trade_that_it_adds(pipeline: Pipeline) -> None:
    line = SteppedLine(pipeline, blind(lambda record: record.offset == 5))
    produce_raw(pipeline, frames(BTC, range(20)))
    line.parse()
    line.land()

    def repeat() -> None:
        produce_raw(pipeline, frames(BTC, [5]))
        line.parse()
        line.land()

    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 10)]
    report = replay(pipeline.settings, pipeline.contracts, "trades", ranges, progress=once("write", repeat))
    assert sorted(ids_of(pipeline)) == list(range(20)), "nothing twice"
    assert (report.plans, report.committed) == (2, None)


def test_replay_gives_up_with_a_conflict_when_the_rows_it_adds_always_land_first(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamforge.lakehouse.replay.PLANS_MAX", 1)
    line = SteppedLine(pipeline, blind(lambda record: record.offset == 5))
    produce_raw(pipeline, frames(BTC, range(20)))
    line.parse()
    line.land()

    def repeat() -> None:
        produce_raw(pipeline, frames(BTC, [5]))
        line.parse()
        line.land()

    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 10)]
    with pytest.raises(StalePlanError, match=r"1 rows that the replay adds landed meanwhile .*BTC-USDT.SIM 5"):
        replay(pipeline.settings, pipeline.contracts, "trades", ranges, progress=once("write", repeat))
    assert sorted(ids_of(pipeline)) == list(range(20))


@pytest.mark.parametrize("adds", [True, False])
def test_commits_that_bring_other_trades_do_not_make_a_replay_plan_again(pipeline: Pipeline, adds: bool) -> None:
    parse = blind(lambda record: record.offset == 5) if adds else inverted(lambda trade: trade.trade_id == "5")
    line = SteppedLine(pipeline, parse)
    produce_raw(pipeline, frames(BTC, range(20)))
    line.parse()
    line.land()

    def more() -> None:
        for start in (20, 30):
            produce_raw(pipeline, frames(BTC, range(start, start + 10)))
            line.parse()
            line.land()

    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 10)]
    report = replay(pipeline.settings, pipeline.contracts, "trades", ranges, progress=once("write", more))
    assert (report.plans, report.plan.counts.added, report.plan.counts.changed) == (1, int(adds), int(not adds))
    assert (report.plan.warning is not None) == adds
    assert ids_of(pipeline) == list(range(40))


def test_a_trade_that_a_replay_added_and_the_venue_repeats_is_announced_found_and_mended(pipeline: Pipeline) -> None:
    line = SteppedLine(pipeline, blind(lambda record: record.offset == 5))
    produce_raw(pipeline, frames(BTC, range(20)))
    line.parse()
    line.land()
    ranges = f"{partition_of(pipeline, BTC)}:0-10"
    env = environment(pipeline.settings)
    planned = CliRunner().invoke(app, ["replay", "trades", "--offsets", ranges, "--dry-run"], env=env)
    assert "the live parser does not know the 1 ids" in " ".join(planned.stdout.split())
    done = CliRunner().invoke(app, ["replay", "trades", "--offsets", ranges, "-o", "json"], env=env)
    assert json.loads(done.stdout)["warning"].startswith("the live parser does not know the 1 ids")
    assert unexpected(pipeline) == {"typed": 0, "raw": 0}

    produce_raw(pipeline, frames(BTC, [5]))
    line.parse()
    line.land()
    assert ids_of(pipeline).count(5) == 2, "the limit that decision 0023 records"
    assert unexpected(pipeline) == {"typed": 0, "raw": 1}
    report = replay(pipeline.settings, pipeline.contracts, "trades", raw_ranges(pipeline))
    assert report.plan.counts.gone == 1
    assert ids_of(pipeline) == list(range(20))
    assert unexpected(pipeline) == {"typed": 0, "raw": 0}


def test_replay_and_verify_have_the_live_parsers_limits(pipeline: Pipeline) -> None:
    settings = pipeline.settings.model_copy(update={"parser_max_event_ahead_s": 600.0})
    ahead = [
        RawFrame(BTC, trade_frame(BTC, n, ts_ms=1_700_000_300_000), ts_receive_ns=1_700_000_000_000_000_000)
        for n in range(5)
    ]
    land(pipeline, ahead, parse=partial(parse_records, limits=settings.parser_limits))
    assert len(rows_of(pipeline)) == 5
    assert replay(settings, pipeline.contracts, "trades", raw_ranges(pipeline)).committed is None
    assert unexpected(pipeline, settings) == {"typed": 0, "raw": 0}
    env = environment(settings, STREAMFORGE_PARSER_MAX_EVENT_AHEAD_S="600")
    for arguments in (["replay", "trades", "--all", "-o", "json"], ["verify", "trades", "-o", "json"]):
        result = CliRunner().invoke(app, arguments, env=env)
        assert result.exit_code == 0, result.output
    plan, _ = preview(pipeline.settings, pipeline.contracts, "trades", raw_ranges(pipeline))
    assert plan.counts.gone == 5, "with the default limit they are no trades"


def test_replay_of_ranges_that_hold_nothing_is_refused(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(3)))
    for ranges in ([], [raw_range(pipeline, 0, 1, 1)]):
        with pytest.raises(ConfigurationError, match="nothing to replay in trades"):
            replay(pipeline.settings, pipeline.contracts, "trades", ranges)
        with pytest.raises(ConfigurationError, match="found none"):
            preview(pipeline.settings, pipeline.contracts, "trades", ranges)
