"""Replays asked for by time or below the log start, of tables that are fed directly, and through the command."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition
from typer.testing import CliRunner

from cli.app import app
from streamforge.errors import PermanentSourceError, RetentionGapError
from streamforge.kafka import admin_client, producer_config
from streamforge.lakehouse.replay import replay
from streamforge.lakehouse.replay_ranges import ranges_by_event_time, ranges_by_produce_time, ranges_of_log
from streamforge.lakehouse.replay_target import open_target
from streamforge.market.records import Bar
from streamforge.offsets import OffsetRange
from streamforge.settings import Settings
from tests.pipeline_support import START_MS, Pipeline, environment, make_pipeline, produce_raw
from tests.replay_support import (
    BTC,
    SteppedLine,
    frames,
    inverted,
    is_within,
    land,
    land_direct,
    raw_range,
    raw_ranges,
    rows_of,
    snapshot_ids,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


def at(second: float) -> datetime:
    return datetime.fromtimestamp(START_MS / 1e3 + second, UTC)


def test_ranges_by_event_time_cover_the_records_of_the_window(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(30)), parse=inverted(lambda _: True))  # one trade each second
    target = open_target(pipeline.settings, pipeline.contracts, "trades")
    ranges = ranges_by_event_time(target, at(10), at(20))
    (whole,) = raw_ranges(pipeline)
    assert ranges == (raw_range(pipeline, whole.partition, 10, 20),)
    replay(pipeline.settings, pipeline.contracts, "trades", ranges)
    assert [n for n, row in enumerate(rows_of(pipeline)) if row["aggressor_side"] == "SELL"] == list(range(10, 20))
    assert ranges_by_event_time(target, at(100), at(200)) == ()


def test_ranges_by_produce_time_are_kafkas(pipeline: Pipeline) -> None:
    target_frames = frames(BTC, range(20))
    produce_raw(pipeline, target_frames[:12])
    (first,) = raw_ranges(pipeline)
    line = SteppedLine(pipeline)
    line.parse()
    line.land()
    # Kafka's times are whole milliseconds: the second part must not be produced in that of `between`.
    between = datetime.now(UTC) + timedelta(milliseconds=1)
    wait_until(lambda: datetime.now(UTC) > between + timedelta(milliseconds=1), what="the next millisecond")
    produce_raw(pipeline, target_frames[12:])
    target = open_target(pipeline.settings, pipeline.contracts, "trades")
    assert ranges_by_produce_time(target, at(-10), between) == (first,)
    later = datetime.fromtimestamp(between.timestamp() + 3600, UTC)
    assert ranges_by_produce_time(target, between, later) == (raw_range(pipeline, first.partition, 12, 20),)
    assert ranges_of_log(target) == (raw_range(pipeline, first.partition, 0, 20),)


def test_replay_below_the_log_start_or_beyond_the_end_is_refused(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(20)))
    (whole,) = raw_ranges(pipeline)
    cut = KafkaTopicPartition(whole.topic, whole.partition, 8)
    admin = admin_client(pipeline.settings)
    admin.delete_records([cut])[cut].result()
    with pytest.raises(
        RetentionGapError, match=r"\[5,8\): Kafka has removed .* table market.raw_trades does not exist"
    ):
        replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, whole.partition, 5, 20)])
    with pytest.raises(PermanentSourceError, match=r"\[8,21\) ends beyond the last stable offset 20"):
        replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, whole.partition, 8, 21)])
    # What Kafka still holds starts inside what the table knows: ids before it are not new.
    again = [raw_range(pipeline, whole.partition, 8, 20)]
    assert replay(pipeline.settings, pipeline.contracts, "trades", again).committed is None


def bar(minute: int) -> Bar:
    start_ns = START_MS * 1_000_000 + minute * 60_000_000_000
    return Bar(
        instrument=BTC, venue="SIM", symbol="BTCUSDT", interval="1m",
        ts_start_ns=start_ns, ts_end_ns=start_ns + 60_000_000_000, replay_epoch=0, revision=0,
        open="1.5", high="2.5", low="0.5", close="2", volume="3", taker_buy_volume="1", quote_volume="4", vwap="1.2",
        trade_count=minute, first_trade_id="1", last_trade_id="2",
        trades_partition=0, trades_start_offset=0, trades_end_offset=9, processor_version="1",
    )  # fmt: skip


def produce_bars(pipeline: Pipeline, minutes: range) -> None:
    """Produce bars in one transaction, on topic-partition 0."""
    config = producer_config(pipeline.settings, transactional_id=f"{pipeline.settings.topic_prefix}bars.0")
    producer = Producer(config)
    producer.init_transactions(30)
    producer.begin_transaction()
    for minute in minutes:
        producer.produce(pipeline.topic("bars"), msgspec.json.encode(bar(minute)), BTC.encode(), partition=0)
    producer.commit_transaction(30)


def test_replay_of_a_table_fed_directly_lands_its_own_range_again_also_when_it_ends_in_a_marker(
    pipeline: Pipeline,
) -> None:
    produce_bars(pipeline, range(10))  # offsets 0 to 9 and the marker at 10
    produce_bars(pipeline, range(10, 20))
    land_direct(pipeline, "bars", wrong=lambda row: {"trade_count": row["trade_count"] * 100})
    before = rows_of(pipeline, "bars")
    assert [row["trade_count"] for row in before] == [n * 100 for n in range(20)]
    ranges = [OffsetRange(pipeline.topic("bars"), 0, 4, 11)]
    report = replay(pipeline.settings, pipeline.contracts, "bars", ranges)
    after = rows_of(pipeline, "bars")
    assert [row["trade_count"] for row in after] == [0, 100, 200, 300, *range(4, 10), *(n * 100 for n in range(10, 20))]
    assert (report.plan.counts.now, report.plan.counts.changed) == (6, 6)
    for old, new in zip(before, after, strict=True):
        assert (new["source_epoch"], new["source_partition"], new["source_offset"], new["source_index"]) == (
            old["source_epoch"], old["source_partition"], old["source_offset"], old["source_index"],
        )  # fmt: skip
        if not is_within(old, ranges, prefix="source"):
            assert new == old
    assert replay(pipeline.settings, pipeline.contracts, "bars", ranges).committed is None


def command(pipeline: Pipeline, *arguments: str) -> Any:
    env = environment(pipeline.settings)
    return CliRunner().invoke(app, ["replay", *arguments], env=env)


def test_replay_command_dry_run_then_replay_then_nothing(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(20)), parse=inverted(lambda t: int(t.trade_id) < 5))
    snapshots = snapshot_ids(pipeline)
    planned = command(pipeline, "trades", "--all", "--dry-run", "-o", "json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert (plan["dry_run"], plan["changes"], plan["rows_changed"], plan["barrier"]["reached"]) == (True, True, 5, True)
    assert snapshot_ids(pipeline) == snapshots
    done = json.loads(command(pipeline, "trades", "--all", "-o", "json").stdout)
    assert done["committed"]
    assert done["committed_snapshot_id"] == snapshot_ids(pipeline)[-1]
    text = command(pipeline, "trades", "--from-time", at(0).isoformat(), "--to-time", at(99).isoformat())
    assert text.exit_code == 0
    assert "every row is already equal, nothing was changed" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["nope", "--all"], 2, "no contract has a table 'nope'; tables are"),
        (["trades"], 2, "say what to replay, one of"),
        (["trades", "--all", "--offsets", "0:0-1"], 2, "say what to replay, one of"),
        (["trades", "--offsets", "0-10"], 2, "must look like PARTITION:START-END"),
        (["trades", "--offsets", "0:10-10"], 2, "START < END"),
        (["trades", "--offsets", "9:0-1"], 2, "has partitions 0 to 1"),
        (["trades", "--offsets", "0:0-1000"], 1, "ends beyond the last stable offset"),
        (["trades", "--from-time", "2026-01-01T00:00:00", "--to-time", "2026-01-02T00:00:00Z"], 2, "offset from UTC"),
        (["trades", "--from-time", "yesterday", "--to-time", "2026-01-02T00:00:00Z"], 2, "must be ISO 8601"),
        (["trades", "--from-time", "2026-01-02T00:00:00Z"], 2, "needs both"),
        (["trades", "--from-time", "2026-01-02T00:00:00Z", "--to-time", "2026-01-01T00:00:00Z"], 2, "must be before"),
        (["trades", "--from-time", "2001-01-01T00:00Z", "--to-time", "2001-01-02T00:00Z"], 2, "nothing to replay"),
    ],
)  # fmt: skip
def test_replay_command_bad_input_says_what_is_wrong(
    line_without_trades: Pipeline, arguments: list[str], exit_code: int, says: str
) -> None:
    result = command(line_without_trades, *arguments)
    assert result.exit_code == exit_code, result.output
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def line_without_trades(broker_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = make_pipeline(broker_settings, tmp_path_factory.mktemp("line"), f"t{uuid.uuid4().hex[:8]}.")
    land(pipeline, [])
    return pipeline
