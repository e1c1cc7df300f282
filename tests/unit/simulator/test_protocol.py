"""Messages have the fields, order, types and spelling of recorded ones."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from streaming.simulator.book import Changes
from streaming.simulator.history import AggregateTrade, Kline, Trade
from streaming.simulator.instruments import InstrumentSpec
from streaming.simulator.protocol import Formatter, RequestError, combined, exchange_symbol, parse_request

# One recorded message of each stream (BTCUSDT spot, 2024-08-08), shortened to one level a side.
RECORDED_TRADE = (
    '{"e":"trade","E":1723161255343,"s":"BTCUSDT","t":3735683259,"p":"61837.63000000","q":"0.02000000",'
    '"T":1723161255343,"m":true,"M":true}'
)
RECORDED_DEPTH = (
    '{"e":"depthUpdate","E":1723161255208,"s":"BTCUSDT","U":50093239189,"u":50093239202,'
    '"b":[["61737.63000000","0.00000000"]],"a":[["61837.64000000","1.54698000"]]}'
)
RECORDED_TICKER = (
    '{"u":50093239212,"s":"BTCUSDT","b":"61837.63000000","B":"3.78826000","a":"61837.64000000","A":"1.54698000"}'
)

FORMAT = Formatter(InstrumentSpec("BTCUSDT", "BTC", "USDT", 6_183_763, 2, 5))
KLINE = Kline(1_700_000_040_000, 1_700_000_100_000, 5, 9, 100, 130, 90, 120, 250_000, 25_500_000, 5, 7, 770)


def test_trade_equals_a_recorded_message() -> None:
    made = FORMAT.trade(3735683259, 6_183_763, 2_000, 1723161255343, buyer_is_maker=True)
    assert made == RECORDED_TRADE


def test_depth_equals_a_recorded_message() -> None:
    changes = Changes(50093239189, 50093239202, [(6_173_763, 0)], [(6_183_764, 154_698)])
    assert FORMAT.depth(changes, 1723161255208) == RECORDED_DEPTH


def test_book_ticker_equals_a_recorded_message() -> None:
    assert FORMAT.book_ticker(50093239212, (6_183_763, 378_826), (6_183_764, 154_698)) == RECORDED_TICKER


def test_combined_wraps_the_payload_untouched() -> None:
    assert combined("btcusdt@trade", RECORDED_TRADE) == '{"stream":"btcusdt@trade","data":' + RECORDED_TRADE + "}"


def test_kline_has_the_documented_fields_in_order() -> None:
    found = msgspec.json.decode(FORMAT.kline(KLINE, 1_700_000_060_000, closed=False))
    assert list(found) == ["e", "E", "s", "k"]
    assert found["k"] == {
        "t": 1_700_000_040_000,
        "T": 1_700_000_099_999,
        "s": "BTCUSDT",
        "i": "1m",
        "f": 5,
        "L": 9,
        "o": "1.00000000",
        "c": "1.20000000",
        "h": "1.30000000",
        "l": "0.90000000",
        "v": "2.50000000",
        "n": 5,
        "x": False,
        "q": "2.55000000",
        "V": "0.00007000",
        "Q": "0.00007700",
        "B": "0",
    }


def test_rest_bodies_have_the_recorded_fields() -> None:
    trade = FORMAT.rest_trade(Trade(870281750, 3_817_211, 15_000, 1621933655947, 1, 1))
    assert trade == {
        "id": 870281750,
        "price": "38172.11000000",
        "qty": "0.15000000",
        "quoteQty": "5725.81650000",
        "time": 1621933655947,
        "isBuyerMaker": True,
        "isBestMatch": True,
    }
    aggregate = FORMAT.rest_aggregate(AggregateTrade(1, 903_974, 17_700, 310207484, 310207485, 1588749117459, True))
    assert list(aggregate) == ["a", "p", "q", "f", "l", "T", "m", "M"]
    kline = FORMAT.rest_kline(KLINE)
    assert len(kline) == 12
    assert kline[:9] == [
        1_700_000_040_000,
        "1.00000000",
        "1.30000000",
        "0.90000000",
        "1.20000000",
        "2.50000000",
        1_700_000_099_999,
        "2.55000000",
        5,
    ]


def test_exchange_symbol_tells_tick_and_lot() -> None:
    found = exchange_symbol(FORMAT.spec)
    filters = {item["filterType"]: item for item in found["filters"]}
    assert (found["baseAsset"], found["quoteAsset"], found["status"]) == ("BTC", "USDT", "TRADING")
    assert filters["PRICE_FILTER"]["tickSize"] == "0.01000000"
    assert filters["LOT_SIZE"]["stepSize"] == "0.00001000"


def test_parse_request_good_request_is_read() -> None:
    request = parse_request(b'{"method":"SUBSCRIBE","params":["btcusdt@trade"],"id":7}')
    assert (request.method, request.params, request.request_id) == ("SUBSCRIBE", ["btcusdt@trade"], 7)


@pytest.mark.parametrize(
    ("text", "code", "words", "request_id"),
    [
        (b"no json", 3, "Invalid JSON", None),
        (b"\xff\xfe", 3, "Invalid JSON", None),
        (b"[1]", 2, "must be an object", None),
        (b'{"params":[],"id":1}', 2, "missing field `method`", 1),
        (b'{"method":"SUBSCRBE","params":["a"],"id":1}', 2, "unknown variant `SUBSCRBE`, expected one of SUBSCRIBE", 1),
        (b'{"method":"SUBSCRIBE","params":["a"],"id":-1}', 2, "request ID must be an unsigned integer", None),
        (b'{"method":"SUBSCRIBE","params":["a"],"id":true}', 2, "request ID must be an unsigned integer", None),
        (b'{"method":"SUBSCRIBE","params":[1],"id":1}', 2, "must be a string", 1),
        (b'{"method":"SUBSCRIBE","params":[],"id":1}', 2, "non-empty array", 1),
        (b'{"method":"UNSUBSCRIBE","params":"a","id":1}', 2, "non-empty array", 1),
    ],
)
def test_parse_request_bad_request_is_answered(text: bytes, code: int, words: str, request_id: int | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(text)
    body: dict[str, Any] = msgspec.json.decode(caught.value.body())
    assert body["error"]["code"] == code
    assert words in body["error"]["msg"]
    assert body["id"] == request_id
