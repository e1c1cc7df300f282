"""The records of the market topics as values: what the contracts say, as structs.

The contracts stay the only place where a schema is written: a test compares every struct here with its
contract field by field. Decimals are text on the wire and here (`DecimalText`): a plain decimal that
fits decimal(38,18), never a float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, NamedTuple, Protocol

import msgspec

from streamforge.errors import DecodeError

DecimalText = Annotated[str, msgspec.Meta(extra={"physical_type": "decimal(38,18)"})]

RAW_HEADERS = ("venue", "channel", "connection_id", "sequence_in_connection", "ts_receive_ns")
UNKNOWN_CHANNEL = "unknown"
_MAX_LONG = 2**63 - 1
_LONG_DIGITS = 19
_CACHED_TEXTS = 16_384

Headers = Sequence[tuple[str, str | bytes | None]] | Mapping[str, str | bytes | None] | None


class AggressorSide(StrEnum):
    """Side of the taker."""

    BUY = "BUY"
    SELL = "SELL"


class GapKind(StrEnum):
    """Why something may be missing."""

    START = "start"
    RECONNECT = "reconnect"
    SEQUENCE = "sequence"
    BUFFER_OVERFLOW = "buffer_overflow"
    BROKER_REJECTED = "broker_rejected"
    LATE_TRADE = "late_trade"


class Trade(msgspec.Struct, frozen=True, gc=False):
    """One record of `trades`."""

    instrument: str
    venue: str
    symbol: str
    trade_id: str
    price: DecimalText
    size: DecimalText
    aggressor_side: AggressorSide
    ts_event_ns: int
    ts_receive_ns: int
    raw_topic_id: str
    raw_partition: int
    raw_offset: int
    raw_index: int
    parser_version: str


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One record of `bars`: one revision of one bar."""

    instrument: str
    venue: str
    symbol: str
    interval: str
    ts_start_ns: int
    ts_end_ns: int
    replay_epoch: int
    revision: int
    open: DecimalText
    high: DecimalText
    low: DecimalText
    close: DecimalText
    volume: DecimalText
    taker_buy_volume: DecimalText
    quote_volume: DecimalText
    vwap: DecimalText
    trade_count: int
    first_trade_id: str
    last_trade_id: str
    trades_partition: int
    trades_start_offset: int
    trades_end_offset: int
    processor_version: str


class VenueBar(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One record of `venue-bars`: a bar as the venue published it."""

    instrument: str
    venue: str
    symbol: str
    interval: str
    ts_start_ns: int
    ts_end_ns: int
    open: DecimalText
    high: DecimalText
    low: DecimalText
    close: DecimalText
    volume: DecimalText
    ts_receive_ns: int
    raw_topic_id: str
    raw_partition: int
    raw_offset: int
    raw_index: int
    parser_version: str


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """One record of `predictions`: what the champion model expects of one interval of an instrument."""

    instrument: str
    venue: str
    symbol: str
    ts_start_ns: int
    ts_end_ns: int
    volatility: float
    model_name: str
    model_version: str
    ts_predicted_ns: int
    market_instruments: int
    bars_topic_id: str
    bars_partition: int
    bars_offset: int
    processor_version: str


class MarketGap(msgspec.Struct, frozen=True, kw_only=True):
    """One record of `market-gaps`: a span in which events may be missing, or a bar reached too late."""

    gap_id: str
    kind: GapKind
    venue: str
    channel: str
    instrument: str
    ts_start_ns: int
    ts_end_ns: int
    id_before: str | None = None
    id_after: str | None = None
    connection_id: str | None = None
    records_dropped: int
    bytes_dropped: int
    detail: str
    ts_detected_ns: int


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """One record of a `<topic>.dlq`: a record that was refused, where it lay and why."""

    topic: str
    topic_id: str
    partition: int
    offset: int
    index: int
    reason: str
    detail: str
    processor: str
    processor_version: str
    ts_ns: int
    key_base64: str | None = None
    payload_base64: str
    headers: dict[str, str]


class RawRecord(NamedTuple):
    """One record of a raw topic, from Kafka or from its table; `payload` is the frame, untouched."""

    topic_id: str
    partition: int
    offset: int
    instrument: str
    venue: str
    channel: str
    connection_id: str
    sequence_in_connection: int
    ts_receive_ns: int
    payload: bytes


class KafkaRecord(Protocol):
    """What is used of `confluent_kafka.Message`, so that the core needs no Kafka."""

    def partition(self) -> int | None:
        """Return the topic-partition number."""

    def offset(self) -> int | None:
        """Return the offset."""

    def key(self) -> bytes | str | None:
        """Return the key."""

    def value(self) -> bytes | str | None:
        """Return the value."""

    def headers(self) -> Headers:
        """Return the headers."""


def raw_record(topic_id: str, message: KafkaRecord) -> RawRecord:
    """Make a raw record of a Kafka record: key, headers and the frame's bytes.

    Raises:
        DecodeError: key or a header is missing (`missing_header`, `missing_key`) or not what it has to
            be (`bad_header`); an empty payload is an empty frame and not an error.
    """
    venue, channel, connection_id, sequence, ts_receive = _header_values(message.headers())
    try:
        texts = _cached_text(venue), _cached_text(channel), _cached_text(connection_id)
    except UnicodeDecodeError as error:
        raise DecodeError("bad_header", f"a header is not UTF-8: {error}") from error
    if not (_is_long(sequence) and _is_long(ts_receive)):
        detail = f"sequence_in_connection and ts_receive_ns are not both longs: {sequence[:40]!r}, {ts_receive[:40]!r}"
        raise DecodeError("bad_header", detail)
    key = message.key()
    if not key:
        raise DecodeError("missing_key", "a raw record's key is its instrument; found none")
    try:
        instrument = _cached_text(key)
    except UnicodeDecodeError as error:
        raise DecodeError("bad_key", f"the key is not UTF-8: {error}") from error
    value = message.value()
    return RawRecord(
        topic_id,
        message.partition() or 0,
        message.offset() or 0,
        instrument,
        *texts,
        int(sequence),
        int(ts_receive),
        value.encode() if isinstance(value, str) else value or b"",
    )


def _is_long(text: str | bytes) -> bool:
    return text.isdigit() and len(text) <= _LONG_DIGITS and int(text) <= _MAX_LONG


def _header_values(headers: Headers) -> Sequence[str | bytes]:
    """Return the values of the raw headers in the order of `RAW_HEADERS`; loaders write them in that order."""
    if isinstance(headers, list) and tuple(name for name, _ in headers) == RAW_HEADERS:
        values = [value for _, value in headers]
        if None not in values:
            return values
    found = dict(headers or ())
    missing = [name for name in RAW_HEADERS if found.get(name) is None]
    if missing:
        detail = f"missing: {', '.join(missing)}; a raw record has the headers {', '.join(RAW_HEADERS)}"
        raise DecodeError("missing_header", detail)
    return [found[name] or b"" for name in RAW_HEADERS]


@lru_cache(maxsize=_CACHED_TEXTS)
def _cached_text(value: str | bytes) -> str:
    """Return a text that is the same in most records: venue, channel, connection, instrument."""
    return value if isinstance(value, str) else value.decode("utf-8")
