"""Binance frames: what is a trade, and why something is not."""

from __future__ import annotations

import msgspec
import pytest

from streamforge.errors import DecodeError
from streamforge.market.binance import event_time_ns, parse_trades
from streamforge.market.records import AggressorSide

EVENT = {
    "e": "trade",
    "E": 1723161255343,
    "s": "BTCUSDT",
    "t": 3735683259,
    "p": "61837.63000000",
    "q": "0.02000000",
    "T": 1723161255342,
    "m": True,
    "M": True,
}


def combined(**changes: object) -> bytes:
    return msgspec.json.encode({"stream": "btcusdt@trade", "data": EVENT | changes})


def test_parse_trades_combined_frame_gives_the_trade() -> None:
    [trade] = parse_trades(combined()) or []
    assert trade == ("BTCUSDT", 3735683259, "61837.63", "0.02", AggressorSide.SELL, 1723161255342 * 10**6)


def test_parse_trades_raw_frame_gives_the_same_trade() -> None:
    assert parse_trades(msgspec.json.encode(EVENT)) == parse_trades(combined())


@pytest.mark.parametrize(("is_buyer_maker", "side"), [(True, AggressorSide.SELL), (False, AggressorSide.BUY)])
def test_parse_trades_buyer_is_maker_means_that_the_aggressor_sold(is_buyer_maker: bool, side: AggressorSide) -> None:
    [trade] = parse_trades(combined(m=is_buyer_maker)) or []
    assert trade.aggressor_side is side


@pytest.mark.parametrize(
    "payload", [b'{"result":null,"id":1}', b'{"id":3,"result":["btcusdt@trade"]}', b'{"error":{"code":2},"id":null}']
)
def test_parse_trades_protocol_message_is_none(payload: bytes) -> None:
    assert parse_trades(payload) is None


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "malformed_json"),
        (b"not json", "malformed_json"),
        (combined()[:-10], "malformed_json"),
        (combined() + b"x", "malformed_json"),
        (b'{"stream":"\xff\xfe","data":1}', "malformed_json"),
        (b'{"x":' + b"[" * 100_000, "malformed_json"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed_json"),
        (b"[]", "wrong_type"),
        (b"12", "wrong_type"),
        (b"null", "wrong_type"),
        (b"{}", "missing_field"),
        (combined(t="12"), "wrong_type"),
        (combined(t=1.5), "wrong_type"),
        (combined(p=61837.63), "wrong_type"),
        (combined(p=None), "wrong_type"),
        (combined(m=1), "wrong_type"),
        (msgspec.json.encode({"stream": "btcusdt@trade", "data": {"e": "trade"}}), "missing_field"),
        (msgspec.json.encode({"stream": "btcusdt@trade"}), "missing_field"),
        (msgspec.json.encode({"stream": "btcusdt@depth@100ms", "data": {}}), "unknown_stream"),
        (msgspec.json.encode({"stream": "btcusdt@aggTrade", "data": EVENT}), "unknown_stream"),
        (combined(e="aggTrade"), "unknown_stream"),
        (combined(s="ETHUSDT"), "symbol_mismatch"),
        (combined(t=-1), "out_of_range"),
        (combined(t=2**63), "out_of_range"),
        (combined(T=-1), "bad_time"),
        (combined(T=0), "bad_time"),
        (combined(T=10**40), "bad_time"),
        (combined(p="0"), "out_of_range"),
        (combined(p="-1"), "bad_decimal"),
        (combined(q="1e5"), "bad_decimal"),
        (combined(q="NaN"), "bad_decimal"),
    ],
)
def test_parse_trades_bad_frame_is_refused_with_a_reason(payload: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        parse_trades(payload)
    assert caught.value.reason == reason
    assert len(caught.value.detail) < 1_000


@pytest.mark.parametrize(
    ("value", "expected_ns"),
    [
        (1_723_161_255_342, 1_723_161_255_342_000_000),
        (1_723_161_255_342_123, 1_723_161_255_342_123_000),
        (1_230_768_000_000, 1_230_768_000_000_000_000),
    ],
)
def test_event_time_in_milli_or_microseconds_is_nanoseconds(value: int, expected_ns: int) -> None:
    assert event_time_ns(value) == expected_ns


@pytest.mark.parametrize("value", [1_723_161_255, 1_230_767_999_999, 4_102_444_800_000, 1_723_161_255_342_123_456])
def test_event_time_in_seconds_or_nanoseconds_is_refused(value: int) -> None:
    with pytest.raises(DecodeError):
        event_time_ns(value)
