"""The parser: raw frames to trades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from confluent_kafka import Message

from streamforge.market.parsing import ParserState, parse_records
from streamforge.settings import Settings
from streaming.processors.raw import changed_keys, parse_raw, restore_seen, save_seen
from streaming.processors.types import Output, Source, Step

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
        return restore_seen(saved, self._limits.max_id_intervals)

    def save(self, state: ParserState, key: str) -> str | None:
        """Return the ids seen of one instrument as text."""
        return save_seen(state, key)

    def process(self, state: ParserState, source: Source, messages: Sequence[Message]) -> Step[ParserState]:
        """Parse the records of one topic-partition."""
        parsed, refused = parse_raw(source, messages, lambda records: parse_records(state, records, self._limits))
        trades = parsed.trades
        return Step(
            parsed.state,
            [Output(_TRADES, trade.instrument.encode(), _ENCODE(trade)) for trade in trades],
            changed_keys(state, parsed.state),
            refused,
            parsed.counters,
            max((trade.ts_event_ns for trade in trades), default=None),
        )
