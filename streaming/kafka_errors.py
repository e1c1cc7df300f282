"""Kafka's errors as ours: which pass by themselves, which mean that another has taken over."""

from __future__ import annotations

from confluent_kafka import KafkaError

from streamforge.errors import FencedError, PermanentSourceError, RetryableSourceError, StreamForgeError

_PRODUCER_FENCED_CODES = frozenset(
    {
        KafkaError.PRODUCER_FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.TRANSACTION_COORDINATOR_FENCED,
        KafkaError._FENCED,  # noqa: SLF001 - librdkafka's own name
    }
)
_PASSING_CODES = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
        KafkaError._TRANSPORT,  # noqa: SLF001
        KafkaError._RESOLVE,  # noqa: SLF001
        KafkaError._TIMED_OUT,  # noqa: SLF001
        KafkaError._MAX_POLL_EXCEEDED,  # noqa: SLF001
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
    }
)
_UNKNOWN_TOPIC_CODES = frozenset(
    {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}  # noqa: SLF001
)


def is_passing(error: KafkaError) -> bool:
    """Return whether the client gets over the error by itself or the same call can be repeated."""
    if error.fatal() or error.code() in _UNKNOWN_TOPIC_CODES:
        return False
    return error.retriable() or error.code() in _PASSING_CODES


def is_fenced(error: KafkaError) -> bool:
    """Return whether another process has taken over: only the group's static membership tells that."""
    # A fatal error hides its cause's code from Python; only its text names it.
    hidden = error.code() == KafkaError._FATAL and "group.instance.id" in error.str()  # noqa: SLF001
    return hidden or error.code() == KafkaError.FENCED_INSTANCE_ID


def is_producer_fenced(error: KafkaError) -> bool:
    """Return whether the broker has moved the producer's epoch on.

    It does so for another producer with the same transactional id, and also by itself, when it ends a
    transaction that was open for longer than its timeout: this alone does not mean that anybody is there.
    """
    hidden = error.code() == KafkaError._FATAL and "fenced" in error.str().lower()  # noqa: SLF001
    return (hidden and not is_fenced(error)) or error.code() in _PRODUCER_FENCED_CODES


def kafka_error(what: str, error: KafkaError) -> StreamForgeError:
    """Return our error for one of Kafka's; `what` says what was being done, and where."""
    text = f"{what}: {error.name()}: {error.str()}"
    if is_fenced(error):
        return FencedError(f"{text}. Another process with the same slot has taken over; give each replica its own slot")
    if is_producer_fenced(error):
        return RetryableSourceError(
            f"{text}. The broker ended the transaction after its timeout, or a process with the same slot is starting"
        )
    if error.code() in _UNKNOWN_TOPIC_CODES:
        return PermanentSourceError(f"{text}. Create the topics with `streamforge contracts apply`")
    if is_passing(error):
        return RetryableSourceError(f"{text}. Is the broker up? `streamforge broker status`")
    return PermanentSourceError(text)
