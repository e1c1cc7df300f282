"""Raw records to trades: one pure function for the live parser, for replays and for verification.

`parse_records` never fails on data: what cannot be a trade becomes a refusal with a reason, what the venue
sent twice is dropped and counted, and protocol messages are counted too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from streamforge import __version__
from streamforge.errors import DecodeError
from streamforge.market.binance import VenueTrade, parse_trades
from streamforge.market.dedupe import MAX_INTERVALS, SeenIds, Verdict
from streamforge.market.records import RawRecord, Trade

PARSER_VERSION = __version__
DUPLICATES = "duplicates"
SKIPPED_PROTOCOL = "skipped.protocol_message"
TOO_OLD_TO_DEDUPE = "too_old_to_dedupe"

ParserState = Mapping[str, SeenIds]
"""Ids seen by instrument."""

FrameParser = Callable[[bytes], list[VenueTrade] | None]

PARSERS: Mapping[str, FrameParser] = MappingProxyType({"trade": parse_trades})
"""What parses the trades of a channel, by its kind; a further channel of trades is a further line.

Another kind of event is another `Processor` of the same loop: its input, its outputs, its pure step. The history
parser is one.
"""

_CACHED_INSTRUMENTS = 4_096
_PROTOCOL_CHANNEL = "unknown"


@dataclass(frozen=True, slots=True)
class ParserLimits:
    """Bounds of what is believed.

    Args:
        max_event_ahead_ns: an event time further than this after receipt is refused.
        max_id_intervals: intervals of seen ids that are kept for each instrument.
    """

    max_event_ahead_ns: int = 60_000_000_000
    max_id_intervals: int = MAX_INTERVALS


@dataclass(frozen=True, slots=True)
class Refusal:
    """A raw record, or the event at `index` in it, that is no trade, and why."""

    record: RawRecord
    index: int
    reason: str
    detail: str


class Parsed(NamedTuple):
    """What raw records gave; `state` shares with the former one what did not change."""

    state: ParserState
    trades: list[Trade]
    refusals: list[Refusal]
    counters: Mapping[str, int]


_DEFAULT_LIMITS = ParserLimits()


def parse_records(state: ParserState, records: Iterable[RawRecord], limits: ParserLimits = _DEFAULT_LIMITS) -> Parsed:
    """Parse raw records in their order; `state` stays as it was.

    Args:
        state: ids seen before, by instrument.
        records: raw records; those of one instrument in the order of their topic-partition.
        limits: bounds of what is believed.

    Returns:
        The state after them, trades and refusals in the order of the records, and the counters
        `duplicates` and `skipped.protocol_message`.
    """
    trades: list[Trade] = []
    refusals: list[Refusal] = []
    counters: Counter[str] = Counter()
    touched: dict[str, SeenIds] = {}
    for record in records:
        try:
            events = _events(record)
        except DecodeError as error:
            refusals.append(Refusal(record, 0, error.reason, error.detail))
            continue
        if events is None:
            counters[SKIPPED_PROTOCOL] += 1
            continue
        for index, event in enumerate(events):
            try:
                _check(record, event, limits)
                seen = touched.get(record.instrument) or _touch(touched, state, record.instrument, limits)
                verdict = seen.add(event.trade_id)
                if verdict is Verdict.NEW:
                    trades.append(_trade(record, index, event))
                elif verdict is Verdict.DUPLICATE:
                    counters[DUPLICATES] += 1
                else:
                    refusals.append(_too_old(record, index, event, seen))
            except DecodeError as error:
                refusals.append(Refusal(record, index, error.reason, error.detail))
    return Parsed({**state, **touched}, trades, refusals, counters)


def symbol_of(instrument: str) -> str:
    """Return the venue's name of an instrument `BASE-QUOTE.VENUE`, as spot venues of Binance's kind make it.

    Raises:
        DecodeError: `bad_key` where it is not an instrument.
    """
    return _instrument_parts(instrument)[0]


@lru_cache(maxsize=_CACHED_INSTRUMENTS)
def _instrument_parts(instrument: str) -> tuple[str, str]:
    pair, dot, venue = instrument.rpartition(".")
    base, dash, quote = pair.partition("-")
    if not (dot and dash and base and quote and venue):
        raise DecodeError("bad_key", f"expected the key to be BASE-QUOTE.VENUE, found {instrument[:100]!r}")
    return base + quote, venue


def _events(record: RawRecord) -> list[VenueTrade] | None:
    parser = PARSERS.get(record.channel)
    if parser is not None:
        return parser(record.payload)
    if record.channel == _PROTOCOL_CHANNEL and parse_trades(record.payload) is None:
        return None
    detail = f"expected a channel of {', '.join(PARSERS)}, found {record.channel[:100]!r}"
    raise DecodeError("unknown_stream", detail)


def _check(record: RawRecord, event: VenueTrade, limits: ParserLimits) -> None:
    symbol, venue = _instrument_parts(record.instrument)
    if event.symbol != symbol or record.venue != venue:
        detail = (
            f"key {record.instrument!r} and header venue {record.venue[:100]!r} do not belong to "
            f"symbol {event.symbol[:100]!r}; expected {symbol!r} of {venue!r}"
        )
        raise DecodeError("symbol_mismatch", detail)
    ahead_ns = event.ts_event_ns - record.ts_receive_ns
    if ahead_ns > limits.max_event_ahead_ns:
        detail = (
            f"event time {event.ts_event_ns} ns is {ahead_ns / 1e9:.3f} s after receipt; "
            f"at most {limits.max_event_ahead_ns / 1e9:g} s are believed"
        )
        raise DecodeError("event_in_future", detail)


def _touch(touched: dict[str, SeenIds], state: ParserState, instrument: str, limits: ParserLimits) -> SeenIds:
    known = state.get(instrument)
    seen = SeenIds(max_intervals=limits.max_id_intervals) if known is None else known.copy()
    touched[instrument] = seen
    return seen


def _trade(record: RawRecord, index: int, event: VenueTrade) -> Trade:
    return Trade(
        record.instrument,
        record.venue,
        event.symbol,
        str(event.trade_id),
        event.price,
        event.size,
        event.aggressor_side,
        event.ts_event_ns,
        record.ts_receive_ns,
        record.topic_id,
        record.partition,
        record.offset,
        index,
        PARSER_VERSION,
    )


def _too_old(record: RawRecord, index: int, event: VenueTrade, seen: SeenIds) -> Refusal:
    detail = f"trade id {event.trade_id} is below {seen.floor}, from which on duplicates can be told"
    return Refusal(record, index, TOO_OLD_TO_DEDUPE, detail)
