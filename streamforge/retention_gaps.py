"""Retention gaps as values: what Kafka removed before a table or a processor had it, and which of it is still open.

Pure; `streamforge.lakehouse.pipeline_gaps` keeps them in a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class ConsumerKind(StrEnum):
    """Who lacks the offsets."""

    TABLE = "table"
    GROUP = "group"


class GapState(StrEnum):
    """Whether a person has accepted the loss."""

    OPEN = "open"
    ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class PipelineGap:
    """Offsets `[start_offset, end_offset)` of one topic-partition that a consumer will never get from Kafka.

    Args:
        state: whether the loss was accepted.
        consumer_kind: what `consumer` names.
        consumer: table with namespace, or consumer group.
        topic: name.
        topic_id: Kafka's id of it.
        source_epoch: number of the topic id in the table; None for a consumer group.
        source_partition: topic-partition number.
        start_offset: first offset that was removed.
        end_offset: log start when it was noticed.
        records_removed: committed records among the offsets; None where that can no longer be known.
        detail: what happened and, while it is open, what to do.
        detected_by: process that noticed or accepted it.
    """

    state: GapState
    consumer_kind: ConsumerKind
    consumer: str
    topic: str
    topic_id: str
    source_epoch: int | None
    source_partition: int
    start_offset: int
    end_offset: int
    records_removed: int | None
    detail: str
    detected_by: str

    @property
    def gap_id(self) -> str:
        """Return the identity: the same gap, noticed again, has the same."""
        where = f"{self.consumer_kind}/{self.consumer}/{self.topic_id}-{self.source_partition}"
        return f"{where}[{self.start_offset},{self.end_offset})"

    def covers(self, other: PipelineGap) -> bool:
        """Return whether `other` lies within this one: of the same consumer, topic and topic-partition."""
        return (
            self._place == other._place
            and self.start_offset <= other.start_offset
            and other.end_offset <= self.end_offset
        )

    @property
    def _place(self) -> tuple[str, str, str, int]:
        return self.consumer_kind, self.consumer, self.topic_id, self.source_partition

    def __str__(self) -> str:
        return (
            f"{self.consumer_kind} {self.consumer}: {self.topic}-{self.source_partition}"
            f"[{self.start_offset},{self.end_offset})"
        )


def open_gaps(gaps: Iterable[PipelineGap]) -> list[PipelineGap]:
    """Return the gaps that nobody has accepted; of those noticed again with a later end only the longest."""
    rows = list(gaps)
    accepted = [gap for gap in rows if gap.state is GapState.ACCEPTED]
    left = [gap for gap in rows if gap.state is GapState.OPEN and not any(each.covers(gap) for each in accepted)]
    longest = [gap for gap in left if not any(each is not gap and each.covers(gap) for each in left)]
    return sorted(longest, key=lambda gap: gap.gap_id)
