"""The barrier: a replay never reaches past what the live path has landed.

A range whose rows are still under way would be re-made now and landed once more by the writer afterwards. So
before anything is planned, in this order:

1. for a table that is made by a processor: its committed position on the source topic is at or past the
   range's end. Every row of the range is then in the table's own topic, or never will be;
2. where that topic ends now is taken, *with* the records of open transactions. The processor's offsets become
   visible before the commit markers reach the topic, so the last stable offset may still lie below the rows;
3. the table's `next_offset` has reached those ends. For a table that is fed from the source topic itself only
   this step is there, with the range's end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge.errors import RetryableSourceError
from streamforge.kafka import REQUEST_TIMEOUT_S, admin_client
from streamforge.lakehouse.kafka_reader import topic_partitions
from streamforge.log_reader import log_ends
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.settings import Settings

NOTHING = 0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Condition:
    """One position that has to be reached: whose, where, and how far it is."""

    who: str
    topic_partition: TopicPartition
    needed: int
    reached: int

    @property
    def behind(self) -> int:
        """Return how many offsets are missing."""
        return max(0, self.needed - self.reached)

    def __str__(self) -> str:
        return f"{self.who} is at {self.reached} of {self.needed} on {self.topic_partition}, {self.behind} behind"

    def as_dict(self) -> dict[str, Any]:
        """Return the condition as plain values for a JSON report."""
        return {
            "who": self.who,
            "topic_partition": str(self.topic_partition),
            "needed": self.needed,
            "reached": self.reached,
            "behind": self.behind,
        }


@dataclass(frozen=True, slots=True)
class BarrierState:
    """How far the live path is; where a processor is behind, the table's ends are not known yet."""

    conditions: tuple[Condition, ...]

    @property
    def missing(self) -> tuple[Condition, ...]:
        """Return the conditions that do not hold yet."""
        return tuple(each for each in self.conditions if each.behind)

    def as_dict(self) -> dict[str, Any]:
        """Return the barrier as plain values for a JSON report."""
        return {"reached": not self.missing, "conditions": [each.as_dict() for each in self.conditions]}


@dataclass(frozen=True, slots=True)
class Barrier:
    """What has to be landed before `ranges` may be replayed.

    Args:
        settings: which cluster.
        ranges: source ranges that are going to be replayed.
        table: name of the table, for messages.
        group: consumer group of the processor between, None where the table is fed from the source topic.
        topic: topic that the table is fed from.
        next_offsets: reads the table's `next_offset` by topic-partition number, anew at each call.
    """

    settings: Settings
    ranges: Sequence[OffsetRange]
    table: str
    group: str | None
    topic: str
    next_offsets: Callable[[], Mapping[int, int]]

    def look(self) -> BarrierState:
        """Return how far the live path is now."""
        processed = self._processed()
        if any(each.behind for each in processed):
            return BarrierState(tuple(processed))
        return BarrierState((*processed, *self._landed(self._ends())))

    def wait(
        self,
        wait_s: float,
        *,
        on_look: Callable[[BarrierState], None] = lambda _: None,
        monotonic_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> BarrierState:
        """Wait until everything is landed; `on_look` hears of each look.

        Raises:
            RetryableSourceError: it is not within `wait_s`; says what is behind and by how much.
        """
        deadline_s = monotonic_s() + wait_s
        ends: Mapping[TopicPartition, int] | None = None
        while True:
            processed = self._processed()
            if ends is None and not any(each.behind for each in processed):
                # Taken once: later records are of later source offsets, and a live topic's end runs away.
                ends = self._ends()
            landed = [] if ends is None else self._landed(ends)
            state = BarrierState((*processed, *landed))
            on_look(state)
            if not state.missing:
                return state
            if monotonic_s() > deadline_s:
                raise RetryableSourceError(self._late(state, wait_s))
            sleep(_POLL_S)

    def _processed(self) -> list[Condition]:
        if self.group is None:
            return []
        ends = {each.topic_partition: each.end for each in sorted(self.ranges)}
        reached = group_offsets(self.settings, self.group, ends)
        who = f"consumer group {self.group}"
        return [Condition(who, item, end, reached[item]) for item, end in ends.items()]

    def _ends(self) -> Mapping[TopicPartition, int]:
        if self.group is None:
            return {each.topic_partition: each.end for each in sorted(self.ranges)}
        return log_ends(self.settings, topic_partitions(self.settings, [self.topic]))

    def _landed(self, ends: Mapping[TopicPartition, int]) -> list[Condition]:
        reached = self.next_offsets()
        who = f"table {self.table}"
        return [
            Condition(who, item, end, reached.get(item.partition, NOTHING))
            for item, end in ends.items()
            if end > NOTHING
        ]

    def _late(self, state: BarrierState, wait_s: float) -> str:
        behind = "; ".join(str(each) for each in state.missing)
        processes = "the writer" if self.group is None else "the processor and the writer"
        return (
            f"the range is not landed within {wait_s:g} s: {behind}. Are {processes} running? "
            "`streamforge status`; wait longer with --wait-s, or ask for an earlier end"
        )


def group_offsets(settings: Settings, group: str, items: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
    """Return the group's committed offset of each topic-partition, 0 where it has none.

    Offsets of an open transaction do not count.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    wanted = [KafkaTopicPartition(each.topic, each.partition) for each in items]
    admin = admin_client(settings)
    try:
        request = ConsumerGroupTopicPartitions(group, wanted)
        futures = admin.list_consumer_group_offsets([request], request_timeout=REQUEST_TIMEOUT_S)
        found = futures[group].result().topic_partitions
    except KafkaException as error:
        msg = f"the committed offsets of group {group} cannot be read: {error.args[0].str()}. Is the broker up?"
        raise RetryableSourceError(msg) from error
    return {TopicPartition(each.topic, each.partition): max(NOTHING, each.offset) for each in found}
