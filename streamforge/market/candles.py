"""Rows of candle files to venue bars: one pure function for whoever parses history. "Candle" is the venue's word.

A row is a raw record: its channel names the format, its payload is the row as it stands in the file. What
cannot be a bar becomes a refusal with a reason, a bar that came before is dropped and counted: of an
instrument, an interval and a start the first one stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from streamforge import __version__
from streamforge.errors import NOT_JSON, DecodeError
from streamforge.market.decimals import plain_text
from streamforge.market.dedupe import SeenIds, Verdict
from streamforge.market.parsing import DUPLICATES, TOO_OLD_TO_DEDUPE, Refusal, symbol_of
from streamforge.market.records import RawRecord, VenueBar
from streamforge.times import to_ns

CSV_COLUMNS = ("open_time", "open", "high", "low", "close", "volume", "close_time", "returns")
BINARY_COLUMNS = ("date", "open", "high", "low", "close", "volume")

MAX_INTERVALS = 10_000
"""Runs of bars without a hole that are remembered for each instrument and interval: a bounded state."""

CandleState = Mapping[str, SeenIds]
"""Numbers of the bars seen, by `state_key`; a bar's number is its start in intervals since 1970."""

_NS_PER_MS = 1_000_000
_END_NS = 4_102_444_800 * 10**9
_NUMBER = re.compile(r"[0-9]{1,60}(?:\.[0-9]{1,60})?(?:[eE][+-]?[0-9]{1,3})?")
_MAX_EXPONENT = 40
_SHOWN_BYTES = 120


class Candle(NamedTuple):
    """What a row says; `end_ns` is None where it does not say its end."""

    ts_start_ns: int
    end_ns: int | None
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal


@dataclass(frozen=True, slots=True)
class CandleFormat:
    """One format of candle files.

    Args:
        name: what it is called in commands and in the channel of raw records.
        interval: length of its bars, as contracts spell it.
        interval_ns: the same in nanoseconds.
        venue: whose candles such files hold where nobody says otherwise.
        file_name: what names are taken; the groups `base` and `quote`, or `symbol`, tell the instrument.
        example: a file name, for messages.
        parse: makes a candle of a row.
    """

    name: str
    interval: str
    interval_ns: int
    venue: str
    file_name: re.Pattern[str]
    example: str
    parse: Callable[[bytes], Candle]


class ParsedCandles(NamedTuple):
    """What raw records gave; `state` shares with the former one what did not change."""

    state: CandleState
    bars: list[VenueBar]
    refusals: list[Refusal]
    counters: Mapping[str, int]


def parse_candles(state: CandleState, records: Iterable[RawRecord], *, max_event_ahead_ns: int) -> ParsedCandles:
    """Parse raw records in their order; `state` stays as it was.

    Args:
        state: bars seen before.
        records: raw records; those of one instrument in the order of their topic-partition.
        max_event_ahead_ns: a bar that ends further than this after receipt is refused: it was not over.

    Returns:
        The state after them, bars and refusals in the order of the records, and the counter `duplicates`.
    """
    bars: list[VenueBar] = []
    refusals: list[Refusal] = []
    counters: Counter[str] = Counter()
    touched: dict[str, SeenIds] = {}
    for record in records:
        try:
            bar, number = _bar(record, max_event_ahead_ns)
        except DecodeError as error:
            refusals.append(Refusal(record, 0, error.reason, error.detail))
            continue
        key = state_key(bar.instrument, bar.interval)
        seen = touched.get(key)
        if seen is None:
            known = state.get(key)
            seen = touched[key] = SeenIds(max_intervals=MAX_INTERVALS) if known is None else known.copy()
        verdict = seen.add(number)
        if verdict is Verdict.NEW:
            bars.append(bar)
        elif verdict is Verdict.DUPLICATE:
            counters[DUPLICATES] += 1
        else:
            detail = f"the bar that starts at {bar.ts_start_ns} ns is below those from which on duplicates can be told"
            refusals.append(Refusal(record, 0, TOO_OLD_TO_DEDUPE, detail))
    return ParsedCandles({**state, **touched}, bars, refusals, counters)


def state_key(instrument: str, interval: str) -> str:
    """Return the key under which the bars seen of an instrument and interval are kept."""
    return f"{instrument}/{interval}"


def parse_csv_row(payload: bytes) -> Candle:
    """Parse a row of text with the columns `CSV_COLUMNS`; its times carry an offset, and both become UTC.

    `close_time` is the bar's last millisecond; the end of the bar is one later.

    Raises:
        DecodeError: `malformed_row`, `bad_time` or `bad_decimal`.
    """
    try:
        cells = payload.decode("ascii").split(",")
    except UnicodeDecodeError as error:
        raise DecodeError("malformed_row", f"expected text, found {_shown(payload)}") from error
    if len(cells) != len(CSV_COLUMNS):
        detail = f"expected {len(CSV_COLUMNS)} columns ({', '.join(CSV_COLUMNS)}), found {len(cells)}"
        raise DecodeError("malformed_row", f"{detail}: {_shown(payload)}")
    numbers = [_decimal_of(cell) for cell in cells[1:6]]
    return Candle(_time_ns(cells[0]), _time_ns(cells[6]) + _NS_PER_MS, *numbers)


