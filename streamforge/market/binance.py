"""Binance spot frames to trades: decode, check, refuse with a reason.

Source: Binance spot API, "WebSocket Streams", "Trade Streams" and "Live Subscribing/Unsubscribing".
The trap: `m` says that the buyer is the maker, so `m: true` is a trade whose aggressor sold.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from streamforge.errors import NOT_JSON, DecodeError
from streamforge.market.decimals import positive_decimal
from streamforge.market.records import AggressorSide

TRADE_SUFFIX = "@trade"

_NS_PER_MS = 1_000_000
_NS_PER_US = 1_000
_FIRST_MS = 1_230_768_000_000  # 2009-01-01, before any such market
_END_MS = 4_102_444_800_000  # 2100-01-01
_MAX_LONG = 2**63 - 1
_SHOWN_BYTES = 80
_BUY, _SELL = AggressorSide.BUY, AggressorSide.SELL


class VenueTrade(NamedTuple):
    """One trade as the venue said it, checked: canonical decimals, times in nanoseconds."""

    symbol: str
    trade_id: int
    price: str
    size: str
    aggressor_side: AggressorSide
    ts_event_ns: int


class _TradeEvent(msgspec.Struct, gc=False):
    e: Literal["trade"]
    s: str
    t: int
    p: str
    q: str
    T: int
    m: bool


class _Combined(msgspec.Struct, gc=False):
    stream: str
    data: _TradeEvent


_COMBINED = msgspec.json.Decoder(_Combined)
_SINGLE = msgspec.json.Decoder(_TradeEvent)
_ANYTHING = msgspec.json.Decoder()


def parse_trades(payload: bytes) -> list[VenueTrade] | None:
    """Return the trades of one frame of a trade stream, combined or raw; None for a protocol message.

    Protocol messages are the answers to SUBSCRIBE and the like: `{"result":null,"id":1}`.

    Raises:
        DecodeError: `malformed_json`, `wrong_type`, `missing_field`, `unknown_stream`, `bad_decimal`,
            `out_of_range` or `bad_time`.
    """
    try:
        frame = _COMBINED.decode(payload)
    except NOT_JSON as error:
        event = _other(payload, error)
        return None if event is None else [_checked(event)]
    if not frame.stream.endswith(TRADE_SUFFIX):
        raise DecodeError("unknown_stream", f"expected a stream name ending in {TRADE_SUFFIX}, found {frame.stream!r}")
    if frame.stream[: -len(TRADE_SUFFIX)] != frame.data.s.lower():
        raise DecodeError("symbol_mismatch", f"stream {frame.stream!r} carries a trade of {frame.data.s!r}")
    return [_checked(frame.data)]


def event_time_ns(value: int) -> int:
    """Return a venue time, in milli- or microseconds since 1970 UTC, in nanoseconds.

    The two cannot be mistaken for each other: each is taken only between the years 2009 and 2100.

    Raises:
        DecodeError: `bad_time` for any other number.
    """
    if _FIRST_MS <= value < _END_MS:
        return value * _NS_PER_MS
    if _FIRST_MS * 1_000 <= value < _END_MS * 1_000:
        return value * _NS_PER_US
    raise DecodeError("bad_time", f"expected milli- or microseconds between 2009 and 2100, found {value}")


def _checked(event: _TradeEvent) -> VenueTrade:
    if not 0 <= event.t <= _MAX_LONG:
        raise DecodeError("out_of_range", f"expected a trade id of 0 to {_MAX_LONG}, found {event.t}")
    return VenueTrade(
        event.s,
        event.t,
        positive_decimal(event.p),
        positive_decimal(event.q),
        _SELL if event.m else _BUY,
        event_time_ns(event.T),
    )


def _other(payload: bytes, cause: Exception) -> _TradeEvent | None:
    """Return the trade of a frame that is not a combined one, None for a protocol message."""
    try:
        return _SINGLE.decode(payload)
    except NOT_JSON as error:
        frame = _anything(payload)
        if not isinstance(frame, dict):
            raise DecodeError("wrong_type", f"expected a JSON object, found {_shown(payload)}") from error
        if "id" in frame and ("result" in frame or "error" in frame) and "data" not in frame:
            return None
        raise _refusal(frame, cause if "stream" in frame else error, payload) from error


def _anything(payload: bytes) -> Any:
    try:
        return _ANYTHING.decode(payload)
    except NOT_JSON as error:
        raise DecodeError("malformed_json", f"{error}, in {_shown(payload)}") from error


def _refusal(frame: dict[str, Any], cause: Exception, payload: bytes) -> DecodeError:
    event = frame.get("data") if "stream" in frame else frame
    stream = frame.get("stream", "")
    is_other = isinstance(event, dict) and event.get("e", "trade") != "trade"
    if is_other or (stream and not str(stream).endswith(TRADE_SUFFIX)):
        return DecodeError("unknown_stream", f"expected a trade, found {_shown(payload)}")
    reason = "missing_field" if "missing required field" in str(cause) else "wrong_type"
    return DecodeError(reason, f"{cause}, in {_shown(payload)}")


def _shown(payload: bytes) -> str:
    text = repr(payload[:_SHOWN_BYTES])[1:]
    return text if len(payload) <= _SHOWN_BYTES else f"{text}... ({len(payload)} bytes)"
