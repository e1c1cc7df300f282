"""What the tests of bars in tables share: a market of two hours that went through the real processor."""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from pyiceberg.table import Table

from streamforge.contract_model import Contract
from streamforge.lakehouse.bars_backfill import Window
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.lakehouse.content_hash import ContentHash, content_hash, content_schema
from streamforge.market.bars import SourcedTrade, bars_of, latest_revision
from streamforge.market.records import Bar, Trade
from streamforge.settings import Settings
from tests.pipeline_support import (
    INSTRUMENTS,
    Pipeline,
    committed,
    make_trade,
    produce_trades,
    running,
    wait_for_positions,
)
from tests.replay_support import land_direct, open_table

HOUR = datetime(2026, 1, 5, 10, tzinfo=UTC)
FIRST = Window.of(HOUR, HOUR + timedelta(hours=1))
SECOND = Window.of(HOUR + timedelta(hours=1), HOUR + timedelta(hours=2))
LATE = "SOL-USDT.SIM"
"""Instrument with a trade in the second hour's first minute that came too late for its bar."""

_HOUR_MS = int(HOUR.timestamp() * 1000)
_MINUTE_MS = 60_000


def market() -> list[Trade]:
    """Return trades in the order in which they came: twelve minutes of the first hour, nine of the second.

    They are out of order by seconds, so that bars are corrected; the last bars of the second hour stay open.
    """
    chance = random.Random(7)
    arrivals = []
    for start_ms, minutes in ((0, 12), (60 * _MINUTE_MS, 9)):
        for at_ms in range(start_ms, start_ms + minutes * _MINUTE_MS, 2_500):
            event_ms = max(start_ms, at_ms - chance.choice((0, 0, 0, 900, 4_000, 130_000)))
            arrivals.append((chance.choice(INSTRUMENTS), event_ms))
    too_late = (LATE, 60 * _MINUTE_MS + 1)
    arrivals.append(too_late)
    # Every topic-partition sees the end of the second hour's trades, so each knows how late it is.
    arrivals += [(name, 69 * _MINUTE_MS) for name in INSTRUMENTS]
    return [
        make_trade(
            name, number, _HOUR_MS + ms, price=f"{100 + chance.randrange(900) / 100:.2f}", size=f"0.{number + 1}"
        )
        for number, (name, ms) in enumerate(arrivals)
    ]


def trade_row(trade: Trade, place: tuple[int, int] | None) -> dict[str, Any]:
    """Return a trade as its row in the table; without a place it is one that a replay added."""
    row: dict[str, Any] = msgspec.to_builtins(trade)
    for name in ("ts_event", "ts_receive"):
        row[name] = datetime.fromtimestamp(row[f"{name}_ns"] / 1e9, UTC)
    row |= {"price": Decimal(trade.price), "size": Decimal(trade.size), "raw_epoch": 1}
    partition, offset = place or (None, None)
    row |= {"source_epoch": place and 1, "source_partition": partition, "source_offset": offset}
    return row | {"source_index": place and 0, "commit_id": "test", "contract_version": "1"}


def land_trades(settings: Settings, contract: Contract, trades: Iterable[Trade]) -> None:
    """Append trades to their table without Kafka, all from one topic-partition in the order given."""
    table = ensure_table(open_catalog(settings), settings, contract)
    rows = [trade_row(trade, (0, number)) for number, trade in enumerate(trades)]
    table.append(pa.Table.from_pylist(rows, schema=contract.arrow_schema))


def stream(pipeline: Pipeline, trades: Iterable[Trade]) -> None:
    """Send trades through the real bars processor, up to their end."""
    produce_trades(pipeline, trades)
    with running(pipeline, "bars") as thread:
        wait_for_positions(pipeline, thread, "trades")


def landed(pipeline: Pipeline, home: Path) -> Pipeline:
    """Land trades and bars of the pipeline in tables of their own below `home`."""
    mine = pipeline._replace(settings=pipeline.settings.model_copy(update={"home": home}))
    land_direct(mine, "trades")
    land_direct(mine, "bars")
    return mine


def expected_bars(pipeline: Pipeline, window: Window) -> dict[tuple[str, int], Bar]:
    """Return the window's bars, built from the typed topic itself."""
    trades = [
        SourcedTrade(
            msgspec.json.decode(message.value() or b"", type=Trade), "", message.partition() or 0, message.offset() or 0
        )
        for message in committed(pipeline, "trades")
    ]
    bars = bars_of(each for each in trades if window.start_ns <= each.trade.ts_event_ns < window.end_ns).bars
    return {(bar.instrument, bar.ts_start_ns): bar for bar in bars}


def latest_bars(pipeline: Pipeline, window: Window) -> pa.Table:
    """Return the latest revision of the window's bars, as the table has them."""
    rows = latest_revision(open_table(pipeline, "bars").scan().to_arrow())
    starts = rows["ts_start_ns"].to_numpy()
    return rows.filter(pa.array((starts >= window.start_ns) & (starts < window.end_ns)))


def hash_of(pipeline: Pipeline, rows: pa.Table) -> ContentHash:
    """Return the content hash of bars, without the number of their revision."""
    schema = content_schema(pipeline.contracts["bars"])
    return content_hash(rows, pa.schema([item for item in schema if item.name not in ("replay_epoch", "revision")]))


def append_bars(table: Table, rows: list[dict[str, Any]]) -> None:
    """Append rows as any user of the table may."""
    table.append(pa.Table.from_pylist(rows, schema=table.schema().as_arrow()))
