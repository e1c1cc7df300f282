"""The one loop (poll, decode, process, commit) that serves every consumer.

The loop owns the Kafka consumer, the control commands, the events and the metrics. What a consumer does
with its records is a `Worker`: the transactional processors (`streaming.processors.base`) and the writer
(`streaming.writer`) are the two kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from confluent_kafka import Consumer, Message

from streamforge.offsets import TopicPartition


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one fetch gave.

    Args:
        messages: records without errors, in the order they were fetched; those of one topic-partition
            are in offset order.
        positions: `next_offset` of every topic-partition that moved, commit markers and aborted records
            included; captured by the fetching thread before the next fetch.
    """

    messages: Sequence[Message]
    positions: Mapping[TopicPartition, int]


class Worker(Protocol):
    """What a consumer process does with what the runner fetched; called from one thread only."""

    kind: str
    topics: Sequence[str]

    def open(self, consumer: Consumer) -> None:
        """Keep the consumer (for group metadata and committed offsets) before the first assignment."""

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Take over `partitions` and return the offset to start each from.

        Raises:
            FencedError: another process owns one of them in a way that cannot be taken over.
        """

    def revoked(self, partitions: Sequence[TopicPartition], *, lost: bool) -> None:
        """Finish or give up the commit in flight and forget `partitions`; `lost` means they are already gone."""

    def process(self, fetched: Fetched) -> None:
        """Take in one fetch; nothing is durable before `commit`."""

    def commit_due(self, now_s: float) -> bool:
        """Return whether it is time to commit, by the monotonic clock's seconds."""

    def commit(self) -> None:
        """Make everything taken in durable, outputs and positions together."""

    def positions(self) -> Mapping[TopicPartition, int]:
        """Return the durable `next_offset` of each topic-partition held."""

    def close(self) -> None:
        """Let go of clients and files; nothing is committed."""
