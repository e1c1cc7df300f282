"""The history parser: rows of candle files to venue bars, beside the live path and behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from confluent_kafka import Message

from streamforge.market.candles import MAX_INTERVALS, CandleState, parse_candles
from streamforge.settings import Settings
from streaming.processors.raw import changed_keys, parse_raw, restore_seen, save_seen
from streaming.processors.types import Output, Source, Step

KIND = "history-parser"
INPUT = "raw-candles-backfill"
VENUE_BARS = "venue-bars"

_ENCODE = msgspec.json.Encoder().encode


class HistoryParser:
    """Rows of candle files to `venue-bars`, each bar once; state is the bars seen, by instrument and interval.

    No event time is said for its records: history must not pass for freshness.
    """

    kind = KIND
    input_id = INPUT
    changelog_id = "history-parser-changelog"
    output_ids: Sequence[str] = (VENUE_BARS,)

    def __init__(self, settings: Settings) -> None:
        self._max_event_ahead_ns = settings.parser_limits.max_event_ahead_ns

    def restore(self, saved: Mapping[str, str]) -> CandleState:
        """Return the bars seen."""
        return restore_seen(saved, MAX_INTERVALS)

    def save(self, state: CandleState, key: str) -> str | None:
        """Return the bars seen of one instrument and interval as text."""
        return save_seen(state, key)

    def process(self, state: CandleState, source: Source, messages: Sequence[Message]) -> Step[CandleState]:
        """Parse the records of one topic-partition."""
        parsed, refused = parse_raw(
            source,
            messages,
            lambda records: parse_candles(state, records, max_event_ahead_ns=self._max_event_ahead_ns),
        )
        return Step(
            parsed.state,
            [Output(VENUE_BARS, bar.instrument.encode(), _ENCODE(bar)) for bar in parsed.bars],
            changed_keys(state, parsed.state),
            refused,
            parsed.counters,
        )
