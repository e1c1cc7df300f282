"""Binance's spot protocol as text: stream payloads, REST bodies, WebSocket requests and error answers.

Field names, order, types and spelling are those of recorded messages. Trap: `m` (`isBuyerMaker`) true
means that the buyer was resting, so the aggressor sold.

Source: Binance spot API documentation, "WebSocket Streams" and "REST API".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from streaming.simulator.book import Changes
from streaming.simulator.history import AggregateTrade, Kline, Trade
from streaming.simulator.instruments import VENUE_DECIMALS, DecimalText, InstrumentSpec, product_text
from streaming.simulator.source import BookSnapshot

CHANNELS = ("trade", "depth@100ms", "depth", "depth@1000ms", "bookTicker", "kline_1m")
MAX_STREAMS = 1024
METHODS = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")


class Formatter:
    """Write one instrument's messages; everything that does not change is prepared once."""

    def __init__(self, spec: InstrumentSpec) -> None:
        self.spec = spec
        self.price = DecimalText(spec.price_decimals)
        self.lots = DecimalText(spec.lot_decimals)
        self._amount_decimals = spec.price_decimals + spec.lot_decimals
        self._symbol = spec.symbol

    def trade(self, trade_id: int, price: int, lots: int, ts_ms: int, *, buyer_is_maker: bool) -> str:
        """Return the payload of `@trade`."""
        maker = "true" if buyer_is_maker else "false"
        return (
            f'{{"e":"trade","E":{ts_ms},"s":"{self._symbol}","t":{trade_id},"p":"{self.price[price]}",'
            f'"q":"{self.lots[lots]}","T":{ts_ms},"m":{maker},"M":true}}'
        )

    def depth(self, changes: Changes, ts_ms: int) -> str:
        """Return the payload of `@depth`."""
        return (
            f'{{"e":"depthUpdate","E":{ts_ms},"s":"{self._symbol}","U":{changes.first_update_id},'
            f'"u":{changes.last_update_id},"b":{self._levels(changes.bids)},"a":{self._levels(changes.asks)}}}'
        )

    def book_ticker(self, update_id: int, bid: tuple[int, int], ask: tuple[int, int]) -> str:
        """Return the payload of `@bookTicker`, which has no event time."""
        return (
            f'{{"u":{update_id},"s":"{self._symbol}","b":"{self.price[bid[0]]}","B":"{self.lots[bid[1]]}",'
            f'"a":"{self.price[ask[0]]}","A":"{self.lots[ask[1]]}"}}'
        )

    def kline(self, kline: Kline, ts_ms: int, *, closed: bool) -> str:
        """Return the payload of `@kline_1m`."""
        return (
            f'{{"e":"kline","E":{ts_ms},"s":"{self._symbol}","k":{{"t":{kline.start_ms},"T":{kline.end_ms - 1},'
            f'"s":"{self._symbol}","i":"1m","f":{kline.first_trade_id},"L":{kline.last_trade_id},'
            f'"o":"{self.price[kline.open]}","c":"{self.price[kline.close]}","h":"{self.price[kline.high]}",'
            f'"l":"{self.price[kline.low]}","v":"{self.lots[kline.lots]}","n":{kline.trades},'
            f'"x":{"true" if closed else "false"},"q":"{self._amount(kline.amount)}",'
            f'"V":"{self.lots[kline.taker_buy_lots]}","Q":"{self._amount(kline.taker_buy_amount)}","B":"0"}}}}'
        )

    def snapshot(
        self, update_id: int, bids: Sequence[tuple[int, int]], asks: Sequence[tuple[int, int]]
    ) -> BookSnapshot:
        """Return a depth answer from levels in ticks and lots."""
        return BookSnapshot(update_id, self._pairs(bids), self._pairs(asks))

    def rest_trade(self, trade: Trade) -> dict[str, Any]:
        """Return one item of `/api/v3/trades`."""
        return {
            "id": trade.trade_id,
            "price": self.price[trade.price],
            "qty": self.lots[trade.lots],
            "quoteQty": self._amount(trade.price * trade.lots),
            "time": trade.ts_ms,
            "isBuyerMaker": bool(trade.buyer_is_maker),
            "isBestMatch": True,
        }

    def rest_aggregate(self, trade: AggregateTrade) -> dict[str, Any]:
        """Return one item of `/api/v3/aggTrades`."""
        return {
            "a": trade.aggregate_id,
            "p": self.price[trade.price],
            "q": self.lots[trade.lots],
            "f": trade.first_trade_id,
            "l": trade.last_trade_id,
            "T": trade.ts_ms,
            "m": trade.buyer_is_maker,
            "M": True,
        }

    def rest_kline(self, kline: Kline) -> list[Any]:
        """Return one item of `/api/v3/klines`."""
        return [
            kline.start_ms,
            self.price[kline.open],
            self.price[kline.high],
            self.price[kline.low],
            self.price[kline.close],
            self.lots[kline.lots],
            kline.end_ms - 1,
            self._amount(kline.amount),
            kline.trades,
            self.lots[kline.taker_buy_lots],
            self._amount(kline.taker_buy_amount),
            "0",
        ]

    def _amount(self, amount: int) -> str:
        return product_text(amount, self._amount_decimals)

    def _pairs(self, levels: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
        price, size = self.price, self.lots
        return [(price[ticks], size[lots]) for ticks, lots in levels]

    def _levels(self, levels: Sequence[tuple[int, int]]) -> str:
        price, size = self.price, self.lots
        return "[" + ",".join([f'["{price[ticks]}","{size[lots]}"]' for ticks, lots in levels]) + "]"


def stream_name(symbol: str, channel: str) -> str:
    """Return the venue's name of a stream: the symbol in small letters, and the channel."""
    return f"{symbol.lower()}@{channel}"


def combined(stream: str, data: str) -> str:
    """Wrap a raw payload as the combined streams do."""
    return f'{{"stream":"{stream}","data":{data}}}'


def exchange_symbol(spec: InstrumentSpec) -> dict[str, Any]:
    """Return one instrument of `/api/v3/exchangeInfo`."""
    tick = DecimalText(spec.price_decimals)[1]
    lot = DecimalText(spec.lot_decimals)[1]
    return {
        "symbol": spec.symbol,
        "status": "TRADING",
        "baseAsset": spec.base,
        "baseAssetPrecision": VENUE_DECIMALS,
        "quoteAsset": spec.quote,
        "quotePrecision": VENUE_DECIMALS,
        "quoteAssetPrecision": VENUE_DECIMALS,
        "baseCommissionPrecision": VENUE_DECIMALS,
        "quoteCommissionPrecision": VENUE_DECIMALS,
        "orderTypes": ["LIMIT", "LIMIT_MAKER", "MARKET"],
        "icebergAllowed": False,
        "ocoAllowed": False,
        "otoAllowed": False,
        "quoteOrderQtyMarketAllowed": True,
        "allowTrailingStop": False,
        "cancelReplaceAllowed": True,
        "amendAllowed": False,
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "filters": [
            {"filterType": "PRICE_FILTER", "minPrice": tick, "maxPrice": "922327.00000000", "tickSize": tick},
            {"filterType": "LOT_SIZE", "minQty": lot, "maxQty": "9000000.00000000", "stepSize": lot},
        ],
        "permissions": [],
        "permissionSets": [["SPOT"]],
        "defaultSelfTradePreventionMode": "EXPIRE_MAKER",
        "allowedSelfTradePreventionModes": ["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH", "DECREMENT"],
    }


class WsRequest(msgspec.Struct, frozen=True):
    """A request that a client sends on its WebSocket."""

    method: str
    params: list[Any]
    request_id: int | str | None


class RequestError(Exception):
    """A WebSocket request that the venue answers with an error.

    Args:
        code: 0 unknown property, 1 wrong value, 2 wrong request, 3 no JSON.
        text: the venue's words.
        request_id: id of the request, when it could be read.
    """

    def __init__(self, code: int, text: str, request_id: int | str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.request_id = request_id

    def body(self) -> bytes:
        """Return the answer's text."""
        error: dict[str, Any] = {"code": self.code, "msg": self.text}
        return msgspec.json.encode({"error": error, "id": self.request_id})


def parse_request(text: bytes) -> WsRequest:
    """Read a client's request.

    Raises:
        RequestError: what the venue would answer.
    """
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(3, "Invalid JSON: expected value at line 1 column 1") from error
    if not isinstance(found, dict):
        raise RequestError(2, "Invalid request: request must be an object")
    request_id = found.get("id")
    if not _is_request_id(request_id):
        raise RequestError(2, "Invalid request: request ID must be an unsigned integer")
    if "method" not in found:
        raise RequestError(2, "Invalid request: missing field `method` at line 1 column 1", request_id)
    method = found["method"]
    if method not in METHODS:
        msg = f"Invalid request: unknown variant `{method}`, expected one of {', '.join(METHODS)} at line 1 column 1"
        raise RequestError(2, msg, request_id)
    params = found.get("params", [])
    needs_streams = method in ("SUBSCRIBE", "UNSUBSCRIBE")
    if not isinstance(params, list) or (needs_streams and not params):
        raise RequestError(2, "Invalid request: params must be a non-empty array", request_id)
    if needs_streams and not all(isinstance(item, str) for item in params):
        raise RequestError(2, "Invalid request: property name must be a string", request_id)
    return WsRequest(method, params, request_id)


def result_body(result: Any, request_id: int | str | None) -> bytes:
    """Return the answer to a request that was obeyed."""
    return msgspec.json.encode({"result": result, "id": request_id})


def _is_request_id(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or isinstance(value, str) or (isinstance(value, int) and value >= 0)
