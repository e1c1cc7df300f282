"""The way of a row on a real broker and catalog: what Kafka has, what only tables have, what nobody has any more."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition as KafkaTopicPartition
from typer.testing import CliRunner

from cli.app import app
from streamforge.errors import ConfigurationError
from streamforge.kafka import admin_client
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.lakehouse.kafka_reader import topic_identity
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.replay import replay
from streamforge.lakehouse.trace import TracedRow, trace
from streamforge.processes import user_at_host
from streamforge.settings import Settings
from tests.pipeline_support import Pipeline, environment, make_pipeline
from tests.replay_support import BTC, frames, inverted, land, land_direct, open_table, raw_range, rows_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("restored_logging")]

ROWS = 6


@pytest.fixture(scope="module")
def landed(broker_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Return trades and raw trades in their tables, trade 5 made again by a replay, each table's own commits kept."""
    pipeline = make_pipeline(broker_settings, tmp_path_factory.mktemp("trace"), f"t{uuid.uuid4().hex[:8]}.")
    ensure_table(open_catalog(pipeline.settings), pipeline.settings, pipeline.contracts["commits"])
    land(pipeline, frames(BTC, range(ROWS)), parse=inverted(lambda trade: trade.trade_id == "5"))
    land_direct(pipeline, "raw-trades")
    partition = rows_of(pipeline)[0]["raw_partition"]
    replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, partition, 5, 6)])
    return pipeline


def traced(pipeline: Pipeline, trade_id: int) -> TracedRow:
    where = f"symbol = 'BTCUSDT' and trade_id = {trade_id}"
    [row] = trace(pipeline.settings, pipeline.contracts, "trades", where).rows
    return row


def test_row_shows_both_records_its_commit_and_the_time_at_each_hop(landed: Pipeline) -> None:
    found = traced(landed, 4)
    row = next(each for each in rows_of(landed) if each["trade_id"] == "4")
    assert found.record is not None
    assert found.raw is not None
    names = ("partition", "offset", "index")
    typed, raw = found.record.place, found.raw.place
    assert [getattr(typed, name) for name in names] == [row[f"source_{name}"] for name in names]
    assert [getattr(raw, name) for name in names] == [row[f"raw_{name}"] for name in names]
    assert raw.topic_id == topic_identity(landed.settings, landed.topic("raw-trades")).topic_id == row["raw_topic_id"]
    assert typed.topic_id == topic_identity(landed.settings, landed.topic("trades")).topic_id
    assert (found.raw.found_in, found.record.found_in) == ("kafka", "kafka")
    assert (found.raw.text, found.raw.encoding) == (frames(BTC, [4])[0].payload.decode(), "utf-8")
    assert json.loads(found.record.text or "")["trade_id"] == "4"
    assert found.raw.headers is not None
    assert found.raw.headers["ts_receive_ns"] == str(row["ts_receive_ns"])
    assert (found.commit.commit_id, found.commit.kind) == (row["commit_id"], "write")
    assert (found.commit.who or "").startswith("test@")
    assert found.versions == {"contract_version": row["contract_version"], "parser_version": row["parser_version"]}
    assert [each.name for each in found.hops] == ["event", "receive", "produce of raw", "produce of trades", "commit"]
    times = [each.ts_ns for each in found.hops]
    assert times[:2] == [row["ts_event_ns"], row["ts_receive_ns"]]
    for before, hop in zip(times, found.hops[1:], strict=False):
        assert hop.ts_ns is not None
        assert before is not None
        assert hop.after_ms == (hop.ts_ns - before) / 1e6


def test_row_of_a_replay_names_the_person_and_keeps_its_typed_record(landed: Pipeline) -> None:
    made = traced(landed, 5).commit
    assert (made.kind, made.who, made.found_in) == ("replay", user_at_host(), "snapshot")
    assert made.snapshot_id == open_table(landed).metadata.current_snapshot_id


def test_row_of_a_raw_table_is_its_own_raw_record(landed: Pipeline) -> None:
    [found] = trace(landed.settings, landed.contracts, "raw_trades", "source_offset = 4").rows
    assert found.record is not None
    assert (found.raw, found.record.found_in) == (None, "kafka")
    assert found.record.text == frames(BTC, [4])[0].payload.decode()
    assert found.row["payload"] == frames(BTC, [4])[0].payload
    assert [each.name for each in found.hops] == ["receive", "produce of raw-trades", "commit"]


def test_command_gives_json_and_text_and_says_that_there_are_more(
    landed: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(landed.settings).items():
        monkeypatch.setenv(name, value)
    arguments = ["trace", "--table", "trades", "--where", "true", "--limit", "2"]
    result = CliRunner().invoke(app, [*arguments, "--output", "json"])
    answer: dict[str, Any] = json.loads(result.stdout)
    assert (result.exit_code, answer["is_cut"], len(answer["rows"])) == (0, True, 2)
    assert answer["rows"][0]["raw"]["found_in"] == "kafka"
    assert answer["rows"][0]["row"]["price"].endswith(".5")
    text = CliRunner().invoke(app, arguments).stdout
    assert "raw record" in text
    assert "only the first 2 are traced" in text
    nothing = CliRunner().invoke(app, ["trace", "--table", "trades", "--where", "trade_id = '999'"])
    assert (nothing.exit_code, nothing.stdout.strip()) == (1, "trades: no row is meant")


@pytest.mark.parametrize(
    ("table", "where", "said"),
    [
        ("nothing", "true", "no contract has a table 'nothing'"),
        ("commits", "true", "come from no topic"),
        ("trades", "no_such_column = 1", "no_such_column"),
        ("trades", "true) -- ", "the query cannot be answered"),
    ],
)
def test_question_that_cannot_be_answered_says_why(landed: Pipeline, table: str, where: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        trace(landed.settings, landed.contracts, table, where)


def test_what_retention_and_expiry_took_is_found_in_the_tables_or_said_to_be_gone(
    broker_settings: Settings, tmp_path: Path
) -> None:
    pipeline = make_pipeline(broker_settings, tmp_path, f"t{uuid.uuid4().hex[:8]}.")
    settings, contracts = pipeline.settings, pipeline.contracts
    commits = ensure_table(open_catalog(settings), settings, contracts["commits"])
    land(pipeline, frames(BTC, [0]), frames(BTC, [1]), frames(BTC, [2]))
    before = traced(pipeline, 0)
    Maintenance(commits, contracts["commits"], retained=1).expire(open_table(pipeline))
    partition = rows_of(pipeline)[0]["raw_partition"]
    cut = [KafkaTopicPartition(pipeline.topic(name), partition, 1) for name in ("raw-trades", "trades")]
    land_direct(pipeline, "raw-trades")
    admin = admin_client(settings)  # its end would cancel the request
    for future in admin.delete_records(cut).values():
        future.result()

    found = traced(pipeline, 0)
    assert before.commit.found_in == "snapshot"
    assert found.commit.found_in == "commits"
    assert (found.commit.snapshot_id, found.commit.who) == (before.commit.snapshot_id, before.commit.who)
    assert found.raw is not None
    assert found.record is not None
    assert before.raw is not None
    assert (found.raw.found_in, found.raw.text) == ("table market.raw_trades", before.raw.text)
    assert (found.raw.headers or {})["connection_id"] == "c1"
    assert found.raw.ts_produced_ns is None
    assert "by retention, and no table keeps the bytes" in found.record.missing
    assert [each.name for each in found.hops if each.ts_ns is None] == ["produce of raw", "produce of trades"]
