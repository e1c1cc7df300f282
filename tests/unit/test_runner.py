"""Which positions a fetch gives: those behind commit markers too, also after a worker went back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException

from streamforge.offsets import TopicPartition
from streaming.processors.membership import group_metadata
from streaming.runner import RunnerOptions, _Loop

ITEM = TopicPartition("t", 0)


def record(offset: int, topic: str = "t", partition: int = 0) -> Any:
    return SimpleNamespace(error=lambda: None, topic=lambda: topic, partition=lambda: partition, offset=lambda: offset)


def end(offset: int) -> Any:
    reached = KafkaError(KafkaError._PARTITION_EOF)
    return SimpleNamespace(error=lambda: reached, topic=lambda: "t", partition=lambda: 0, offset=lambda: offset)


def loop_over(*fetches: Sequence[Any], durable: dict[TopicPartition, int]) -> _Loop:
    """Return a loop whose consumer gives `fetches`; the worker holds `durable`."""
    given: Iterator[Sequence[Any]] = iter(fetches)
    loop = _Loop.__new__(_Loop)
    parts: dict[str, Any] = {
        "_consumer": SimpleNamespace(consume=lambda _count, _wait_s: next(given)),
        "_options": RunnerOptions(),
        "_held": {ITEM},
        "_seen": dict(durable),
        "_worker": SimpleNamespace(topics=["t"], positions=lambda: durable),
    }
    for name, part in parts.items():
        setattr(loop, name, part)
    return loop


def test_end_behind_markers_is_given_again_after_a_seek_back_to_the_records() -> None:
    fetch = [record(0), record(1), end(3)]
    loop = loop_over(fetch, fetch, durable={ITEM: 0})
    assert loop._fetch().positions == {ITEM: 3}
    assert loop._fetch().positions == {ITEM: 3}


def test_end_behind_markers_is_given_again_after_a_seek_back_to_the_markers() -> None:
    durable = {ITEM: 3}
    loop = loop_over([end(5)], [end(5)], [end(5)], durable=durable)
    assert loop._fetch().positions == {ITEM: 5}
    assert loop._fetch().positions == {ITEM: 5}
    durable[ITEM] = 5
    assert loop._fetch().positions == {}, "what is durable is no news"


def test_positions_are_behind_the_last_record_of_each_topic_partition_however_they_are_mixed() -> None:
    places = [("t", 0), ("t", 1), ("u", 1), ("t", 1), ("u", 0), ("t", 0)]
    fetch = [record(offset, *place) for offset, place in enumerate(places)]
    loop = loop_over(fetch, durable={})
    loop._worker.topics = ["t", "u"]
    loop._held = {TopicPartition(*place) for place in places}
    fetched = loop._fetch()
    ends = {("t", 0): 6, ("t", 1): 4, ("u", 1): 3, ("u", 0): 5}
    assert fetched.positions == {TopicPartition(*place): end for place, end in ends.items()}
    offsets = {topic: [item.offset() for item in messages] for topic, messages in fetched.by_topic().items()}
    assert offsets == {"t": [0, 1, 3, 5], "u": [2, 4]}


def test_group_metadata_of_a_consumer_outside_its_group_is_refused() -> None:
    with Consumer({"group.id": "g", "bootstrap.servers": ""}) as consumer, pytest.raises(KafkaException) as refused:
        group_metadata(consumer)
    error = refused.value.args[0]
    assert (error.code(), error.txn_requires_abort()) == (KafkaError.UNKNOWN_MEMBER_ID, True)
