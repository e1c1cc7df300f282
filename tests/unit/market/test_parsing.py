"""Raw records to trades: order, duplicates, mismatches, times."""

from __future__ import annotations

import pytest

from streamforge.market.dedupe import SeenIds
from streamforge.market.parsing import ParserLimits, parse_records, symbol_of
from streamforge.market.records import RawRecord
from tests.pipeline_support import START_MS, trade_frame

BTC = "BTC-USDT.SIM"
RECEIVE_NS = START_MS * 1_000_000


def record(offset: int, frame: bytes, **changes: object) -> RawRecord:
    made = RawRecord("id", 0, offset, BTC, "SIM", "trade", "c", offset, RECEIVE_NS, frame)
    return made._replace(**changes)  # type: ignore[arg-type]


def test_parse_records_keeps_order_and_identity() -> None:
    parsed = parse_records({}, [record(n, trade_frame(BTC, 10 + n)) for n in range(3)])
    assert [(t.trade_id, t.raw_offset, t.raw_index) for t in parsed.trades] == [
        ("10", 0, 0),
        ("11", 1, 0),
        ("12", 2, 0),
    ]
    assert not parsed.refusals


def test_parse_records_venue_duplicate_is_dropped_and_counted() -> None:
    first = parse_records({}, [record(0, trade_frame(BTC, 10))])
    again = parse_records(first.state, [record(1, trade_frame(BTC, 10)), record(2, trade_frame(BTC, 11))])
    assert [t.trade_id for t in again.trades] == ["11"]
    assert again.counters == {"duplicates": 1}


def test_parse_records_leaves_the_former_state_as_it_was() -> None:
    before = {BTC: SeenIds.of([1, 2])}
    parse_records(before, [record(0, trade_frame(BTC, 3))])
    assert before == {BTC: SeenIds.of([1, 2])}


def test_parse_records_same_id_of_another_instrument_is_no_duplicate() -> None:
    eth = record(1, trade_frame("ETH-USDT.SIM", 10), instrument="ETH-USDT.SIM")
    assert len(parse_records({}, [record(0, trade_frame(BTC, 10)), eth]).trades) == 2


def test_parse_records_id_below_the_floor_is_a_refusal() -> None:
    limits = ParserLimits(max_id_intervals=2)
    ids = [1, 10, 20, 30]
    parsed = parse_records({}, [record(n, trade_frame(BTC, i)) for n, i in enumerate([*ids, 5])], limits)
    assert [t.trade_id for t in parsed.trades] == [str(i) for i in ids]
    assert [(r.record.offset, r.reason) for r in parsed.refusals] == [(4, "too_old_to_dedupe")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"instrument": "ETH-USDT.SIM"}, "symbol_mismatch"),
        ({"venue": "OTHER"}, "symbol_mismatch"),
        ({"instrument": "BTCUSDT"}, "bad_key"),
        ({"instrument": "UNKNOWN.SIM"}, "bad_key"),
        ({"channel": "unknown"}, "unknown_stream"),
        ({"channel": "kline_1m"}, "unknown_stream"),
        ({"payload": b"{"}, "malformed_json"),
        ({"ts_receive_ns": RECEIVE_NS - 60_000_000_001}, "event_in_future"),
    ],
)
def test_parse_records_what_is_no_trade_is_refused(changes: dict[str, object], reason: str) -> None:
    parsed = parse_records({}, [record(5, trade_frame(BTC, 1), **changes)])
    assert not parsed.trades
    assert [(r.record.offset, r.index, r.reason) for r in parsed.refusals] == [(5, 0, reason)]


def test_parse_records_event_at_the_bound_after_receipt_is_a_trade() -> None:
    parsed = parse_records({}, [record(0, trade_frame(BTC, 1), ts_receive_ns=RECEIVE_NS - 60_000_000_000)])
    assert len(parsed.trades) == 1


def test_parse_records_refused_trade_is_not_remembered_as_seen() -> None:
    bad = record(0, trade_frame(BTC, 1), ts_receive_ns=RECEIVE_NS - 10**12)
    assert len(parse_records({}, [bad, record(1, trade_frame(BTC, 1))]).trades) == 1


@pytest.mark.parametrize("channel", ["trade", "unknown"])
def test_parse_records_protocol_message_is_counted_only(channel: str) -> None:
    parsed = parse_records({}, [record(0, b'{"result":null,"id":1}', channel=channel)])
    assert parsed.counters == {"skipped.protocol_message": 1}
    assert not parsed.refusals
    assert not parsed.trades


def test_symbol_of_an_instrument_is_base_and_quote() -> None:
    assert symbol_of("BTC-USDT.BINANCE") == "BTCUSDT"
