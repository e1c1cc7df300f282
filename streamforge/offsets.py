"""Positions in Kafka: topic-partitions, offset ranges, and the keys they are stored under in a table.

Ranges are half-open, `[start, end)`. `next_offset` is the first offset not yet written: the
consumer's position after a batch, commit markers included, which is not last offset + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from streamforge.errors import ConfigurationError


@dataclass(frozen=True, slots=True, order=True)
class TopicPartition:
    """Kafka's topic-partition as a hashable value."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}"


@dataclass(frozen=True, slots=True, order=True)
class OffsetRange:
    """Offsets `[start, end)` of one topic-partition in one source epoch."""

    topic: str
    partition: int
    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            msg = (
                f"offset range of {self.topic}-{self.partition} must satisfy 0 <= start <= end, "
                f"found start={self.start} end={self.end}"
            )
            raise ConfigurationError(msg)

    @property
    def topic_partition(self) -> TopicPartition:
        """Return the topic-partition the range lies in."""
        return TopicPartition(self.topic, self.partition)

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}[{self.start},{self.end})"


@dataclass(frozen=True, slots=True)
class OffsetMap:
    """`next_offset` for each topic-partition; merged, never overwritten as a whole."""

    offsets: Mapping[TopicPartition, int]

    def __iter__(self) -> Iterator[tuple[TopicPartition, int]]:
        return iter(sorted(self.offsets.items()))

    def merged(self, newer: Mapping[TopicPartition, int]) -> OffsetMap:
        """Return a map in which `newer` replaces the entries that it has."""
        return OffsetMap({**self.offsets, **newer})


def total_records(ranges: Iterable[OffsetRange]) -> int:
    """Return the sum of offsets in `ranges`; an upper bound of records in transactional topics."""
    return sum(len(r) for r in ranges)


def without(ranges: Iterable[OffsetRange], removed: Iterable[OffsetRange]) -> list[OffsetRange]:
    """Return what of `ranges` lies in none of `removed`."""
    left = list(ranges)
    for hole in removed:
        left = [part for each in left for part in _around(each, hole)]
    return left


def below(ranges: Iterable[OffsetRange], log_starts: Mapping[TopicPartition, int]) -> tuple[OffsetRange, ...]:
    """Return what of `ranges` lies below the log start of its topic-partition; nothing of one that has none."""
    cut = ((each, min(each.end, log_starts.get(each.topic_partition, 0))) for each in ranges)
    return tuple(OffsetRange(each.topic, each.partition, each.start, end) for each, end in cut if each.start < end)


def _around(each: OffsetRange, hole: OffsetRange) -> list[OffsetRange]:
    if each.topic_partition != hole.topic_partition or hole.end <= each.start or each.end <= hole.start:
        return [each]
    before = (each.start, max(each.start, hole.start))
    behind = (min(each.end, hole.end), each.end)
    return [OffsetRange(each.topic, each.partition, *part) for part in (before, behind) if part[0] < part[1]]
