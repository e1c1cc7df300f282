"""Trades read from their table for the batch path: their places, and each of them once."""

from __future__ import annotations

from typing import Any

import msgspec
import pyarrow as pa

from streamforge.contracts import load_contracts
from streamforge.lakehouse.trades_window import sourced
from streamforge.market.bars import bars_of
from streamforge.settings import Settings
from tests.bars_support import trade_row
from tests.pipeline_support import START_MS, make_trade

BTC, ETH = "BTC-USDT.SIM", "ETH-USDT.SIM"
_SCHEMA = load_contracts(Settings(_env_file=None).contracts_dir)["trades"].arrow_schema  # type: ignore[call-arg]


def table(*rows: dict[str, Any]) -> pa.Table:
    names = list(rows[0])
    return pa.Table.from_pylist(list(rows), schema=pa.schema([_SCHEMA.field(name) for name in names]))


def test_small_and_exact_decimals_come_back_as_plain_text() -> None:
    [only] = sourced(table(trade_row(make_trade(BTC, 1, START_MS, price="0.00000001", size="123.5"), (0, 7))))
    assert (only.partition, only.offset) == (0, 7)
    [bar] = bars_of([only]).bars
    assert (bar.open, bar.volume, bar.trades_start_offset) == ("0.00000001", "123.5", 7)


def test_trade_without_a_place_takes_that_of_the_one_before_it_in_its_bar() -> None:
    trades = [make_trade(BTC, n, START_MS + n) for n in range(4)]
    places = [None, (1, 20), None, (1, 30)]
    found = sourced(table(*(trade_row(trade, place) for trade, place in zip(trades, places, strict=True))))
    assert [(each.trade.trade_id, each.partition, each.offset) for each in found] == [
        ("0", 1, 20),
        ("1", 1, 20),
        ("2", 1, 20),
        ("3", 1, 30),
    ]


def test_bar_made_of_trades_without_places_is_whole_and_closes_with_the_last_of_raw() -> None:
    trades = [make_trade(ETH, n, START_MS, price=f"{n + 1}") for n in range(3)]
    rows = table(*(trade_row(trade, None) for trade in reversed(trades)))
    [bar] = bars_of(sourced(rows)).bars
    assert (bar.open, bar.close, bar.first_trade_id, bar.last_trade_id) == ("1", "3", "0", "2")
    assert (bar.trade_count, bar.trades_start_offset, bar.trades_end_offset) == (3, 0, 1)


def test_trade_that_is_there_twice_counts_once() -> None:
    first = make_trade(BTC, 5, START_MS)
    again = msgspec.structs.replace(first, raw_offset=9)
    found = sourced(table(trade_row(again, (0, 8)), trade_row(first, (0, 3))))
    assert [(each.trade.raw_offset, each.offset) for each in found] == [(5, 3)]
