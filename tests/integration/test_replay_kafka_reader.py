"""Bounded reads against a real broker: ends without records, open transactions, retention."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

import pytest
from confluent_kafka import Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge.errors import PermanentSourceError, RetentionGapError
from streamforge.kafka import admin_client, producer_config
from streamforge.lakehouse.kafka_reader import LogRange, log_ranges, offsets_at, read_range
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.settings import Settings
from tests.kafka_records import create_topic

pytestmark = pytest.mark.integration
TIMEOUT_S = 30.0


@pytest.fixture
def topic(platform: Settings) -> str:
    name = f"{platform.topic_prefix}reader-{uuid.uuid4().hex[:8]}"
    create_topic(admin_client(platform), name, 2)
    return name


@pytest.fixture
def transact(platform: Settings, topic: str) -> Callable[..., None]:
    """Return a function that writes values in one transaction, committed, aborted or left open."""
    open_ones = []

    def write(values: Sequence[str], *, end: str = "commit") -> None:
        name = f"{topic}.{uuid.uuid4().hex[:8]}"
        producer = Producer(producer_config(platform, transactional_id=name))
        producer.init_transactions()
        producer.begin_transaction()
        for value in values:
            producer.produce(topic, value, partition=0)
        producer.flush()
        if end == "commit":
            producer.commit_transaction()
        elif end == "abort":
            producer.abort_transaction()
        else:
            open_ones.append(producer)

    yield write
    for producer in open_ones:
        producer.abort_transaction()


def produce(settings: Settings, topic: str, values: Sequence[str], *, first_ts_ms: int | None = None) -> None:
    producer = Producer(producer_config(settings))
    for index, value in enumerate(values):
        extra = {} if first_ts_ms is None else {"timestamp": first_ts_ms + index}
        producer.produce(topic, value, partition=0, **extra)
    assert producer.flush(TIMEOUT_S) == 0


def values(settings: Settings, topic: str, start: int, end: int) -> list[tuple[int, str]]:
    chunks = read_range(settings, OffsetRange(topic, 0, start, end), timeout_s=TIMEOUT_S)
    return [(m.offset(), m.value().decode()) for chunk in chunks for m in chunk]


def test_read_range_part_of_a_log_returns_exactly_that_part(platform: Settings, topic: str) -> None:
    produce(platform, topic, [str(n) for n in range(100)])
    assert values(platform, topic, 10, 60) == [(n, str(n)) for n in range(10, 60)]
    assert values(platform, topic, 99, 100) == [(99, "99")]
    assert values(platform, topic, 5, 5) == []


def test_read_range_that_ends_in_a_commit_marker_ends(
    platform: Settings, topic: str, transact: Callable[..., None]
) -> None:
    transact(["a", "b"])  # 0, 1 and the marker at 2
    assert log_ranges(platform, [topic])[TopicPartition(topic, 0)] == (0, 3)
    assert values(platform, topic, 0, 3) == [(0, "a"), (1, "b")]
    assert values(platform, topic, 2, 3) == []
    transact(["c"])  # 3 and the marker at 4: now a record follows the range's marker
    assert values(platform, topic, 0, 3) == [(0, "a"), (1, "b")]
    assert values(platform, topic, 2, 5) == [(3, "c")]


def test_read_range_of_aborted_records_only_is_empty_and_ends(
    platform: Settings, topic: str, transact: Callable[..., None]
) -> None:
    transact(["a"])
    transact(["x", "y"], end="abort")
    assert log_ranges(platform, [topic])[TopicPartition(topic, 0)] == (0, 5)
    assert values(platform, topic, 0, 5) == [(0, "a")]
    assert values(platform, topic, 2, 4) == []


def test_log_ranges_end_at_an_open_transaction_and_reads_beyond_are_refused(
    platform: Settings, topic: str, transact: Callable[..., None]
) -> None:
    transact(["a"])
    transact(["open"], end="leave open")
    assert log_ranges(platform, [topic]) == {
        TopicPartition(topic, 0): LogRange(0, 2),
        TopicPartition(topic, 1): LogRange(0, 0),
    }
    with pytest.raises(PermanentSourceError, match=r"beyond the last stable offset 2"):
        values(platform, topic, 0, 3)


def test_read_range_below_the_log_start_says_wanted_and_log_start(platform: Settings, topic: str) -> None:
    produce(platform, topic, [str(n) for n in range(10)])
    cut = KafkaTopicPartition(topic, 0, 7)
    admin = admin_client(platform)
    admin.delete_records([cut])[cut].result()
    with pytest.raises(RetentionGapError, match=r"\[3,9\) starts below the log start 7.*\[3,7\).*starts at 7"):
        values(platform, topic, 3, 9)
    assert values(platform, topic, 7, 10) == [(n, str(n)) for n in range(7, 10)]


def test_offsets_at_returns_the_first_offset_at_or_after(platform: Settings, topic: str) -> None:
    first_ms = 1_700_000_000_000
    produce(platform, topic, [str(n) for n in range(10)], first_ts_ms=first_ms)
    here = TopicPartition(topic, 0)
    assert offsets_at(platform, [topic], first_ms)[here] == 0
    assert offsets_at(platform, [topic], first_ms + 4)[here] == 4
    assert offsets_at(platform, [topic], first_ms + 10)[here] == 10


def test_log_ranges_absent_topic_is_named(platform: Settings) -> None:
    with pytest.raises(PermanentSourceError, match=r"no-such-topic do not exist"):
        log_ranges(platform, ["no-such-topic"])


def test_read_range_of_an_absent_partition_is_named(platform: Settings, topic: str) -> None:
    with pytest.raises(PermanentSourceError, match=r"has no partition 7"):
        list(read_range(platform, OffsetRange(topic, 7, 0, 1), timeout_s=TIMEOUT_S))
