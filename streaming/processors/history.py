"""The history parser: rows of candle files to venue bars, beside the live path and behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from confluent_kafka import Message

from streamforge.errors import DecodeError
from streamforge.market.candles import MAX_INTERVALS, CandleState, parse_candles
from streamforge.market.dedupe import SeenIds
from streamforge.market.records import RawRecord, raw_record
from streamforge.settings import Settings
from streaming.processors.types import Output, Refused, Source, Step

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
        return {key: SeenIds.from_text(text, max_intervals=MAX_INTERVALS) for key, text in saved.items()}

    def save(self, state: CandleState, key: str) -> str | None:
        """Return the bars seen of one instrument and interval as text."""
        seen = state.get(key)
        return None if seen is None else seen.to_text()

    def process(self, state: CandleState, source: Source, messages: Sequence[Message]) -> Step[CandleState]:
        """Parse the records of one topic-partition."""
        records: list[RawRecord] = []
        refused: list[Refused] = []
        for message in messages:
            try:
                records.append(raw_record(source.topic_id, message))
            except DecodeError as error:
                refused.append(Refused(message, 0, error.reason, error.detail))
        parsed = parse_candles(state, records, max_event_ahead_ns=self._max_event_ahead_ns)
        if parsed.refusals:
            by_offset = {message.offset(): message for message in messages}
            refused += [Refused(by_offset[r.record.offset], r.index, r.reason, r.detail) for r in parsed.refusals]
        return Step(
            parsed.state,
            [Output(VENUE_BARS, bar.instrument.encode(), _ENCODE(bar)) for bar in parsed.bars],
            {key for key, seen in parsed.state.items() if seen is not state.get(key)},
            refused,
            parsed.counters,
        )
