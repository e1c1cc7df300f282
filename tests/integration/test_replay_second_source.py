"""Replay where Kafka's retention has dropped a range: the raw table gives the same rows, or the replay is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pyiceberg.table import Table
from typer.testing import CliRunner

from cli.app import app
from streamforge.errors import ConfigurationError, RetentionGapError
from streamforge.lakehouse import commit, raw_table
from streamforge.lakehouse.kafka_reader import topic_identity
from streamforge.lakehouse.pipeline_gaps import record_gaps
from streamforge.lakehouse.raw_table import RawTable
from streamforge.lakehouse.replay import preview, replay
from streamforge.lakehouse.replay_plan import Plan
from streamforge.lakehouse.replay_target import open_target
from streamforge.market.records import raw_record
from streamforge.offsets import OffsetRange
from streamforge.spark.replay import EngineChoice, choose_engine
from tests.gaps_support import GAP
from tests.pipeline_support import Pipeline, RawFrame, committed, environment
from tests.replay_support import (
    BTC,
    OTHERS,
    cut,
    frames,
    inverted,
    land,
    land_direct,
    open_table,
    partition_of,
    raw_range,
    raw_ranges,
    rows_of,
)

pytestmark = pytest.mark.integration


def looked(pipeline: Pipeline, ranges: list[OffsetRange]) -> Plan:
    return preview(pipeline.settings, pipeline.contracts, "trades", ranges)[0]


def outcome(plan: Plan) -> object:
    return (plan.hash_now, plan.hash_after, plan.counts, dict(plan.dropped))


def test_replay_is_the_same_from_kafka_from_the_raw_table_and_from_both(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_table, "WINDOW_OFFSETS", 12)  # several windows; both of a pair of ids lie in one
    odd = RawFrame(BTC, b'\xff\x00 not "JSON"\n')
    btc = [*frames(BTC, range(20)), *frames(BTC, range(10, 30)), odd, *frames(BTC, range(30, 40))]  # 10 ids come twice
    others = [frame for name in OTHERS for frame in frames(name, range(25))]
    land(pipeline, [*btc, *others], parse=inverted(lambda t: int(t.trade_id) % 3 == 0))
    land_direct(pipeline, "raw-trades")
    turn_around(open_table(pipeline, "raw-trades"))
    partition = partition_of(pipeline, BTC)
    here, there = sorted(raw_ranges(pipeline), key=lambda each: each.partition != partition)
    ranges = sorted([raw_range(pipeline, partition, 15, here.end), there])

    kafka_only = looked(pipeline, ranges)
    assert kafka_only.from_table == ()
    cut(pipeline, partition, 33)
    both = looked(pipeline, ranges)
    assert both.from_table == (raw_range(pipeline, partition, 15, 33),)
    assert both.as_dict()["sources"]["kafka"][f"{pipeline.topic('raw-trades')}-{partition}"] == [[33, here.end]]
    for each in ranges:
        cut(pipeline, each.partition, each.end)
    table_only = looked(pipeline, ranges)
    assert set(table_only.from_table) == set(ranges)

    assert outcome(kafka_only) == outcome(both) == outcome(table_only)
    assert kafka_only.dropped == {"duplicates": 10, "malformed_json": 1}
    assert kafka_only.counts.changed

    report = replay(pipeline.settings, pipeline.contracts, "trades", ranges)
    assert report.plan.hash_after == kafka_only.hash_after
    wrong = {row["trade_id"] for row in rows_of(pipeline) if row["aggressor_side"] != "SELL"}
    assert wrong == {str(n) for n in range(0, 15, 3)}, "what lies before the range stays as it was"
    assert replay(pipeline.settings, pipeline.contracts, "trades", ranges).committed is None


def turn_around(table: Table) -> None:
    """Write all rows into new files in another order, as a compaction by someone else may do."""
    removed = [task.file for task in table.scan().plan_files()]
    rows = table.scan().to_arrow().sort_by([("source_offset", "descending")])
    halves = [rows.slice(0, rows.num_rows // 2), rows.slice(rows.num_rows // 2)]
    added = [file for half in halves for file in commit.write_data_files(table, half)]
    commit.commit_snapshot(table, decide=lambda _: {}, added=added, removed=removed)


def test_record_of_the_raw_table_is_the_record_that_kafka_gave(pipeline: Pipeline) -> None:
    land(pipeline, [*frames(BTC, range(3)), RawFrame(BTC, b""), RawFrame(BTC, bytes(range(256)))])
    land_direct(pipeline, "raw-trades")
    [whole] = raw_ranges(pipeline)
    target = open_target(pipeline.settings, pipeline.contracts, "trades")
    read = [message for part in RawTable.of(target, whole).read(whole) for message in part]
    topic_id = topic_identity(pipeline.settings, whole.topic).topic_id
    expected = [raw_record(topic_id, message) for message in committed(pipeline, "raw-trades")]
    assert [raw_record(topic_id, message) for message in read] == expected
    assert len(expected) == 5


def test_range_that_the_raw_table_does_not_have_either_is_refused(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(20)))
    land_direct(pipeline, "raw-trades")
    [whole] = raw_ranges(pipeline)
    cut(pipeline, whole.partition, 10)
    target = open_target(pipeline.settings, pipeline.contracts, "trades")
    assert target.checked([whole]) == (whole,)

    gap = replace(
        GAP,
        consumer="market.raw_trades",
        topic=whole.topic,
        topic_id=target.source.topic_id,
        source_partition=whole.partition,
        start_offset=2,
        end_offset=5,
    )
    elsewhere = replace(gap, consumer="market.trades")
    record_gaps(pipeline.settings, pipeline.contracts, [elsewhere])
    assert target.checked([whole]) == (whole,), "a gap of the table itself is what a replay mends"
    record_gaps(pipeline.settings, pipeline.contracts, [gap])
    with pytest.raises(RetentionGapError, match=r"\[0,10\).*raw_trades never had offsets \[2,5\)"):
        target.checked([whole])
    behind = raw_range(pipeline, whole.partition, 5, 20)
    assert target.checked([behind]) == (behind,)

    open_table(pipeline, "raw-trades").delete("source_offset == 7")
    with pytest.raises(RetentionGapError, match=r"lacks 1 records that rows of market.trades were made of.*offset 7"):
        replay(pipeline.settings, pipeline.contracts, "trades", [behind])
    assert len(rows_of(pipeline)) == 20, "no row went for want of its record"


def test_raw_table_that_is_behind_is_no_source(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(5)))
    land_direct(pipeline, "raw-trades")
    land(pipeline, frames(BTC, range(5, 20)))
    [whole] = raw_ranges(pipeline)
    cut(pipeline, whole.partition, 8)
    target = open_target(pipeline.settings, pipeline.contracts, "trades")
    with pytest.raises(RetentionGapError, match=r"\[0,8\).*raw_trades has landed .* up to offset 5 only"):
        target.checked([whole])


def test_replay_command_says_which_source_each_range_comes_from(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(20)))
    land_direct(pipeline, "raw-trades")
    [whole] = raw_ranges(pipeline)
    cut(pipeline, whole.partition, 12)
    env = environment(pipeline.settings)
    offsets = ["replay", "trades", "--offsets", f"{whole.partition}:0-20", "--dry-run"]
    found = json.loads(CliRunner().invoke(app, [*offsets, "-o", "json"], env=env).stdout)
    item = str(whole.topic_partition)
    assert found["sources"] == {"table": {item: [[0, 12]]}, "kafka": {item: [[12, 20]]}}
    said = CliRunner().invoke(app, offsets, env=env).stdout
    assert f"{item} [0, 12) from the raw table" in said
    assert f"{item} [12, 20) from Kafka" in said


def test_spark_is_refused_where_a_part_comes_from_the_raw_table_and_not_chosen_of_its_own_accord(
    pipeline: Pipeline,
) -> None:
    large = [OffsetRange("raw-trades", 0, 0, 10**9)]
    with pytest.raises(ConfigurationError, match="--engine local"):
        choose_engine(EngineChoice.SPARK, pipeline.settings, large, from_table=large)
    assert choose_engine(EngineChoice.AUTO, pipeline.settings, large, from_table=large).name == "local"
