"""What is told from the bytes of Binance's frames, and from its list of symbols."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamforge.errors import PermanentSourceError
from streamforge.market.gaps import VenueIds
from streaming.loaders.base import Answer, Listing
from streaming.loaders.binance import CHANNELS, Binance, depth_ids, parse_listings, retry_after_s, trade_ids
from tests.loader_support import depth_frame, trade_frame

VENUE = Binance("SIM")


def test_ids_of_a_trade_are_its_trade_id() -> None:
    assert trade_ids(trade_frame(3_700_000_000)) == VenueIds(3_700_000_000, 3_700_000_000)


def test_ids_of_a_depth_update_are_first_and_final_update_id() -> None:
    assert depth_ids(depth_frame(50093239189, 50093239202)) == VenueIds(50093239189, 50093239202)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b'{"stream":"btcusdt@trade","data":{"e":"trade"',
        trade_frame(1)[:-1],
        b'{"data":{"t":123}}',
        b'{"data":{"t":"123",}}',
        b'{"data":{"t":-5,}}',
        b'{"data":{"t":1_000,}}',
        b'{"data":{"t":999999999999999999999999999999,}}',
        b'{"data":{"t":,}}',
        b"\xff\xfe",
    ],
)
def test_ids_that_cannot_be_told_are_none(frame: bytes) -> None:
    assert trade_ids(frame) is None


def test_ids_of_a_depth_update_that_runs_backwards_are_none() -> None:
    assert depth_ids(depth_frame(9, 8)) is None


@given(st.binary(max_size=200))
def test_no_bytes_make_routing_or_ids_fail(frame: bytes) -> None:
    for channel in CHANNELS.values():
        assert channel.ids_of is not None
        channel.ids_of(frame)
        channel.ids_of(trade_frame(1)[:-30] + frame + b"}}")
    VENUE.stream_name(frame)
    VENUE.stream_name(b'{"stream":"' + frame)
    VENUE.answer(frame)


def test_stream_name_is_told_from_the_first_bytes() -> None:
    assert VENUE.stream_name(b'{"stream":"btcusdt@depth@100ms","data":\xff') == b"btcusdt@depth@100ms"


@pytest.mark.parametrize("frame", [b"", b'{"stream":"btcusdt', b'{"data":{},"stream":"btcusdt@trade"}', b"[]"])
def test_stream_name_that_cannot_be_told_is_none(frame: bytes) -> None:
    assert VENUE.stream_name(frame) is None


def test_answers_are_told_from_market_data() -> None:
    assert VENUE.answer(b'{"result":null,"id":3}') == Answer(3, None)
    refused = VENUE.answer(b'{"error":{"code":2,"msg":"Invalid request"},"id":4}')
    assert refused is not None
    assert refused.message_id == 4
    assert "Invalid request" in (refused.refusal or "")
    assert VENUE.answer(trade_frame(1)) is None


def test_subscriptions_are_numbered_messages_of_at_most_a_hundred_streams() -> None:
    listing = Listing("BTCUSDT", "BTC-USDT.SIM", is_trading=True)
    streams = [VENUE.stream(listing, CHANNELS["trade"])] * 250
    messages = [msgspec.json.decode(message) for message in VENUE.subscribe_messages(streams, first_id=7)]
    assert [message["id"] for message in messages] == [7, 8, 9]
    assert [len(message["params"]) for message in messages] == [100, 100, 50]
    assert {name for message in messages for name in message["params"]} == {"btcusdt@trade"}
    assert {message["method"] for message in messages} == {"SUBSCRIBE"}


def test_listings_name_instruments_by_base_and_quote() -> None:
    body = msgspec.json.encode(
        {
            "timezone": "UTC",
            "symbols": [
                {"symbol": "BTCUSDT", "status": "TRADING", "baseAsset": "BTC", "quoteAsset": "USDT", "filters": []},
                {"symbol": "ETHBTC", "status": "BREAK", "baseAsset": "ETH", "quoteAsset": "BTC"},
            ],
        }
    )
    assert parse_listings(body, "BINANCE") == {
        "BTCUSDT": Listing("BTCUSDT", "BTC-USDT.BINANCE", is_trading=True),
        "ETHBTC": Listing("ETHBTC", "ETH-BTC.BINANCE", is_trading=False),
    }


def test_answer_that_lists_nothing_is_a_permanent_error() -> None:
    with pytest.raises(PermanentSourceError, match="exchangeInfo"):
        parse_listings(b"<html>", "BINANCE")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("7", 7.0),
        ("Thu, 08 Aug 2024 23:55:00 GMT", 60.0),
        ("Thu, 08 Aug 2024 23:00:00 GMT", 0.0),
        ("x", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: float | None) -> None:
    assert retry_after_s(value, datetime(2024, 8, 8, 23, 54, tzinfo=UTC)) == expected
