"""Bars follow a replay: the hours that it changed are marked, their bars are built again, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.declarative_automation.automation_condition_tester import (
    EvaluateAutomationConditionsResult,
)
from dagster._core.definitions.sensor_definition import SensorExecutionData

from assets.bars import BARS_BACKFILL_KEY, REPLAYED_KEY
from assets.catalogue import PLATFORM_RESOURCE
from orchestration import follow, replay, tables
from orchestration.follow import hours_that_replays_changed
from orchestration.resources import Platform
from streamforge.lakehouse import changed_hours
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from tests.dagster_support import Jobs, with_platform
from tests.pipeline_support import Pipeline, RawFrame, trade_frame
from tests.replay_support import BTC, inverted, land, open_table, rows_of

pytestmark = pytest.mark.integration

KEYS = [f"2024-05-06-0{hour}:00" for hour in (6, 7, 8)]
TRADES_AN_HOUR = 10


@pytest.fixture
def jobs(pipeline: Pipeline) -> Iterator[Jobs]:
    parts = (module.definitions(pipeline.contracts) for module in (follow, replay, tables))
    definitions = with_platform(dg.Definitions.merge(*parts), pipeline.settings, pipeline.contracts)
    with dg.instance_for_test() as instance:
        yield Jobs(definitions, instance)


def frames() -> list[RawFrame]:
    """Return trades of BTC in three hours, one a second, all of which sold."""
    starts_ms = [int(datetime(2024, 5, 6, hour, 30, tzinfo=UTC).timestamp() * 1000) for hour in (6, 7, 8)]
    times_ms = [start_ms + 1000 * number for start_ms in starts_ms for number in range(TRADES_AN_HOUR)]
    return [
        RawFrame(BTC, trade_frame(BTC, number, ts_ms=ts_ms), ts_receive_ns=(ts_ms + 1) * 1_000_000)
        for number, ts_ms in enumerate(times_ms)
    ]


def look(pipeline: Pipeline, instance: dg.DagsterInstance, cursor: str | None) -> SensorExecutionData:
    """Let the sensor look, and record what it found, both as the daemon does."""
    resource = Platform(pipeline.settings, pipeline.contracts)
    with dg.build_sensor_context(instance, cursor=cursor, resources={PLATFORM_RESOURCE: resource}) as context:
        result = hours_that_replays_changed.evaluate_tick(context)
    for event in result.asset_events:
        assert isinstance(event, dg.AssetMaterialization)
        instance.report_runless_asset_event(event)
    return result


def conditions(
    jobs: Jobs, before: EvaluateAutomationConditionsResult | None, now: datetime | None = None
) -> EvaluateAutomationConditionsResult:
    """Evaluate what Dagster would have built, going on from the evaluation before."""
    return dg.evaluate_automation_conditions(
        jobs.definitions,
        jobs.instance,
        asset_selection=dg.AssetSelection.assets(BARS_BACKFILL_KEY),
        cursor=None if before is None else before.cursor,
        evaluation_time=now,
    )


def bought(pipeline: Pipeline) -> Mapping[int, set[Any]]:
    """Return the taker buy volumes of the latest bars of each hour."""
    rows = sorted(rows_of(pipeline, "bars"), key=lambda row: (row["replay_epoch"], row["revision"]))
    latest = {row["ts_start_ns"]: row for row in rows}
    hours: dict[int, set[Any]] = {}
    for row in latest.values():
        hours.setdefault(row["ts_start"].hour, set()).add(row["taker_buy_volume"] > 0)
    return hours


def build(jobs: Jobs, first: str, last: str) -> None:
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    assert jobs.run("bars_backfill", tags=tags).success


def test_bars_of_the_hours_that_a_replay_changed_are_built_again_and_no_others(pipeline: Pipeline, jobs: Jobs) -> None:
    # One batch, one data file: the replay of an hour writes the rows of the others again, as they are.
    land(pipeline, frames(), parse=inverted(lambda _: True))
    assert len(list(open_table(pipeline).scan().plan_files())) == 1
    ensure_table(open_catalog(pipeline.settings), pipeline.settings, pipeline.contracts["bars"])
    build(jobs, KEYS[0], KEYS[1])
    assert bought(pipeline) == {6: {True}, 7: {True}}
    first = look(pipeline, jobs.instance, None)
    assert not first.asset_events
    before = conditions(jobs, None)
    assert before.total_requested == 0

    quiet = look(pipeline, jobs.instance, first.cursor)
    assert (quiet.asset_events, quiet.cursor) == ([], first.cursor)
    assert jobs.run("replay", {"partition_keys": [KEYS[1]], "dry_run": False}).success
    found = look(pipeline, jobs.instance, quiet.cursor)
    assert [(each.asset_key, each.partition) for each in found.asset_events] == [(REPLAYED_KEY, KEYS[1])]
    after = conditions(jobs, before)
    assert after.get_requested_partitions(BARS_BACKFILL_KEY) == {KEYS[1]}
    build(jobs, KEYS[1], KEYS[1])
    assert bought(pipeline) == {6: {True}, 7: {False}}

    # Nothing is marked or asked for twice; a replay that changes nothing makes no table snapshot.
    assert jobs.run("replay", {"partition_keys": [KEYS[1]], "dry_run": False}).success
    again = look(pipeline, jobs.instance, found.cursor)
    assert (again.asset_events, again.cursor) == ([], found.cursor)
    later = conditions(jobs, after)
    assert later.total_requested == 0


def test_an_hour_marked_during_its_run_is_built_once_more_and_one_whose_run_failed_later(
    pipeline: Pipeline, jobs: Jobs
) -> None:
    land(pipeline, frames())
    ensure_table(open_catalog(pipeline.settings), pipeline.settings, pipeline.contracts["bars"])
    mark = dg.AssetMaterialization(REPLAYED_KEY, partition=KEYS[1])
    now = datetime(2026, 1, 5, 12, 1, tzinfo=UTC)
    seen = conditions(jobs, None, now)
    jobs.instance.report_runless_asset_event(mark)
    seen = conditions(jobs, seen, now)
    assert seen.get_requested_partitions(BARS_BACKFILL_KEY) == {KEYS[1]}
    seen = conditions(jobs, seen, now)
    assert not seen.total_requested, "asked for twice"
    # The run has read the trades, a replay changes them, the run ends: all before anybody looks again.
    jobs.instance.report_runless_asset_event(mark)
    build(jobs, KEYS[1], KEYS[1])
    seen = conditions(jobs, seen, now)
    assert seen.get_requested_partitions(BARS_BACKFILL_KEY) == {KEYS[1]}
    build(jobs, KEYS[1], KEYS[1])
    seen = conditions(jobs, seen, now)
    assert not seen.total_requested

    open_catalog(pipeline.settings).drop_table((pipeline.settings.namespace, "trades"))
    assert not jobs.run("bars_backfill", partition_key=KEYS[0]).success
    seen = conditions(jobs, seen, now + timedelta(minutes=5))
    assert not seen.total_requested, "tried again at once"
    seen = conditions(jobs, seen, now + timedelta(minutes=30))
    assert seen.get_requested_partitions(BARS_BACKFILL_KEY) == {KEYS[0]}


def test_of_more_rows_than_a_look_can_read_the_hours_of_their_files_are_marked(
    pipeline: Pipeline, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(pipeline, frames(), parse=inverted(lambda _: True))
    first = look(pipeline, jobs.instance, None)
    assert jobs.run("replay", {"partition_keys": [KEYS[1]], "dry_run": False}).success
    monkeypatch.setattr(changed_hours, "MOST_ROWS_COMPARED", 1)
    found = look(pipeline, jobs.instance, first.cursor)
    assert [each.partition for each in found.asset_events] == KEYS


def test_replay_whose_table_snapshot_has_expired_is_not_called_none(pipeline: Pipeline, jobs: Jobs) -> None:
    land(pipeline, frames()[:5], parse=inverted(lambda _: True))
    first = look(pipeline, jobs.instance, None)
    assert jobs.run("replay", {"everything": True, "dry_run": False}).success
    land(pipeline, frames()[5:])
    table = open_table(pipeline)
    table.maintenance.expire_snapshots().by_ids([each.snapshot_id for each in table.snapshots()[:-1]]).commit()
    found = look(pipeline, jobs.instance, first.cursor)
    assert not found.asset_events
    assert "a replay may have been missed" in str(found.skip_message)


def test_without_a_table_nothing_is_known_and_the_place_is_kept(pipeline: Pipeline, jobs: Jobs) -> None:
    result = look(pipeline, jobs.instance, "7")
    assert (result.asset_events, result.cursor) == ([], "7")
    assert "trades" in str(result.skip_message)
