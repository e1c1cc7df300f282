"""What parsers of raw records share: Kafka records in, parsed values and refusals by record out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from confluent_kafka import Message

from streamforge.errors import DecodeError
from streamforge.market.dedupe import SeenIds
from streamforge.market.parsing import Refusal
from streamforge.market.records import RawRecord, raw_record
from streaming.processors.types import Refused, Source


class Parsed(Protocol):
    """What a pure parser gives of raw records."""

    @property
    def refusals(self) -> Sequence[Refusal]:
        """Return what could not be parsed."""


P = TypeVar("P", bound=Parsed)


def parse_raw(
    source: Source, messages: Sequence[Message], parse: Callable[[Sequence[RawRecord]], P]
) -> tuple[P, list[Refused]]:
    """Parse the records of one topic-partition; return what the parser gives, and every refusal with its record."""
    records: list[RawRecord] = []
    refused: list[Refused] = []
    for message in messages:
        try:
            records.append(raw_record(source.topic_id, message))
        except DecodeError as error:
            refused.append(Refused(message, 0, error.reason, error.detail))
    parsed = parse(records)
    if parsed.refusals:
        by_offset = {message.offset(): message for message in messages}
        refused += [Refused(by_offset[r.record.offset], r.index, r.reason, r.detail) for r in parsed.refusals]
    return parsed, refused


def restore_seen(saved: Mapping[str, str], max_intervals: int) -> dict[str, SeenIds]:
    """Return what was seen, by state key, from its saved texts."""
    return {key: SeenIds.from_text(text, max_intervals=max_intervals) for key, text in saved.items()}


def save_seen(state: Mapping[str, SeenIds], key: str) -> str | None:
    """Return what was seen under one state key as text, None where there is none."""
    seen = state.get(key)
    return None if seen is None else seen.to_text()


def changed_keys(before: Mapping[str, SeenIds], after: Mapping[str, SeenIds]) -> set[str]:
    """Return the state keys of which a parser made another value."""
    return {key for key, seen in after.items() if seen is not before.get(key)}
