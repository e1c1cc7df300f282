"""Binance spot: names, subscriptions, the first bytes of a frame, and the list of symbols.

Pure but for `Binance.listings`. Source: Binance spot API, "WebSocket Streams" (combined streams, live
subscribing, limits) and "REST API" (exchange information, limits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, Final

import httpx
import msgspec
import stamina

from streamforge.errors import PermanentSourceError, RetryableSourceError
from streamforge.market.gaps import VenueIds
from streaming.loaders.base import Answer, Channel, Listing, Stream

WEBSOCKET_URL: Final = "wss://stream.binance.com:9443"
REST_URL: Final = "https://api.binance.com"
VENUE: Final = "BINANCE"

_PREFIX: Final = b'{"stream":"'
_END: Final = b"}}"
_NAME_START: Final = len(_PREFIX)
_STREAMS_PER_MESSAGE = 100
_TRADING = "TRADING"
_RETRY_STATUS = frozenset({418, 429, 500, 502, 503, 504})
_LONGEST_ID = 20
_REST_TIMEOUT_S = 10.0
_RETRY_ATTEMPTS = 8
_RETRY_FOR_S = 300.0


def _number_behind(frame: bytes, name: bytes) -> int | None:
    """Return the whole number behind the first `name`, None where it is not there or not a whole one."""
    start = frame.find(name)
    if start < 0:
        return None
    start += len(name)
    end = frame.find(b",", start, start + _LONGEST_ID)
    # Without a comma behind it, the number may be cut off by the end of the frame.
    digits = frame[start:end] if end > 0 else b""
    return int(digits) if digits.isdigit() else None


def trade_ids(frame: bytes) -> VenueIds | None:
    """Return the trade id (`t`) of a trade frame; a frame that is cut off has none, as nobody can read its trade."""
    if not frame.endswith(_END):
        return None
    number = _number_behind(frame, b'"t":')
    return None if number is None else VenueIds(number, number)


def depth_ids(frame: bytes) -> VenueIds | None:
    """Return first and final update id (`U`, `u`) of a depth frame; a cut frame and a backward range have none."""
    if not frame.endswith(_END):
        return None
    first = _number_behind(frame, b'"U":')
    last = _number_behind(frame, b'"u":')
    if first is None or last is None or last < first:
        return None
    return VenueIds(first, last)


CHANNELS: Final[Mapping[str, Channel]] = MappingProxyType(
    {
        channel.name: channel
        for channel in (
            Channel("trade", "raw-trades", trade_ids),
            Channel("depth@100ms", "raw-depth", depth_ids),
        )
    }
)
"""Channel by name; a further one is a further line (and, if need be, a contract for its raw topic)."""


class _Symbol(msgspec.Struct, frozen=True, rename="camel"):
    symbol: str
    status: str
    base_asset: str
    quote_asset: str


class _ExchangeInfo(msgspec.Struct, frozen=True):
    symbols: list[_Symbol]


class _AnswerFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: int
    result: Any = None
    error: Any = None


_ANSWER = msgspec.json.Decoder(_AnswerFrame)
_EXCHANGE_INFO = msgspec.json.Decoder(_ExchangeInfo)


class Binance:
    """The protocol of Binance spot.

    Args:
        label: name of the venue in keys and headers; the simulated market speaks the same protocol as `SIM`.
    """

    def __init__(self, label: str = VENUE) -> None:
        self.label = label
        self.channels = CHANNELS

    def stream(self, listing: Listing, channel: Channel) -> Stream:
        """Return the stream of `channel` for a listing."""
        name = f"{listing.symbol.lower()}@{channel.name}".encode()
        return Stream(name, listing.symbol, listing.instrument, channel)

    def websocket_url(self, base_url: str) -> str:
        """Return the URL of combined streams."""
        return f"{base_url.rstrip('/')}/stream"

    def subscribe_messages(self, streams: Sequence[Stream], first_id: int) -> list[bytes]:
        """Return the SUBSCRIBE messages of `streams`, numbered from `first_id`."""
        names = [stream.name.decode() for stream in streams]
        parts = [names[start : start + _STREAMS_PER_MESSAGE] for start in range(0, len(names), _STREAMS_PER_MESSAGE)]
        return [
            msgspec.json.encode({"method": "SUBSCRIBE", "params": part, "id": first_id + number})
            for number, part in enumerate(parts)
        ]

    def stream_name(self, frame: bytes) -> bytes | None:
        """Return the stream's name from the frame's first bytes, None where it cannot be told."""
        if not frame.startswith(_PREFIX):
            return None
        end = frame.find(b'"', _NAME_START)
        return frame[_NAME_START:end] if end > 0 else None

    def answer(self, frame: bytes) -> Answer | None:
        """Return which message `frame` answers and how, None where it is not an answer."""
        try:
            found = _ANSWER.decode(frame)
        except msgspec.MsgspecError:
            return None
        return Answer(found.id, None if found.error is None else str(found.error))

    async def listings(self, rest_url: str) -> Mapping[str, Listing]:
        """Return every listing by symbol, from `/api/v3/exchangeInfo`.

        Answers 429, 418 and 5xx are repeated, not before `Retry-After` has passed.

        Raises:
            RetryableSourceError: no answer within five minutes.
            PermanentSourceError: an answer that a retry cannot help.
        """
        async with httpx.AsyncClient(base_url=rest_url, timeout=_REST_TIMEOUT_S) as client:
            async for attempt in stamina.retry_context(
                on=_seconds_to_wait, attempts=_RETRY_ATTEMPTS, timeout=_RETRY_FOR_S, wait_initial=0.25, wait_max=20.0
            ):
                with attempt:
                    return parse_listings(await _get(client, "/api/v3/exchangeInfo"), self.label)
        raise AssertionError


def parse_listings(body: bytes, label: str) -> Mapping[str, Listing]:
    """Return the listings of an `exchangeInfo` answer by symbol.

    Raises:
        PermanentSourceError: it is not one.
    """
    try:
        info = _EXCHANGE_INFO.decode(body)
    except msgspec.MsgspecError as error:
        msg = f"/api/v3/exchangeInfo did not answer with symbols, status, baseAsset and quoteAsset: {error}"
        raise PermanentSourceError(msg) from error
    return {
        item.symbol: Listing(item.symbol, f"{item.base_asset}-{item.quote_asset}.{label}", item.status == _TRADING)
        for item in info.symbols
    }


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Return the seconds that a `Retry-After` header asks for: seconds or an HTTP date; None: nothing usable."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - now).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


async def _get(client: httpx.AsyncClient, path: str) -> bytes:
    url = f"{client.base_url}{path}"
    try:
        response = await client.get(path)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        msg = f"GET {url}: {type(error).__name__} {error}. Is --rest-url right and the venue up?"
        raise RetryableSourceError(msg) from error
    if response.status_code in _RETRY_STATUS:
        wait_s = retry_after_s(response.headers.get("Retry-After"), datetime.now(UTC))
        msg = f"GET {url}: status {response.status_code}, Retry-After {wait_s} s"
        raise RetryableSourceError(msg, wait_s)
    if response.is_error:
        msg = f"GET {url}: status {response.status_code}: {response.text[:200]}. Check --rest-url"
        raise PermanentSourceError(msg)
    return response.content


def _seconds_to_wait(error: Exception) -> bool | float:
    if not isinstance(error, RetryableSourceError):
        return False
    return True if error.retry_after_s is None else error.retry_after_s
