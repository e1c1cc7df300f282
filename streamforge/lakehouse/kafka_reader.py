"""Bounded reads of what is committed: what a log holds, and the records of an offset range.

On top of `streamforge.log_reader`: a range must lie within the log as a `read_committed` reader sees it,
because a replay or a comparison of half a range would be wrong. A range is `[start, end)`; its last offsets
may hold no record at all (commit markers, aborted records).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from confluent_kafka import Message

from streamforge.errors import PermanentSourceError, RetentionGapError
from streamforge.kafka import TopicIdentity, admin_client, describe_topics
from streamforge.log_reader import log_starts, offsets_since, stable_ends
from streamforge.log_reader import read_range as read_to_end
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.settings import Settings


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
    return _log_ranges(settings, topic_partitions(settings, topics))


def offsets_at(settings: Settings, topics: Iterable[str], ts_ms: int) -> Mapping[TopicPartition, int]:
    """Return the first offset of every topic-partition whose record was produced at or after `ts_ms`.

    Where there is none it is the stable end. Kafka finds it by the records' timestamps, which are produce
    times and, between producers, not strictly rising.

    Raises:
        PermanentSourceError: a topic does not exist.
        RetryableSourceError: the broker does not answer.
    """
    partitions = topic_partitions(settings, topics)
    found, ends = offsets_since(settings, partitions, ts_ms), stable_ends(settings, partitions)
    return {each: end if (offset := found[each]) is None else min(offset, end) for each, end in ends.items()}


def read_range(settings: Settings, offset_range: OffsetRange, *, timeout_s: float) -> Iterator[list[Message]]:
    """Yield the committed records of `offset_range` in offset order, in lists of a few thousand.

    Memory is bounded by one list and what the client fetches ahead (64 MiB by default).

    Args:
        settings: which cluster.
        offset_range: what to read; may be empty, may hold no record.
        timeout_s: longest wait without a record, not the length of the whole read.

    Raises:
        RetentionGapError: the range starts below the log start.
        PermanentSourceError: the topic-partition does not exist, or the range ends beyond the stable end.
        RetryableSourceError: nothing came for `timeout_s`.
    """
    if len(offset_range) == 0:
        return
    here = offset_range.topic_partition
    log = _log_ranges(settings, topic_partitions(settings, [here.topic])).get(here)
    if log is None:
        msg = f"topic {here.topic} has no partition {here.partition}. Ask for a partition that it has"
        raise PermanentSourceError(msg)
    check_within_log(offset_range, log)
    yield from read_to_end(settings, {here: offset_range.start}, {here: offset_range.end}, timeout_s=timeout_s)


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


def topic_identity(settings: Settings, topic: str) -> TopicIdentity:
    """Return what tells `topic` from another of the same name.

    Raises:
        PermanentSourceError: it does not exist.
        RetryableSourceError: the broker does not answer.
    """
    return _identities(settings, [topic])[topic]


def topic_partitions(settings: Settings, topics: Iterable[str]) -> list[TopicPartition]:
    """Return every topic-partition of `topics`.

    Raises:
        PermanentSourceError: a topic does not exist.
        RetryableSourceError: the broker does not answer.
    """
    identities = _identities(settings, topics)
    return [TopicPartition(name, number) for name, each in identities.items() for number in range(each.partitions)]


def _identities(settings: Settings, topics: Iterable[str]) -> Mapping[str, TopicIdentity]:
    names = list(topics)
    admin = admin_client(settings)
    identities = describe_topics(admin, names)
    absent = sorted(set(names) - set(identities))
    if absent:
        msg = (
            f"topics {', '.join(absent)} do not exist on this cluster. "
            "Create them with `streamforge contracts apply`, or check STREAMFORGE_TOPIC_PREFIX"
        )
        raise PermanentSourceError(msg)
    return identities


def _log_ranges(settings: Settings, partitions: list[TopicPartition]) -> Mapping[TopicPartition, LogRange]:
    starts, ends = log_starts(settings, partitions), stable_ends(settings, partitions)
    return {each: LogRange(starts[each], ends[each]) for each in partitions}
