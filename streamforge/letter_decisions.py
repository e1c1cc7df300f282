"""What was decided about dead letters, in the topic `letter-decisions`: a product like others, with a table.

A decision is only ever added. Of several about one letter the latest counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from streamforge.contract_model import Contracts
from streamforge.dead_letters import UNREADABLE
from streamforge.errors import RetryableSourceError
from streamforge.kafka import producer_config
from streamforge.log_reader import read_topics
from streamforge.settings import Settings
from streamforge.supervision import topic_of

DECISIONS_CONTRACT = "letter-decisions"
_FLUSH_TIMEOUT_S = 30.0


class DecisionKind(StrEnum):
    """What can be decided about a letter."""

    REDRIVEN = "redriven"
    DISCARDED = "discarded"


class LetterDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One record of `letter-decisions`: what was decided about one letter, by whom and why."""

    letter_id: str
    decision: DecisionKind
    topic: str
    topic_id: str
    record_partition: int
    record_offset: int
    record_index: int
    processor: str
    reason: str
    why: str
    who: str
    redrive_commit_id: str | None = None
    ts_decided_ns: int


def latest_decisions(settings: Settings, contracts: Contracts) -> dict[str, LetterDecision]:
    """Return the latest decision about each letter by its id: one topic-partition has them all, in their order.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    decoder = msgspec.json.Decoder(LetterDecision)
    found: dict[str, LetterDecision] = {}
    for message in read_topics(settings, [topic_of(contracts, DECISIONS_CONTRACT).name]):
        try:
            decision = decoder.decode(message.value() or b"")
        except UNREADABLE:
            continue  # Not one of ours; the writer makes it a dead letter.
        found[decision.letter_id] = decision
    return found


def record_decisions(settings: Settings, contracts: Contracts, decisions: Sequence[LetterDecision]) -> None:
    """Write decisions down; each is safe with the broker when this returns.

    Raises:
        RetryableSourceError: the broker does not have them all; to decide again does no harm.
    """
    topic = topic_of(contracts, DECISIONS_CONTRACT).name
    failures: list[str] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failures.append(error.str())

    producer = Producer(producer_config(settings))
    for each in decisions:
        while True:
            try:
                producer.produce(topic, msgspec.json.encode(each), each.letter_id.encode(), on_delivery=delivered)
                break
            except BufferError:
                producer.poll(0.1)
    left = producer.flush(_FLUSH_TIMEOUT_S)
    if left or failures:
        said = failures[0] if failures else f"no answer within {_FLUSH_TIMEOUT_S:g} s"
        msg = (
            f"not all of {len(decisions)} decisions were written to {topic}: {said}. Is the broker up, and the topic "
            "there (`streamforge contracts apply`)? Decide again: it does no harm"
        )
        raise RetryableSourceError(msg)
