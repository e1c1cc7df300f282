"""The replay jobs, run for real: what they mend, what they leave alone, and how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from orchestration import replay
from orchestration.replay import DAILY, TABLE_TAG, AskedRanges, window_of, wish_of
from orchestration.tables import HOURLY
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.processes import LOOPBACK, choose_free_port
from tests.dagster_support import Jobs, with_platform
from tests.pipeline_support import Pipeline, RawFrame, trade_frame
from tests.replay_support import BTC, inverted, land, open_table, rows_of, snapshot_ids

pytestmark = pytest.mark.integration

HOURS = [datetime(2024, 5, 6, hour, 30, tzinfo=UTC) for hour in (6, 7, 8)]
KEYS = [f"2024-05-06-0{hour}:00" for hour in (6, 7, 8)]
TRADES_AN_HOUR = 10


@pytest.fixture
def jobs(pipeline: Pipeline) -> Iterator[Jobs]:
    definitions = with_platform(replay.definitions(pipeline.contracts), pipeline.settings, pipeline.contracts)
    with dg.instance_for_test() as instance:
        yield Jobs(definitions, instance)


def frames_at(start: datetime, first_id: int) -> list[RawFrame]:
    """Return trades of BTC, one a second."""
    start_ms = int(start.timestamp() * 1000)
    times_ms = [start_ms + 1000 * number for number in range(TRADES_AN_HOUR)]
    return [
        RawFrame(BTC, trade_frame(BTC, first_id + number, ts_ms=ts_ms), ts_receive_ns=(ts_ms + 1) * 1_000_000)
        for number, ts_ms in enumerate(times_ms)
    ]


def land_wrong(pipeline: Pipeline, hours: list[datetime]) -> None:
    """Land trades of these hours as a parser with a bug made them: the aggressor is inverted."""
    land(
        pipeline,
        *(frames_at(hour, 100 * number) for number, hour in enumerate(hours)),
        parse=inverted(lambda _: True),
    )


def wrong_by_hour(pipeline: Pipeline) -> dict[int, int]:
    """Return how many rows of each hour still have the wrong side: Binance's m: true means that the aggressor sold."""
    rows = rows_of(pipeline)
    hours = {row["ts_event"].hour for row in rows}
    return {h: sum(row["ts_event"].hour == h and row["aggressor_side"] != "SELL" for row in rows) for h in hours}


def test_partition_keys_are_tried_dry_then_mended_and_a_second_time_nothing_changes(
    pipeline: Pipeline, jobs: Jobs
) -> None:
    land_wrong(pipeline, HOURS)
    before = snapshot_ids(pipeline)
    asked = {"partition_keys": KEYS[:1]}
    dry = jobs.run("replay", asked)
    assert dry.success, dry.failure
    assert (dry.metadata["rows_changed"], dry.metadata["changes"], dry.metadata["committed"]) == (10, True, False)
    assert snapshot_ids(pipeline) == before, "a dry run, which is the default, made a commit"

    done = jobs.run("replay", asked | {"dry_run": False})
    assert done.success, done.failure
    assert wrong_by_hour(pipeline) == {6: 0, 7: TRADES_AN_HOUR, 8: TRADES_AN_HOUR}
    assert done.metadata["report"]["committed_snapshot_id"] == snapshot_ids(pipeline)[-1]
    assert done.metadata["hash_now"] != done.metadata["hash_after"] == dry.metadata["hash_after"]

    again = jobs.run("replay", asked | {"dry_run": False})
    assert (again.success, again.metadata["committed"]) == (True, False)
    assert len(snapshot_ids(pipeline)) == len(before) + 1


