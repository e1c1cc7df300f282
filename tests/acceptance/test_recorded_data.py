"""Recorded spot trades through the real processes: simulator, loader, Kafka, parser, writer, table.

What has to come out is read from the recordings without any of the platform's code: every message once in
`raw_trades`, byte for byte, and once in `trades`, its numbers equal to the venue's text.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamforge.contracts import Contracts, load_contracts
from streamforge.lakehouse.catalog import ensure_tables, load_table, open_catalog
from streamforge.settings import Settings
from streamforge.topics import create_topics
from tests.pipeline_support import make_pipeline
from tests.recordings import RECORDINGS_DIR, needs_recordings
from tests.waiting import wait_until

pytestmark = [needs_recordings, pytest.mark.integration, pytest.mark.timeout(900)]

SYMBOLS = ("BTCUSDT", "ETHUSDT")
LAND_TIMEOUT_S = 300.0
END_TIMEOUT_S = 90.0


def recorded_trades() -> list[bytes]:
    """Return every spot trade message of the recordings, as the venue sent it."""
    found = []
    for symbol in SYMBOLS:
        for file in sorted((RECORDINGS_DIR / "ws_binance").glob(f"spot_{symbol.lower()}_*.gz")):
            with gzip.open(file, "rb") as lines:
                texts = (line.rstrip(b"\n").partition(b" ")[2] for line in lines)
                found += [text for text in texts if text.startswith(f'{{"stream":"{symbol.lower()}@trade"'.encode())]
    return found


@contextmanager
def running(settings: Settings, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `streamforge` with these arguments; stop it and expect exit code 0, kill it where the test failed."""
    environment = os.environ | {
        "STREAMFORGE_HOME": str(settings.home_path),
        "STREAMFORGE_CONTRACTS_DIR": str(settings.contracts_dir),
        "STREAMFORGE_TOPIC_PREFIX": settings.topic_prefix,
        "STREAMFORGE_BOOTSTRAP_SERVERS": settings.bootstrap_servers or "",
    }
    log_file = settings.home_path / f"{name}.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", *arguments, "--output", "json"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
        if process.poll() is None:
            process.terminate()
        code = process.wait(END_TIMEOUT_S)
        assert code == 0, f"{name} ended with {code}:\n{log_file.read_text(encoding='utf-8')[-4000:]}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def rows_of(settings: Settings, contracts: Contracts, contract_id: str, *columns: str) -> list[dict[str, Any]]:
    """Return these columns of every row of a table."""
    table = load_table(open_catalog(settings), settings, contracts[contract_id])
    found: list[dict[str, Any]] = table.scan(selected_fields=columns).to_arrow().to_pylist()
    return found


def count_of(settings: Settings, contracts: Contracts, contract_id: str) -> int:
    """Return how many rows a table has, as its latest snapshot says."""
    snapshot = load_table(open_catalog(settings), settings, contracts[contract_id]).current_snapshot()
    return 0 if snapshot is None or snapshot.summary is None else int(snapshot.summary["total-records"] or 0)


@pytest.fixture
def platform_and_contracts(broker_settings: Settings, tmp_path: Path) -> tuple[Settings, Contracts]:
    settings, _ = make_pipeline(broker_settings, tmp_path, f"rec{os.getpid()}.")
    settings.home_path.mkdir(parents=True, exist_ok=True)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    create_topics(settings, contracts)
    ensure_tables(open_catalog(settings), settings, contracts)
    return settings, contracts


def test_every_recorded_trade_is_in_raw_and_in_trades_once_and_equal(
    platform_and_contracts: tuple[Settings, Contracts], tmp_path: Path
) -> None:
    settings, contracts = platform_and_contracts
    expected = recorded_trades()
    assert len(expected) > 30_000
    address = tmp_path / "address.json"
    ledger = tmp_path / "ledger"
    market = ["simulate", "--no-kafka", "--source", "recordings", "--recordings-dir", str(RECORDINGS_DIR)]
    market += ("--speed", "0", "--start-streams", "2", "--address-file", str(address), "--ledger", str(ledger))
    with ExitStack() as stack:
        stack.enter_context(running(settings, "writer", "run", "writer"))
        stack.enter_context(running(settings, "parser", "run", "parser"))
        stack.enter_context(running(settings, "simulator", *market))
        wait_until(address.exists, timeout_s=END_TIMEOUT_S, what="the simulator listens")
        urls = msgspec.json.decode(address.read_bytes(), type=dict[str, str])
        load = ["load", "--symbols", ",".join(SYMBOLS), "--channels", "trade"]
        load += ("--ws-url", urls["ws_url"], "--rest-url", urls["rest_url"])
        stack.enter_context(running(settings, "loader", *load))
        for contract_id in ("raw-trades", "trades"):
            wait_until(
                lambda name=contract_id: count_of(settings, contracts, name) >= len(expected),  # type: ignore[misc]
                timeout_s=LAND_TIMEOUT_S,
                what=f"{len(expected)} rows in {contract_id}",
            )
    _raw_is_what_the_venue_sent(settings, contracts, expected)
    _trades_equal_what_the_venue_said(settings, contracts, expected)
    _verify_agrees(settings, ledger)


def _raw_is_what_the_venue_sent(settings: Settings, contracts: Contracts, expected: list[bytes]) -> None:
    rows = rows_of(settings, contracts, "raw-trades", "payload", "channel", "instrument")
    assert Counter(row["payload"] for row in rows) == Counter(expected)
    assert {(row["channel"], row["instrument"]) for row in rows} == {
        ("trade", "BTC-USDT.BINANCE"),
        ("trade", "ETH-USDT.BINANCE"),
    }


def _trades_equal_what_the_venue_said(settings: Settings, contracts: Contracts, expected: list[bytes]) -> None:
    columns = ("symbol", "trade_id", "price", "size", "aggressor_side", "ts_event_ns")
    rows = rows_of(settings, contracts, "trades", *columns)
    found = Counter(tuple(row[name] for name in columns) for row in rows)
    said = [json.loads(text, parse_float=Decimal)["data"] for text in expected]
    assert found == Counter(
        (
            data["s"],
            str(data["t"]),
            Decimal(data["p"]),
            Decimal(data["q"]),
            "SELL" if data["m"] else "BUY",
            data["T"] * 1_000_000,
        )
        for data in said
    )


def _verify_agrees(settings: Settings, ledger: Path) -> None:
    with running(settings, "verify", "verify", "raw-trades", "trades", "--ledger", str(ledger)) as process:
        process.wait(END_TIMEOUT_S)
