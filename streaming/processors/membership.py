"""Whether a processor still has its slot, asked of the group: a fenced producer alone does not tell.

The broker moves a producer's epoch on when another process starts with the same slot, but also by itself
when a transaction outlives its timeout (a standstill, a suspended machine, a slow broker). Who starts joins
the group first and fences the producer then, so once a producer is fenced by a successor, the group already
has the successor as the slot's static member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from streamforge.kafka import producer_config
from streamforge.settings import Settings

_CALL_TIMEOUT_S = 10.0
_TRANSACTION_TIMEOUT_MS = 15_000


def group_metadata(consumer: Consumer) -> Any:
    """Return the member's group metadata for a transaction.

    A member that was dropped has neither id nor generation until it has joined again, and Kafka takes
    offsets with such metadata from anybody while the group is empty.

    Raises:
        KafkaException: the consumer is no member of its group now; the transaction has to be aborted.
    """
    member = consumer.memberid()
    metadata = consumer.consumer_group_metadata()
    if not member or member != consumer.memberid():
        text = "the consumer was dropped from its group and has not joined again yet"
        raise KafkaException(KafkaError(KafkaError.UNKNOWN_MEMBER_ID, text, txn_requires_abort=True))
    return metadata


def slot_refusal(
    settings: Settings, transactional_id: str, consumer: Consumer, offsets: Sequence[TopicPartition]
) -> KafkaError | None:
    """Return why the group does not take `offsets` from this member, None where it does.

    The offsets go into a transaction of its own that is aborted: no position moves and, unlike with the
    processor's own transactional id, nobody is fenced by the question.

    Raises:
        KafkaException: the broker cannot be asked.
    """
    config = {"transaction.timeout.ms": _TRANSACTION_TIMEOUT_MS}
    asker = Producer(producer_config(settings, transactional_id=f"{transactional_id}.membership", **config))
    asker.init_transactions(_CALL_TIMEOUT_S)
    asker.begin_transaction()
    refusal: KafkaError | None = None
    try:
        asker.send_offsets_to_transaction(list(offsets), group_metadata(consumer), _CALL_TIMEOUT_S)
    except KafkaException as error:
        refusal = error.args[0]
        if not error.args[0].txn_requires_abort():
            raise
    asker.abort_transaction(_CALL_TIMEOUT_S)
    return refusal
