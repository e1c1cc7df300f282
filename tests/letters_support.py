"""What the tests of dead letters share: a parser with a fault, letters about records, and how to read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from confluent_kafka import Message, Producer

from streamforge.dead_letters import encode_dead_letter, make_dead_letter
from streamforge.kafka import producer_config
from streamforge.lakehouse.kafka_reader import topic_identity
from streamforge.market.parsing import Parsed, ParserState, Refusal, parse_records
from streamforge.market.records import RawRecord
from tests.pipeline_support import TOPICS, Pipeline, committed

LETTER_TOPICS = (*TOPICS, "letter-decisions")
PLANTED = "planted_fault"


def faulty(state: ParserState, records: Iterable[RawRecord], *limits: Any) -> Parsed:
    """Parse with two bugs: trades of odd ids are refused, and that of id 4 gets a price that no table takes."""
    taken = list(records)
    parsed = parse_records(state, taken, *limits)
    by_place = {(each.partition, each.offset): each for each in taken}
    odd = [each for each in parsed.trades if int(each.trade_id) % 2]
    refused = [Refusal(by_place[t.raw_partition, t.raw_offset], t.raw_index, PLANTED, "an odd id") for t in odd]
    kept = [
        msgspec.structs.replace(each, price="1e3") if each.trade_id == "4" else each
        for each in parsed.trades
        if each not in odd
    ]
    return parsed._replace(trades=kept, refusals=[*parsed.refusals, *refused])


def plant_letters(pipeline: Pipeline, messages: Iterable[Message], *, reason: str = PLANTED, times: int = 1) -> None:
    """Write the dead letters that the parser writes when it refuses raw records."""
    topic = topic_identity(pipeline.settings, pipeline.topic("raw-trades"))
    producer = Producer(producer_config(pipeline.settings))
    for number, message in enumerate(messages):
        value = message.value() or b""
        letter = make_dead_letter(
            topic=topic.topic,
            topic_id=topic.topic_id,
            partition=message.partition() or 0,
            offset=message.offset() or 0,
            index=0,
            reason=reason,
            detail="planted",
            processor="parser",
            ts_ns=1_700_000_000_000_000_000 + number,
            key=message.key(),
            payload=value if isinstance(value, bytes) else value.encode(),
            headers=message.headers(),
        )
        key, data = encode_dead_letter(letter, max_bytes=1_000_000)
        for _ in range(times):
            producer.produce(pipeline.topic("raw-trades.dlq"), data, key)
    assert producer.flush(30) == 0


def raw_messages(pipeline: Pipeline) -> list[Message]:
    """Return the raw records by topic-partition and offset."""
    return committed(pipeline, "raw-trades")