def parse_binary_row(payload: bytes) -> Candle:
    """Parse a row of a binary file: a JSON object of `BINARY_COLUMNS`, `date` in nanoseconds since 1970 UTC.

    Raises:
        DecodeError: `malformed_row`.
    """
    try:
        row = _BINARY_ROW.decode(payload)
    except NOT_JSON as error:
        raise DecodeError("malformed_row", f"{error}, in {_shown(payload)}") from error
    return Candle(row.date, None, row.open, row.high, row.low, row.close, row.volume)


class _BinaryRow(msgspec.Struct, gc=False):
    date: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal


_BINARY_ROW = msgspec.json.Decoder(_BinaryRow)

FORMATS: Mapping[str, CandleFormat] = MappingProxyType(
    {
        item.name: item
        for item in (
            CandleFormat(
                "candles_1h",
                "1h",
                3_600_000_000_000,
                "BINANCE",
                re.compile(r"(?P<symbol>[A-Z0-9]+)_1h\.csv\.gz"),
                "BTCUSDT_1h.csv.gz",
                parse_csv_row,
            ),
            # Futures are another market than spot, and the files do not say the venue: it has a label of its own.
            CandleFormat(
                "candles_1m",
                "1m",
                60_000_000_000,
                "BINANCEUSDM",
                re.compile(r"(?P<base>[A-Z0-9]+)_(?P<quote>[A-Z0-9]+)_[A-Z0-9]+-1m-futures\.feather"),
                "BTC_USDT_USDT-1m-futures.feather",
                parse_binary_row,
            ),
        )
    }
)
"""What a channel of candle rows is, by its name; a further format is a further entry."""


def _bar(record: RawRecord, max_event_ahead_ns: int) -> tuple[VenueBar, int]:
    """Return the bar of a raw record and its number in its interval."""
    kind = FORMATS.get(record.channel)
    if kind is None:
        detail = f"expected a channel of {', '.join(FORMATS)}, found {record.channel[:100]!r}"
        raise DecodeError("unknown_stream", detail)
    symbol = symbol_of(record.instrument)
    if record.instrument.rpartition(".")[2] != record.venue:
        detail = f"key {record.instrument!r} is not of the header's venue {record.venue[:100]!r}"
        raise DecodeError("symbol_mismatch", detail)
    candle = kind.parse(record.payload)
    end_ns = _check_times(candle, kind, record, max_event_ahead_ns)
    if not candle.low <= min(candle.open, candle.close) <= max(candle.open, candle.close) <= candle.high:
        detail = f"expected open and close between low and high, found {_shown(record.payload)}"
        raise DecodeError("inconsistent_prices", detail)
    bar = VenueBar(
        instrument=record.instrument,
        venue=record.venue,
        symbol=symbol,
        interval=kind.interval,
        ts_start_ns=candle.ts_start_ns,
        ts_end_ns=end_ns,
        open=_price(candle.open),
        high=_price(candle.high),
        low=_price(candle.low),
        close=_price(candle.close),
        volume=_amount(candle.volume),
        ts_receive_ns=record.ts_receive_ns,
        raw_topic_id=record.topic_id,
        raw_partition=record.partition,
        raw_offset=record.offset,
        raw_index=0,
        parser_version=__version__,
    )
    return bar, candle.ts_start_ns // kind.interval_ns


def _check_times(candle: Candle, kind: CandleFormat, record: RawRecord, max_event_ahead_ns: int) -> int:
    """Return the end of the bar."""
    start_ns, end_ns = candle.ts_start_ns, candle.ts_start_ns + kind.interval_ns
    if not 0 < start_ns < _END_NS or start_ns % kind.interval_ns:
        raise DecodeError("bad_time", f"expected the start of a full {kind.interval} before 2100, found {start_ns} ns")
    if candle.end_ns is not None and candle.end_ns != end_ns:
        detail = f"expected a bar of {kind.interval} to end at {end_ns} ns, found {candle.end_ns} ns"
        raise DecodeError("bad_time", detail)
    if end_ns > record.ts_receive_ns + max_event_ahead_ns:
        detail = f"the bar ends at {end_ns} ns, after it was received at {record.ts_receive_ns} ns: it was not over"
        raise DecodeError("event_in_future", detail)
    return end_ns


def _time_ns(text: str) -> int:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise DecodeError("bad_time", f"expected a time like 2020-10-23 11:00:00+03:00, found {text[:60]!r}") from error
    if found.tzinfo is None:
        raise DecodeError("bad_time", f"expected a time with an offset from UTC, found {text[:60]!r}")
    return to_ns(found)


def _decimal_of(text: str) -> Decimal:
    if _NUMBER.fullmatch(text) is None:
        raise DecodeError("bad_decimal", f"expected a number like 40.203, found {text[:60]!r}")
    return Decimal(text)


def _price(value: Decimal) -> str:
    text = _amount(value)
    if text == "0":
        raise DecodeError("out_of_range", "expected a price above 0, found 0")
    return text


def _amount(value: Decimal) -> str:
    """Return the canonical text of a number that is not negative and fits decimal(38,18)."""
    if not value.is_finite() or not -_MAX_EXPONENT < value.adjusted() < _MAX_EXPONENT:
        raise DecodeError("out_of_range", f"expected a number that fits decimal(38,18), found {str(value)[:60]}")
    return plain_text(value)


def _shown(payload: bytes) -> str:
    return repr(payload[:_SHOWN_BYTES])[1:] + ("..." if len(payload) > _SHOWN_BYTES else "")
