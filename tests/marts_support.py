"""What the tests of SQL and marts share: bars as rows, tables of their own on a SQLite catalog."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyiceberg.table import Table

from streamforge.contracts import Contract, Contracts, load_contracts
from streamforge.kafka_server import SHORT_LIVED
from streamforge.lakehouse.catalog import ensure_tables, open_catalog
from streamforge.settings import Settings

MINUTE_NS = 60_000_000_000
START_NS = 1_767_225_600_000_000_000
"""2026-01-01 00:00 UTC."""


@dataclass(frozen=True, slots=True)
class MinuteBar:
    """What of a one-minute bar matters to a mart; `minute` counts from `START_NS`."""

    instrument: str
    minute: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    revision: int = 0
    replay_epoch: int = 0


def settings_of(home: Path, *contract_ids: str) -> Settings:
    """Return settings with tables made below `home`: those of the contracts named, or all.

    Spark gets few tasks and a quick compiler: the data is small, and most of a run is Spark warming up.
    """
    options = {"spark.sql.shuffle.partitions": "2", "spark.driver.extraJavaOptions": SHORT_LIVED}
    settings = Settings(_env_file=None, home=home, spark_options=options)  # type: ignore[call-arg]
    contracts = load_contracts(settings.contracts_dir)
    wanted = Contracts({name: contracts[name] for name in contract_ids or contracts})
    ensure_tables(open_catalog(settings), settings, wanted)
    return settings


def table_of(settings: Settings, name: str) -> Table:
    """Load a table afresh, as another process does."""
    return open_catalog(settings).load_table((settings.namespace, name))


def append_bars(settings: Settings, bars: Iterable[MinuteBar]) -> None:
    """Land bars in one commit."""
    contract = load_contracts(settings.contracts_dir)["bars"]
    table_of(settings, "bars").append(bar_rows(contract, bars))


def bar_rows(contract: Contract, bars: Iterable[MinuteBar]) -> pa.Table:
    """Return bars as rows of their table."""
    return pa.Table.from_pylist([_row(bar) for bar in bars], schema=contract.arrow_schema)


def _row(bar: MinuteBar) -> dict[str, Any]:
    base, _, rest = bar.instrument.partition("-")
    quote, _, venue = rest.partition(".")
    start_ns = START_NS + bar.minute * MINUTE_NS
    typical = (bar.high + bar.low) / 2
    return {
        "instrument": bar.instrument,
        "venue": venue,
        "symbol": base + quote,
        "interval": "1m",
        "ts_start_ns": start_ns,
        "ts_start": _utc(start_ns),
        "ts_end_ns": start_ns + MINUTE_NS,
        "ts_end": _utc(start_ns + MINUTE_NS),
        "replay_epoch": bar.replay_epoch,
        "revision": bar.revision,
        "open": bar.open,
        "high": bar.high,
        "low": bar.low,
        "close": bar.close,
        "volume": bar.volume,
        "taker_buy_volume": bar.volume,
        "quote_volume": bar.volume * typical,
        "vwap": typical,
        "trade_count": 2,
        "first_trade_id": "1",
        "last_trade_id": "2",
        "trades_partition": 0,
        "trades_start_offset": 0,
        "trades_end_offset": 2,
        "processor_version": "test",
        "source_epoch": 1,
        "source_partition": 0,
        "source_offset": bar.minute,
        "source_index": 0,
        "commit_id": "test",
        "contract_version": "1.0.0",
    }


def _utc(time_ns: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(time_ns // 1_000_000_000, tz=dt.UTC)