def test_partitions_of_hours_and_days_replay_their_own_time(pipeline: Pipeline, jobs: Jobs) -> None:
    land_wrong(pipeline, HOURS)
    hour = jobs.run("replay_hours", partition_key=KEYS[1])
    assert hour.success, hour.failure
    assert wrong_by_hour(pipeline) == {6: TRADES_AN_HOUR, 7: 0, 8: TRADES_AN_HOUR}
    quiet = jobs.run("replay_days", partition_key="2024-05-07")
    assert (quiet.success, quiet.metadata["source_records"]) == (True, 0), "a day without trades fails a backfill"
    assert jobs.run("replay_days", partition_key="2024-05-06").success
    assert wrong_by_hour(pipeline) == {6: 0, 7: 0, 8: 0}
    other = jobs.run("replay_hours", partition_key=KEYS[0], tags={TABLE_TAG: "nothing"})
    assert "nothing" in other.failure


def test_configuration_that_the_launchpad_starts_with_runs_as_it_is(pipeline: Pipeline, jobs: Jobs) -> None:
    recent, old = datetime.now(UTC) - timedelta(minutes=10), datetime.now(UTC) - timedelta(minutes=90)
    land_wrong(pipeline, [old, recent])
    ran = jobs.run("replay")
    assert ran.success, ran.failure
    assert (ran.metadata["dry_run"], ran.metadata["rows_now"]) == (True, TRADES_AN_HOUR)
    assert ran.metadata["barrier_reached"]
    assert ran.metadata["engine"] == "local"


def test_offsets_are_of_the_topic_that_the_rows_are_made_from(pipeline: Pipeline, jobs: Jobs) -> None:
    land_wrong(pipeline, HOURS[:1])
    partition = rows_of(pipeline)[0]["raw_partition"]
    ran = jobs.run("replay", {"offsets": [f"{partition}:2-5"], "dry_run": False})
    assert ran.success, ran.failure
    assert (ran.metadata["source_records"], ran.metadata["rows_changed"]) == (3, 3)
    assert wrong_by_hour(pipeline) == {6: TRADES_AN_HOUR - 3}
    beyond = jobs.run("replay", {"offsets": [f"{partition}:2-5000"]})
    assert (beyond.success, beyond.error) == (False, "PermanentSourceError")


def test_missing_table_fails_and_names_it(jobs: Jobs) -> None:
    ran = jobs.run("replay", {"everything": True})
    assert (ran.success, ran.error) == (False, "TableMissingError")
    assert "trades" in ran.failure


def test_broker_that_is_away_fails_the_run_and_changes_nothing(pipeline: Pipeline, jobs: Jobs) -> None:
    ensure_table(open_catalog(pipeline.settings), pipeline.settings, pipeline.contracts["trades"])
    away = pipeline.settings.model_copy(update={"bootstrap_servers": f"{LOOPBACK}:{choose_free_port()}"})
    definitions = with_platform(replay.definitions(pipeline.contracts), away, pipeline.contracts)
    ran = Jobs(definitions, jobs.instance).run("replay", {"everything": True, "dry_run": False})
    assert (ran.success, ran.error) == (False, "RetryableSourceError")
    assert open_table(pipeline).current_snapshot() is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"partition_keys": ["2024-13-01"]}, "found '2024-13-01'"),
        ({"partition_keys": ["2024-05-06-06"]}, "a partition key is a day or an hour in UTC"),
        ({"offsets": ["0:5-5"]}, "half-open"),
        ({"offsets": ["0:1-5"], "everything": True}, "ask for one of"),
        ({"from_time": "2024-05-06T06:00:00Z"}, "needs both from_time and to_time"),
        ({"from_time": "2024-05-06T06:00:00Z", "to_time": "2024-05-06T06:00:00Z"}, "must be before"),
        ({"from_time": "2024-05-06T06:00:00", "to_time": "2024-05-06T07:00:00"}, "does not say its offset from UTC"),
    ],
)
def test_wish_that_cannot_be_understood_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        wish_of(AskedRanges(**asked), datetime.now(UTC))


def test_partition_keys_are_those_of_dagsters_hours_and_days() -> None:
    for partitions, key in ((HOURLY, KEYS[0]), (DAILY, "2024-05-06")):
        window = partitions.time_window_for_partition_key(key)
        assert window_of(key) == (window.start, window.end)
