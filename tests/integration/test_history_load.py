"""`streamforge load history`: files to `venue_bars` by the raw backfill topic, once, beside everything live."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from cli.app import app
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.log_reader import log_ends
from streamforge.settings import Settings
from tests.history_support import HOUR_NS, MINUTE_NS, START_NS, csv_row, write_csv, write_feather
from tests.pipeline_support import (
    Pipeline,
    committed,
    dead_letters,
    environment,
    make_pipeline,
    process,
    running,
    wait_for_positions,
)
from tests.writer_support import running_writer, writer_settings

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.usefixtures("restored_logging")]

KIND = "history-parser"
RAW, BARS = "raw-candles-backfill", "venue-bars"
LIVE = ("raw-trades", "trades", "bars", "market-gaps")
TOPICS = (RAW, f"{RAW}.dlq", BARS, f"{BARS}.dlq", f"{KIND}-changelog", "queue-events", "queue-control", *LIVE)
HOURS = 40
# One of each phase of the protocol; the processors' own tests kill at every step.
STEPS = ("after_outputs", "after_offsets", "after_commit")


@pytest.fixture(scope="module")
def pipeline(broker_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return make_pipeline(broker_settings, tmp_path_factory.mktemp("history"), f"h{uuid.uuid4().hex[:8]}.", TOPICS)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with two files of hours, one row of which is no bar, and one of minutes."""
    folder = tmp_path / "files"
    write_csv(folder, "BTCUSDT", [csv_row(n, offset_h=3 if n < 1 else 2) for n in range(HOURS)])
    write_csv(folder, "ETHUSDT", [*(csv_row(n) for n in range(HOURS)), b"2020-10-25 00:00:00+03:00,one"])
    write_feather(folder, "BTC_USDT_USDT", HOURS)
    return folder


@pytest.fixture
def at_work(pipeline: Pipeline) -> Iterator[None]:
    """Run history parser and writer."""
    settings = writer_settings(pipeline.settings, writer_contracts=(RAW, BARS))
    with running(pipeline, KIND), running_writer(settings, pipeline.contracts):
        yield


def load(pipeline: Pipeline, *arguments: object) -> Result:
    command = ["load", "history", *map(str, arguments), "--output", "json"]
    return CliRunner().invoke(app, command, env=environment(pipeline.settings))


def loaded(pipeline: Pipeline, *arguments: object) -> dict[str, Any]:
    result = load(pipeline, *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])  # the workers' threads log there too
    return found


def rows(pipeline: Pipeline, contract_id: str) -> pa.Table:
    contract = pipeline.contracts[contract_id]
    return load_table(open_catalog(pipeline.settings), pipeline.settings, contract).scan().to_arrow()


def expected(instrument: str, interval: str, length_ns: int) -> list[tuple[str, str, int]]:
    return [(instrument, interval, START_NS + number * length_ns) for number in range(HOURS)]


def bars_of(table: pa.Table) -> list[tuple[str, str, int]]:
    return sorted(zip(*(table[name].to_pylist() for name in ("instrument", "interval", "ts_start_ns")), strict=True))


ALL = sorted(
    [
        *expected("BTC-USDT.BINANCE", "1h", HOUR_NS),
        *expected("ETH-USDT.BINANCE", "1h", HOUR_NS),
        *expected("BTC-USDT.BINANCEUSDM", "1m", MINUTE_NS),
    ]
)


@pytest.mark.usefixtures("at_work")
def test_files_land_once_however_often_they_are_loaded_and_nothing_live_moves(pipeline: Pipeline, files: Path) -> None:
    live = [item for name in LIVE for item in pipeline.partitions(name)]
    before = log_ends(pipeline.settings, live)
    for _ in range(2):
        hours = loaded(pipeline, files, "--format", "candles_1h", "--wait-s", 60)
        minutes = loaded(pipeline, files, "--format", "candles_1m", "--wait-s", 60)
        assert (hours["rows"], hours["files_left_alone"], hours["landed"]) == (2 * HOURS + 1, 1, True)
        assert (minutes["rows"], minutes["venue"]) == (HOURS, "BINANCEUSDM")
        bars = rows(pipeline, BARS)
        assert bars_of(bars) == ALL
    assert {str(price) for price in bars.filter(pa.compute.field("interval") == "1m")["close"].to_pylist()} == {
        "0.000067000000000000"
    }
    raw = rows(pipeline, RAW)
    assert raw.num_rows == 2 * (3 * HOURS + 1)
    payloads = set(raw["payload"].to_pylist())
    assert {csv_row(n, offset_h=3 if n < 1 else 2) for n in range(HOURS)} <= payloads
    [letter, again] = dead_letters(pipeline, RAW)
    assert (letter.reason, again.reason, letter.processor) == ("malformed_row", "malformed_row", KIND)
    assert letter.headers["sequence_in_connection"] == str(HOURS)
    assert letter.headers["connection_id"].startswith("ETHUSDT_1h.csv.gz#")
    assert log_ends(pipeline.settings, live) == before


@pytest.mark.parametrize("step", STEPS)
def test_history_parser_killed_at_a_step_loses_and_doubles_nothing(
    pipeline: Pipeline, step: str, tmp_path: Path
) -> None:
    name = f"K{STEPS.index(step)}"
    folder = tmp_path / "files"
    write_csv(folder, f"{name}USDT", [csv_row(number) for number in range(HOURS)])
    loaded(pipeline, folder, "--format", "candles_1h", "--wait-s", 0)
    with process(pipeline, KIND, kill_at=f"{KIND}.{step}", log=tmp_path / "log") as victim:
        assert victim.wait() == -signal.SIGKILL, victim.said()
    loaded(pipeline, folder, "--format", "candles_1h", "--wait-s", 0)
    with running(pipeline, KIND) as thread:
        wait_for_positions(pipeline, thread, RAW)
    found = [json.loads(message.value() or b"") for message in committed(pipeline, BARS)]
    starts = sorted(bar["ts_start_ns"] for bar in found if bar["instrument"] == f"{name}-USDT.BINANCE")
    assert starts == [START_NS + number * HOUR_NS for number in range(HOURS)]


def test_load_without_a_parser_says_who_is_behind(pipeline: Pipeline, files: Path) -> None:
    with running_writer(writer_settings(pipeline.settings, writer_contracts=(RAW, BARS)), pipeline.contracts):
        result = load(pipeline, files, "--format", "candles_1m", "--wait-s", 0.3)
    assert result.exit_code == 1
    for part in (f"consumer group {pipeline.settings.topic_prefix}{KIND}", "streamforge status"):
        assert part in result.output


def test_dry_run_writes_nothing(pipeline: Pipeline, files: Path) -> None:
    before = log_ends(pipeline.settings, pipeline.partitions(RAW))
    assert loaded(pipeline, files, "--format", "candles_1h", "--dry-run")["dry_run"] is True
    assert log_ends(pipeline.settings, pipeline.partitions(RAW)) == before
    assert load(pipeline, files / "none", "--format", "candles_1h").exit_code == 2


def test_load_without_topics_says_how_to_create_them(platform: Settings, files: Path) -> None:
    result = CliRunner().invoke(
        app, ["load", "history", str(files), "--format", "candles_1h"], env=environment(platform)
    )
    assert result.exit_code == 1
    assert "streamforge contracts apply" in result.output
