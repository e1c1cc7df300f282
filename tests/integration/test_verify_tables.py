"""`verify` finds what was planted: a lost row, a doubled row, a changed value, a trade that the parser never made."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from confluent_kafka import Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition
from confluent_kafka.admin import AdminClient
from pyiceberg.expressions import EqualTo
from typer.testing import CliRunner

from cli.app import app
from streamforge.dead_letters import make_dead_letter
from streamforge.errors import ConfigurationError, TopicIdentityError
from streamforge.kafka import producer_config
from streamforge.lakehouse.kafka_reader import topic_identity
from streamforge.lakehouse.replay import replay
from streamforge.lakehouse.verify import Comparison, verify_tables
from streamforge.log_reader import log_ends
from streamforge.market.records import RAW_HEADERS
from tests.object_store import on_both_stores
from tests.pipeline_support import Pipeline, RawFrame, environment, produce_raw
from tests.replay_support import (
    BTC,
    ETH,
    SteppedLine,
    forgetful,
    frames,
    inverted,
    land,
    open_table,
    partition_of,
    raw_range,
    rows_of,
)

pytestmark = pytest.mark.integration
COUNT = 40


def _both(ids: range = range(COUNT // 2)) -> list[RawFrame]:
    return [*frames(BTC, ids), *frames(ETH, ids)]


def _verify(pipeline: Pipeline, **options: Any) -> dict[str, Comparison]:
    found = verify_tables(pipeline.settings, pipeline.contracts, ["trades"], **options)
    return {item.against: item for item in found}


def _findings(item: Comparison) -> dict[str, int]:
    tally = item.tally
    counts = {name: getattr(tally, name) for name in ("lost", "doubled", "different", "unexpected")}
    return {name: count for name, count in counts.items() if count}


def _place(row: dict[str, Any], prefix: str) -> str:
    return ":".join(str(row[f"{prefix}_{part}"]) for part in ("partition", "offset", "index"))


@on_both_stores
def test_a_clean_table_is_clean_and_everything_was_compared(pipeline: Pipeline) -> None:
    land(pipeline, _both(range(10)), _both(range(10, COUNT // 2)))
    found = _verify(pipeline)
    for item in found.values():
        assert (item.tally.records, item.tally.rows, _findings(item)) == (COUNT, COUNT, {})
        assert (item.not_landed, item.below_log_start, item.other_sources) == (0, 0, 0)


def test_a_lost_row_is_found_in_both_comparisons_with_its_place(pipeline: Pipeline) -> None:
    land(pipeline, _both())
    victim = rows_of(pipeline)[7]
    open_table(pipeline).delete(_is(victim))
    found = _verify(pipeline)
    assert {name: _findings(item) for name, item in found.items()} == {"typed": {"lost": 1}, "raw": {"lost": 1}}
    assert found["raw"].tally.examples["lost"] == [_place(victim, "raw")]
    assert found["typed"].tally.examples["lost"] == [_place(victim, "raw")]


def test_a_doubled_row_is_found(pipeline: Pipeline) -> None:
    land(pipeline, _both())
    victim = rows_of(pipeline)[3]
    table = open_table(pipeline)
    table.append(table.scan(row_filter=_is(victim)).to_arrow())
    found = _verify(pipeline)
    assert {name: _findings(item) for name, item in found.items()} == {"typed": {"doubled": 1}, "raw": {"doubled": 1}}
    assert found["typed"].tally.examples["doubled"] == [_place(victim, "source")]


def test_a_changed_value_is_found_by_raw(pipeline: Pipeline) -> None:
    land(pipeline, _both())
    victim = rows_of(pipeline)[5]
    _rewrite(pipeline, victim, size=victim["size"] * 2)
    found = _verify(pipeline)
    assert _findings(found["raw"]) == {"different": 1}
    assert found["raw"].tally.examples["different"] == [_place(victim, "raw")]


def test_a_row_that_no_record_has_is_found(pipeline: Pipeline) -> None:
    land(pipeline, _both())
    victim = rows_of(pipeline)[5]
    _rewrite(pipeline, victim, keep=True, source_offset=10_000, raw_offset=10_000, raw_index=2)
    found = _verify(pipeline)
    # Raw is compared up to what the parser has read; the typed topic ends where the table ends.
    assert _findings(found["typed"]) == {"unexpected": 1}
    _rewrite(pipeline, victim, keep=True, source_offset=None, source_partition=None, raw_index=2)
    assert _findings(_verify(pipeline)["raw"]) == {"unexpected": 1}


def test_a_trade_that_the_parser_lost_is_found_by_raw_alone(pipeline: Pipeline) -> None:
    land(pipeline, _both(), parse=forgetful(lambda trade: trade.trade_id == "4"))
    found = _verify(pipeline)
    assert _findings(found["typed"]) == {}
    assert _findings(found["raw"]) == {"lost": 2}


def test_a_trade_that_the_parser_got_wrong_is_found_by_raw_and_gone_after_a_replay(pipeline: Pipeline) -> None:
    land(pipeline, _both(), parse=inverted(lambda trade: trade.trade_id == "4"))
    found = _verify(pipeline)
    assert (_findings(found["typed"]), _findings(found["raw"])) == ({}, {"different": 2})
    ends = log_ends(pipeline.settings, pipeline.partitions("raw-trades"))
    ranges = [raw_range(pipeline, item.partition, 0, end) for item, end in ends.items() if end]
    replay(pipeline.settings, pipeline.contracts, "trades", ranges)
    found = _verify(pipeline)
    assert all(item.tally.is_clean for item in found.values()), [item.as_dict() for item in found.values()]


def test_rows_that_a_replay_made_again_without_typed_place_are_not_lost(pipeline: Pipeline) -> None:
    land(pipeline, _both())
    victim = rows_of(pipeline)[5]
    _rewrite(pipeline, victim, source_offset=None, source_partition=None, source_epoch=None, source_index=None)
    found = _verify(pipeline)
    assert all(item.tally.is_clean for item in found.values()), [item.as_dict() for item in found.values()]
    assert found["typed"].other_sources == 1


def test_a_refused_record_without_dead_letter_is_lost_and_with_one_is_counted(pipeline: Pipeline) -> None:
    land(pipeline, [*_both(), RawFrame(BTC, b"{")])
    found = _verify(pipeline)
    assert _findings(found["raw"]) == {"lost": 1}
    place = found["raw"].tally.examples["lost"][0]
    _dead_letter(pipeline, place, index=0, topic_id="another")
    assert _findings(_verify(pipeline)["raw"]) == {"lost": 1}, "the letter is of another topic of that name"
    for _ in range(2):
        _dead_letter(pipeline, place, index=0)
    found = _verify(pipeline)
    assert (_findings(found["raw"]), found["raw"].dead_letters) == ({}, 1)


def test_what_is_not_landed_is_lag_and_not_lost(pipeline: Pipeline) -> None:
    line = SteppedLine(pipeline)
    produce_raw(pipeline, _both(range(10)))
    line.parse()
    line.land()
    produce_raw(pipeline, _both(range(10, 20)))
    found = _verify(pipeline)
    assert all(item.tally.is_clean for item in found.values())
    line.parse()
    found = _verify(pipeline, wait_s=0.5)
    assert all(item.tally.is_clean for item in found.values())
    assert found["typed"].not_landed >= 20
    assert (found["typed"].tally.records, found["raw"].tally.records) == (20, 20)
    line.land()
    found = _verify(pipeline)
    assert (found["typed"].not_landed, found["raw"].tally.records, found["raw"].tally.rows) == (0, 40, 40)


def test_what_retention_removed_is_said_and_venue_duplicates_across_the_cut_stay_out(
    pipeline: Pipeline, admin: AdminClient
) -> None:
    land(pipeline, [*frames(BTC, range(20)), *frames(BTC, [3, 4])], frames(BTC, range(20, 25)))
    partition = partition_of(pipeline, BTC)
    raw, typed = (KafkaTopicPartition(pipeline.topic(name), partition, 10) for name in ("raw-trades", "trades"))
    for future in admin.delete_records([raw, typed]).values():
        future.result()
    found = _verify(pipeline)
    assert all(item.tally.is_clean for item in found.values()), [item.as_dict() for item in found.values()]
    assert found["raw"].below_log_start == found["typed"].below_log_start == 10
    assert (found["raw"].tally.records, found["raw"].tally.rows) == (15, 15)
    victim = rows_of(pipeline)[2]
    table = open_table(pipeline)
    table.append(table.scan(row_filter=_is(victim)).to_arrow())
    assert _findings(_verify(pipeline)["raw"]) == {"doubled": 1}, "doubles are seen without Kafka"


def test_a_recreated_topic_is_refused(pipeline: Pipeline) -> None:
    land(pipeline, _both(range(3)))
    table = open_table(pipeline)
    [key] = [name for name in table.properties if name.startswith("streamforge.source.")]
    old = json.loads(table.properties[key])
    with table.transaction() as transaction:
        transaction.set_properties({key: json.dumps(old | {"topic_id": "other"})})
    with pytest.raises(TopicIdentityError, match="streamforge rebind"):
        _verify(pipeline)


@pytest.mark.parametrize("name", ["nothing", "commits"])
def test_tables_without_topic_are_refused(pipeline: Pipeline, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no contract has a table|not fed from a topic"):
        verify_tables(pipeline.settings, pipeline.contracts, [name])


def test_command_prints_json_and_exits_with_1_when_a_row_is_lost(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(pipeline.settings).items():
        monkeypatch.setenv(name, value)
    land(pipeline, _both())
    done = CliRunner().invoke(app, ["verify", "trades", "--output", "json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ok"] is True
    open_table(pipeline).delete(_is(rows_of(pipeline)[0]))
    done = CliRunner().invoke(app, ["verify", "trades", "--output", "json"])
    result = json.loads(done.stdout)
    assert (done.exit_code, result["ok"], result["lost"], result["doubled"]) == (1, False, 1, 0)
    done = CliRunner().invoke(app, ["verify", "trades"])
    assert (done.exit_code, "NOT clean" in done.stdout) == (1, True)


@pytest.mark.parametrize("arguments", [["nothing"], ["--wait-s", "-1"], ["--ledger", "absent"], ["--output", "xml"]])
def test_command_with_bad_input_exits_with_2(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    for name, value in environment(pipeline.settings).items():
        monkeypatch.setenv(name, value)
    land(pipeline, _both(range(2)))
    done = CliRunner().invoke(app, ["verify", *([] if arguments[0] == "nothing" else ["trades"]), *arguments])
    assert (done.exit_code, "Traceback" in done.output) == (2, False), done.output


def _is(row: dict[str, Any]) -> Any:
    return EqualTo("instrument", row["instrument"]) & EqualTo("trade_id", row["trade_id"])  # type: ignore[call-arg,arg-type]


def _rewrite(pipeline: Pipeline, row: dict[str, Any], *, keep: bool = False, **values: Any) -> None:
    """Put a row with other values in the place of `row`, or beside it."""
    table = open_table(pipeline)
    if not keep:
        table.delete(_is(row))
    open_table(pipeline).append(pa.Table.from_pylist([row | values], schema=pipeline.contracts["trades"].arrow_schema))


def _dead_letter(pipeline: Pipeline, place: str, *, index: int, topic_id: str | None = None) -> None:
    partition, offset, _ = map(int, place.split(":"))
    topic = pipeline.topic("raw-trades")
    letter = make_dead_letter(
        topic=topic,
        topic_id=topic_id or topic_identity(pipeline.settings, topic).topic_id,
        partition=partition,
        offset=offset,
        index=index,
        reason="malformed_json",
        detail="test",
        processor="parser",
        ts_ns=1,
        key=None,
        payload=b"{",
        headers=[(RAW_HEADERS[0], b"SIM")],
    )
    producer = Producer(producer_config(pipeline.settings))
    producer.produce(pipeline.topic("raw-trades.dlq"), msgspec.json.encode(letter), b"k")
    assert producer.flush(30) == 0
