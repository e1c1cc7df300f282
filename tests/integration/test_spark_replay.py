"""A replay in Spark is the replay in this process: same plan, same rows, one table snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Producer

from streamforge.errors import DataQualityError
from streamforge.kafka import producer_config
from streamforge.lakehouse.commit import KIND_KEY
from streamforge.lakehouse.content_hash import content_hash
from streamforge.lakehouse.replay import KIND, preview, replay
from streamforge.lakehouse.replay_plan import Plan
from streamforge.market.parsing import Parsed, ParserState
from streamforge.market.records import RawRecord
from streamforge.offsets import OffsetRange
from streamforge.spark.replay import SPARK_FROM_RECORDS, EngineChoice, SparkEngine, choose_engine
from streamforge.spark.session import spark_session
from tests.pipeline_support import Pipeline, RawFrame, produce_raw
from tests.replay_support import (
    BTC,
    SteppedLine,
    blind,
    frames,
    inverted,
    land,
    open_table,
    partition_of,
    positions_of,
    raw_range,
    raw_ranges,
    rows_of,
    snapshot_ids,
    with_parser,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.integration
XRP = "XRP-USDT.SIM"
BTC_PARTITION = 1  # XRP lies in the other one


@pytest.fixture
def engine(spark: SparkSession, pipeline: Pipeline) -> SparkEngine:
    return SparkEngine(spark_session(pipeline.settings))


def test_spark_plans_and_replaces_what_the_process_itself_would(pipeline: Pipeline, engine: SparkEngine) -> None:
    """Two topic-partitions, a wrong parser, venue duplicates, undecodable records, an aborted transaction."""
    btc = [*frames(BTC, range(60)), *frames(BTC, range(40, 80))]  # ids 40 to 59 come twice
    btc[30:30] = [RawFrame(BTC, b"{not json"), RawFrame(BTC, b"{}", headers=(("venue", "SIM"),))]
    xrp = frames(XRP, range(90))
    batches = [[*btc[start : start + 25], *xrp[start : start + 25]] for start in range(0, 125, 25)]
    line = SteppedLine(pipeline, inverted(lambda t: int(t.trade_id) % 3 == 0))
    for number, batch in enumerate(batches):
        produce_raw(pipeline, batch)
        if number == 1:
            _abort(pipeline, BTC_PARTITION)
        line.parse()
        line.land()
    part = partition_of(pipeline, BTC)
    assert (part, partition_of(pipeline, XRP)) == (BTC_PARTITION, 1 - BTC_PARTITION)
    # From the middle of the duplicate pairs on; two ranges of one topic-partition, and one of the other.
    some = [raw_range(pipeline, part, 5, 20), raw_range(pipeline, part, 70, 95), raw_range(pipeline, 1 - part, 10, 60)]
    _assert_same_plan(pipeline, engine, some)
    whole = raw_ranges(pipeline)
    here = _assert_same_plan(pipeline, engine, whole)
    assert here.changes
    assert here.dropped == {"duplicates": 20, "malformed_json": 1, "missing_header": 1}

    positions, snapshots = positions_of(pipeline), snapshot_ids(pipeline)
    report = replay(pipeline.settings, pipeline.contracts, "trades", some, engine=engine)
    assert report.engine == "spark"
    assert report.committed is not None
    assert snapshot_ids(pipeline) == [*snapshots, report.committed.snapshot_id], "exactly one new table snapshot"
    assert open_table(pipeline).metadata.snapshot_by_id(report.committed.snapshot_id).summary[KIND_KEY] == KIND
    assert positions_of(pipeline) == positions, "the writer's keys are left alone"
    again = replay(pipeline.settings, pipeline.contracts, "trades", some)
    assert again.committed is None, "the process itself finds every row equal"

    assert replay(pipeline.settings, pipeline.contracts, "trades", whole, engine=engine).committed is not None
    found = content_hash(open_table(pipeline).scan().to_arrow(), pipeline.contracts["trades"].arrow_schema)
    assert replay(pipeline.settings, pipeline.contracts, "trades", whole).committed is None
    assert found.rows == 170
    assert {row["aggressor_side"] for row in rows_of(pipeline)} == {"SELL"}
    assert all(row["source_offset"] is not None for row in rows_of(pipeline)), "typed positions survive"


def test_spark_state_counts_rows_behind_the_range_and_a_range_without_records(
    pipeline: Pipeline, engine: SparkEngine
) -> None:
    """The first record of trade 5 could not be parsed, so the row is that of the second one, at offset 20."""
    land(pipeline, [*frames(BTC, range(20)), *frames(BTC, [5])], parse=blind(lambda record: record.offset == 5))
    part = partition_of(pipeline, BTC)
    end = _abort(pipeline, part)
    plan = _assert_same_plan(pipeline, engine, [raw_range(pipeline, part, 0, 10)])
    assert (plan.changes, plan.dropped) == (False, {"duplicates": 1})
    empty = _assert_same_plan(pipeline, engine, [raw_range(pipeline, part, 21, end)])
    assert (empty.counts.now, empty.counts.after) == (0, 0)
    _assert_same_plan(pipeline, engine, [raw_range(pipeline, part, 0, end)])


def test_spark_task_that_fails_with_an_error_of_ours_gives_that_error_and_changes_nothing(
    pipeline: Pipeline, engine: SparkEngine
) -> None:
    land(pipeline, frames(BTC, range(10)))
    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 10)]
    snapshots = snapshot_ids(pipeline)
    with pytest.raises(DataQualityError, match="no such thing"):
        replay(pipeline.settings, pipeline.contracts, "trades", ranges, engine=engine, recompute=with_parser(_refuse))
    assert snapshot_ids(pipeline) == snapshots


def test_engine_is_chosen_by_size_unless_told(pipeline: Pipeline, spark: SparkSession) -> None:
    def chosen(choice: EngineChoice, records: int) -> str:
        return choose_engine(choice, pipeline.settings, [OffsetRange("t", 0, 0, records)]).name

    assert chosen(EngineChoice.AUTO, SPARK_FROM_RECORDS - 1) == "local"
    assert chosen(EngineChoice.AUTO, SPARK_FROM_RECORDS) == "spark"
    assert chosen(EngineChoice.LOCAL, SPARK_FROM_RECORDS) == "local"
    assert chosen(EngineChoice.SPARK, 1) == "spark"


def _refuse(_state: ParserState, _records: Iterable[RawRecord], *_: object) -> Parsed:
    msg = "no such thing"
    raise DataQualityError(msg)


def _assert_same_plan(pipeline: Pipeline, engine: SparkEngine, ranges: list[OffsetRange]) -> Plan:
    here, _ = preview(pipeline.settings, pipeline.contracts, "trades", ranges)
    there, _ = preview(pipeline.settings, pipeline.contracts, "trades", ranges, engine=engine)
    assert there.as_dict() == here.as_dict()
    assert {each.task.file.file_path for each in there.touched} == {each.task.file.file_path for each in here.touched}
    return here


def _abort(pipeline: Pipeline, partition: int) -> int:
    """Leave an aborted raw record and its marker in the raw topic; return the offset after them."""
    producer = Producer(producer_config(pipeline.settings, transactional_id=f"{pipeline.settings.topic_prefix}mirror"))
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(pipeline.topic("raw-trades"), b"aborted", BTC.encode(), partition=partition)
    producer.flush(30)
    producer.abort_transaction(30)
    return next(each.end for each in raw_ranges(pipeline) if each.partition == partition)
