"""Read topic-partitions to their end, without a group: for takeovers, status and comparisons."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import stamina
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, Message
from confluent_kafka import TopicPartition as KafkaTopicPartition
from confluent_kafka.admin import AdminClient, ListOffsetsResultInfo, OffsetSpec  # type: ignore[attr-defined]

from streamforge.errors import RetentionGapError, RetryableSourceError
from streamforge.kafka import REQUEST_TIMEOUT_S, admin_client, describe_topics, reader_config
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings

_BATCH_RECORDS = 5_000
_POLL_S = 0.2
_LEADER_TIMEOUT_S = 15.0
_LEADER_CODES = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.FENCED_LEADER_EPOCH,
    }
)

Progress = Callable[[str, int, int], None]
"""Hears what is read, how far, and of how much."""


@dataclass(frozen=True, slots=True)
class KeptRecord:
    """A record that does not come from a consumer, with the methods of its message that parsers and decoders use."""

    _partition: int
    _offset: int
    _key: bytes | None
    _value: bytes | None
    _headers: list[tuple[str, Any]] | None

    def partition(self) -> int:
        """Return the number of its topic-partition."""
        return self._partition

    def offset(self) -> int:
        """Return its offset."""
        return self._offset

    def key(self) -> bytes | None:
        """Return its key."""
        return self._key

    def value(self) -> bytes | None:
        """Return its payload."""
        return self._value

    def headers(self) -> list[tuple[str, Any]] | None:
        """Return its headers as the client gives them; None: it has none."""
        return self._headers


def log_starts(settings: Settings, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
    """Return the first offset that each topic-partition still has."""
    return _list_offsets(settings, partitions, OffsetSpec.earliest())  # type: ignore[no-untyped-call]


def log_ends(settings: Settings, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
    """Return the end offset of each topic-partition, records of open transactions included.

    The end is taken as `read_uncommitted` (a reader's own view would end at the first open transaction),
    so that whoever reads up to it waits until every transaction begun before has ended.
    """
    return _list_offsets(settings, partitions, OffsetSpec.latest())  # type: ignore[no-untyped-call]


def ask_log_ends(
    admin: AdminClient, partitions: Iterable[TopicPartition]
) -> dict[TopicPartition, Future[ListOffsetsResultInfo]]:
    """Ask for what `log_ends` returns without waiting for it.

    Keep `admin` until the answers are in: its end cancels them.
    """
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    request = {KafkaTopicPartition(item.topic, item.partition): latest for item in partitions}
    answers = admin.list_offsets(request, request_timeout=REQUEST_TIMEOUT_S)
    return {TopicPartition(key.topic, key.partition): answer for key, answer in answers.items()}


def stable_ends(settings: Settings, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
    """Return where a `read_committed` reader of each topic-partition ends now: the last stable offset."""
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    return _list_offsets(settings, partitions, latest, IsolationLevel.READ_COMMITTED)


def offsets_since(
    settings: Settings, partitions: Iterable[TopicPartition], ts_ms: int
) -> dict[TopicPartition, int | None]:
    """Return each topic-partition's first offset with a Kafka timestamp of at least `ts_ms`; None: no such record."""
    found = _list_offsets(settings, partitions, OffsetSpec.for_timestamp(ts_ms))
    return {item: offset if offset >= 0 else None for item, offset in found.items()}


def read_range(
    settings: Settings,
    starts: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    *,
    timeout_s: float = 60.0,
) -> Iterator[list[Message]]:
    """Yield the committed records of `[start, end)` of each topic-partition, in offset order within each.

    It ends when every position has reached its end, which waits for transactions that are open below it.
    `timeout_s` bounds the wait without a record, not the whole read.

    Raises:
        RetryableSourceError: nothing came for `timeout_s`; names the topic-partitions left.
        RetentionGapError: a start is below the log start.
    """
    left = {item for item, start in starts.items() if start < ends[item]}
    if not left:
        return
    consumer = Consumer(reader_config(settings))
    deadline_s = time.monotonic() + timeout_s
    try:
        consumer.assign([KafkaTopicPartition(i.topic, i.partition, starts[i]) for i in sorted(left)])
        while left:
            records = []
            for message in consumer.consume(_BATCH_RECORDS, _POLL_S):
                item = TopicPartition(message.topic() or "", message.partition() or 0)
                offset = message.offset() or 0
                if not _is_record(message):
                    if offset >= ends.get(item, offset) and _is_end(message):
                        left.discard(item)
                elif offset < ends[item]:
                    records.append(message)
                    if offset + 1 >= ends[item]:
                        left.discard(item)
                else:
                    left.discard(item)
            if records:
                yield records
                deadline_s = time.monotonic() + timeout_s
            if left and time.monotonic() > deadline_s:
                names = ", ".join(f"{item} to {ends[item]}" for item in sorted(left))
                msg = (
                    f"not read to the end, nothing came for {timeout_s} s: {names}. A transaction may be open below "
                    "the end (it ends by itself after transaction.timeout.ms), or the broker is away"
                )
                raise RetryableSourceError(msg)
    finally:
        consumer.close()


def read_topics(
    settings: Settings, topics: Iterable[str], *, progress: Progress = lambda *_: None
) -> Iterator[Message]:
    """Yield every committed record of whole topics, as far as they go now; a topic that does not exist has none.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    known = describe_topics(admin_client(settings), topics)
    partitions = [TopicPartition(name, number) for name, each in known.items() for number in range(each.partitions)]
    starts, ends = log_starts(settings, partitions), log_ends(settings, partitions)
    done, total = 0, sum(ends[item] - starts[item] for item in partitions)
    for messages in read_range(settings, starts, ends):
        yield from messages
        done += len(messages)
        progress(f"records of {len(known)} topics", done, total)


def read_records_at(
    settings: Settings, places: Iterable[tuple[TopicPartition, int]], *, timeout_s: float = 60.0
) -> dict[tuple[TopicPartition, int], Message]:
    """Return the committed record at each offset; an offset that the log does not hold is left out.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    wanted = set(places)
    partitions = {item for item, _ in wanted}
    starts, ends = log_starts(settings, partitions), stable_ends(settings, partitions)
    found: dict[tuple[TopicPartition, int], Message] = {}
    for item, offset in sorted(wanted):
        if starts[item] <= offset < ends[item]:
            for messages in read_range(settings, {item: offset}, {item: offset + 1}, timeout_s=timeout_s):
                found[item, offset] = messages[0]
    return found


def _is_end(message: Message) -> bool:
    error = message.error()
    return error is not None and error.code() == KafkaError._PARTITION_EOF  # noqa: SLF001 - librdkafka's own name


def _is_record(message: Message) -> bool:
    """Return whether it is a record; an end of partition and passing trouble of the connection are not."""
    error = message.error()
    if error is None:
        return True
    if error.code() in (KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET):  # noqa: SLF001
        where = f"{message.topic()}-{message.partition()}"
        raise RetentionGapError(f"{where}: the offset asked for is not in the log any more: {error.str()}")
    return False


def _lacks_leader(error: Exception) -> bool:
    """Return whether a topic-partition had no leader yet, or had just another one: a new topic's first moments."""
    return isinstance(error, KafkaException) and error.args[0].code() in _LEADER_CODES


def _list_offsets(
    settings: Settings,
    partitions: Iterable[TopicPartition],
    spec: OffsetSpec,
    isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
) -> dict[TopicPartition, int]:
    request = {KafkaTopicPartition(item.topic, item.partition): spec for item in partitions}
    if not request:
        return {}
    admin = admin_client(settings)  # kept until the answers are in: its end cancels them
    try:
        for attempt in stamina.retry_context(
            on=_lacks_leader, attempts=None, timeout=_LEADER_TIMEOUT_S, wait_initial=0.05, wait_max=1.0
        ):
            with attempt:
                futures = admin.list_offsets(request, isolation_level=isolation, request_timeout=REQUEST_TIMEOUT_S)
                found = {TopicPartition(key.topic, key.partition): item.result() for key, item in futures.items()}
        return {item: result.offset for item, result in found.items()}
    except KafkaException as error:
        names = ", ".join(f"{key.topic}-{key.partition}" for key in request)
        msg = f"the broker does not tell offsets of {names}: {error.args[0].str()}. Is it up? `streamforge status`"
        raise RetryableSourceError(msg) from error
