"""Bounded reads of Kafka: what a log holds, and the committed records of an offset range.

Reads are by assignment, without a group, and `read_committed`. A range is `[start, end)`; its last offsets
may hold no record at all (commit markers, aborted records), so the end is found by the consumer's position
and end-of-partition events, never by counting records or by the last record's offset.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message
from confluent_kafka import IsolationLevel as Isolation
from confluent_kafka import TopicPartition as KafkaTopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from streamforge.errors import PermanentSourceError, RetentionGapError, RetryableSourceError
from streamforge.kafka import REQUEST_TIMEOUT_S, admin_client, describe_topics, reader_config
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.settings import Settings

CHUNK_RECORDS = 10_000
PREFETCH_KIB = 16 * 1024

_POLL_S = 0.1
_GAP_CODES = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})  # noqa: SLF001
_NO_OFFSET = -1
_EARLIEST = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
_LATEST = OffsetSpec.latest()  # type: ignore[no-untyped-call]


class LogRange(NamedTuple):
    """What a topic-partition holds for a `read_committed` reader: offsets `[log_start, stable_end)`.

    `stable_end` is Kafka's last stable offset: an open transaction holds it back.
    """

    log_start: int
    stable_end: int


def log_ranges(settings: Settings, topics: Iterable[str]) -> Mapping[TopicPartition, LogRange]:
    """Return the log of every topic-partition of `topics`.

    Raises:
        PermanentSourceError: a topic does not exist.
        RetryableSourceError: the broker does not answer.
    """
    partitions = _partitions(settings, topics)
    starts = _list_offsets(settings, partitions, _EARLIEST)
    ends = _list_offsets(settings, partitions, _LATEST)
    return {each: LogRange(starts[each], ends[each]) for each in partitions}


def offsets_at(settings: Settings, topics: Iterable[str], ts_ms: int) -> Mapping[TopicPartition, int]:
    """Return the first offset of every topic-partition whose record was produced at or after `ts_ms`.

    Where there is none it is the stable end. Kafka finds it by the records' timestamps, which are produce
    times and, between producers, not strictly rising.

    Raises:
        PermanentSourceError: a topic does not exist.
        RetryableSourceError: the broker does not answer.
    """
    partitions = _partitions(settings, topics)
    found = _list_offsets(settings, partitions, OffsetSpec.for_timestamp(ts_ms))
    ends = _list_offsets(settings, partitions, _LATEST)
    return {each: ends[each] if found[each] == _NO_OFFSET else min(found[each], ends[each]) for each in partitions}


def read_range(
    settings: Settings, offset_range: OffsetRange, *, timeout_s: float, chunk_records: int = CHUNK_RECORDS
) -> Iterator[list[Message]]:
    """Yield the committed records of `offset_range` in offset order, in lists of at most `chunk_records`.

    Memory is bounded by one list and the client's prefetch of `PREFETCH_KIB`.

    Args:
        settings: which cluster.
        offset_range: what to read; may be empty, may hold no record.
        timeout_s: longest wait without progress, not the length of the whole read.
        chunk_records: most records in one list.

    Raises:
        RetentionGapError: the range starts below the log start.
        PermanentSourceError: the range ends beyond the stable end, or the broker refuses the read.
        RetryableSourceError: no progress for `timeout_s`.
    """
    if len(offset_range) == 0:
        return
    config = reader_config(settings, **{"queued.max.messages.kbytes": PREFETCH_KIB})
    with Consumer(config) as consumer:
        check_within_log(offset_range, _log_range(consumer, offset_range.topic_partition, timeout_s))
        consumer.assign([KafkaTopicPartition(offset_range.topic, offset_range.partition, offset_range.start)])
        position = offset_range.start
        deadline_s = time.monotonic() + timeout_s
        while position < offset_range.end:
            fetched = consumer.consume(min(chunk_records, offset_range.end - position), _POLL_S)
            before = position
            records = []
            for message in fetched:
                if message.error() is None:
                    position = _offset(message) + 1
                    if position <= offset_range.end:
                        records.append(message)
                else:
                    position = max(position, _end_of_partition(message, offset_range))
            if records:
                yield records
            if position > before:
                deadline_s = time.monotonic() + timeout_s
            elif time.monotonic() > deadline_s:
                msg = (
                    f"reading {offset_range} made no progress for {timeout_s} s at offset {position}. "
                    "Is the broker up? `streamforge broker status`"
                )
                raise RetryableSourceError(msg)


def check_within_log(wanted: OffsetRange, log: LogRange) -> None:
    """Refuse a range that Kafka no longer has, or does not have yet.

    Raises:
        RetentionGapError: the range starts below the log start.
        PermanentSourceError: the range ends beyond the stable end.
    """
    if wanted.start < log.log_start:
        msg = (
            f"{wanted} starts below the log start {log.log_start}: Kafka has removed offsets "
            f"[{wanted.start},{min(wanted.end, log.log_start)}) by retention. "
            f"Ask for a range that starts at {log.log_start} or later"
        )
        raise RetentionGapError(msg)
    if wanted.end > log.stable_end:
        msg = (
            f"{wanted} ends beyond the last stable offset {log.stable_end} of {wanted.topic_partition}. "
            f"Ask for an end of at most {log.stable_end}, or wait: an open transaction may hold it back"
        )
        raise PermanentSourceError(msg)


def _log_range(consumer: Consumer, each: TopicPartition, timeout_s: float) -> LogRange:
    try:
        return LogRange(
            *consumer.get_watermark_offsets(
                KafkaTopicPartition(each.topic, each.partition), timeout=timeout_s, cached=False
            )
        )
    except KafkaException as error:
        raise _refused(f"the log of {each} cannot be looked up", error.args[0]) from error


def _offset(message: Message) -> int:
    offset = message.offset()
    if offset is None:  # pragma: no cover - consumed records always have one
        msg = "a consumed record has no offset"
        raise PermanentSourceError(msg)
    return offset


def _end_of_partition(message: Message, wanted: OffsetRange) -> int:
    """Return the position that an end-of-partition event carries, 0 for an error that may pass."""
    error = message.error()
    if error is None or error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
        return _offset(message)
    if error.code() in _GAP_CODES:
        msg = f"{wanted} is no longer whole: {error.str()}. Ask for the log of now and try again"
        raise RetentionGapError(msg)
    if error.retriable():
        return 0
    raise _refused(f"reading {wanted} failed", error)


def _partitions(settings: Settings, topics: Iterable[str]) -> list[TopicPartition]:
    names = list(topics)
    identities = describe_topics(admin_client(settings), names)
    absent = sorted(set(names) - set(identities))
    if absent:
        msg = (
            f"topics {', '.join(absent)} do not exist on this cluster. "
            "Create them with `streamforge contracts apply`, or check STREAMFORGE_TOPIC_PREFIX"
        )
        raise PermanentSourceError(msg)
    return [TopicPartition(name, number) for name in names for number in range(identities[name].partitions)]


def _list_offsets(
    settings: Settings, partitions: Iterable[TopicPartition], spec: OffsetSpec
) -> dict[TopicPartition, int]:
    wanted = {KafkaTopicPartition(each.topic, each.partition): spec for each in partitions}
    if not wanted:
        return {}
    admin = admin_client(settings)  # held until the results are in: its end cancels them
    try:
        futures = admin.list_offsets(
            wanted, isolation_level=Isolation.READ_COMMITTED, request_timeout=REQUEST_TIMEOUT_S
        )
        return {TopicPartition(each.topic, each.partition): future.result().offset for each, future in futures.items()}
    except KafkaException as error:
        raise _refused("the broker does not list offsets", error.args[0]) from error


def _refused(what: str, error: KafkaError) -> RetryableSourceError | PermanentSourceError:
    kind = RetryableSourceError if error.retriable() or _may_pass(error) else PermanentSourceError
    return kind(f"{what}: {error.str()}. Is the broker up? `streamforge broker status`")


def _may_pass(error: KafkaError) -> bool:
    return error.code() in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN)  # noqa: SLF001
