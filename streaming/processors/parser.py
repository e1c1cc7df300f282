"""The parser: raw frames to trades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from confluent_kafka import Message

from streamforge.errors import DecodeError
from streamforge.market.dedupe import SeenIds
from streamforge.market.parsing import ParserState, parse_records
from streamforge.market.records import RawRecord, raw_record
from streamforge.settings import Settings
from streaming.processors.types import Output, Refused, Source, Step

_ENCODE = msgspec.json.Encoder().encode
_TRADES = "trades"


class Parser:
    """Raw trades to trades, without what the venue sent twice; state is the ids seen, by instrument."""

    kind = "parser"
    input_id = "raw-trades"
    changelog_id = "parser-changelog"
    output_ids: Sequence[str] = (_TRADES,)

    def __init__(self, settings: Settings) -> None:
        self._limits = settings.parser_limits

    def restore(self, saved: Mapping[str, str]) -> ParserState:
        """Return the ids seen by instrument."""
        bound = self._limits.max_id_intervals
        return {key: SeenIds.from_text(text, max_intervals=bound) for key, text in saved.items()}

    def save(self, state: ParserState, key: str) -> str | None:
        """Return the ids seen of one instrument as text."""
        seen = state.get(key)
        return None if seen is None else seen.to_text()

    def process(self, state: ParserState, source: Source, messages: Sequence[Message]) -> Step[ParserState]:
        """Parse the records of one topic-partition."""
        records: list[RawRecord] = []
        refused: list[Refused] = []
        for message in messages:
            try:
                records.append(raw_record(source.topic_id, message))
            except DecodeError as error:
                refused.append(Refused(message, 0, error.reason, error.detail))
        parsed = parse_records(state, records, self._limits)
        if parsed.refusals:
            by_offset = {message.offset(): message for message in messages}
            refused += [Refused(by_offset[r.record.offset], r.index, r.reason, r.detail) for r in parsed.refusals]
        trades = parsed.trades
        return Step(
            parsed.state,
            [Output(_TRADES, trade.instrument.encode(), _ENCODE(trade)) for trade in trades],
            {key for key, seen in parsed.state.items() if seen is not state.get(key)},
            refused,
            parsed.counters,
            max((trade.ts_event_ns for trade in trades), default=None),
        )
