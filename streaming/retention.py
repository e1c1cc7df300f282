"""What a consumer does where Kafka's log starts above its position: record the gap, then stop or go on.

The gap is in the table `pipeline_gaps` before anything else happens. Commit markers and aborted records take offsets
too: of a transactional topic it can no longer be known how many committed records a removed range held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from streamforge.contracts import Contracts, TopicSettings
from streamforge.errors import RetentionGapError, StreamForgeError
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import OffsetRange
from streamforge.retention_gaps import ConsumerKind, GapState, PipelineGap
from streamforge.settings import Settings

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """How a consumer of one topic deals with what retention has removed.

    Args:
        settings: which catalog.
        contracts: with that of the ledger.
        kind: what `consumer` names.
        consumer: table with namespace, or consumer group.
        topic: the topic that is consumed.
        who: our process, for the ledger.
        accepts: whether a person has accepted that removed offsets are passed over.
        advice: what a person can do, for the message.
    """

    settings: Settings
    contracts: Contracts
    kind: ConsumerKind
    consumer: str
    topic: TopicSettings
    who: str
    accepts: bool
    advice: str

    def pass_over(
        self, removed: Sequence[OffsetRange], metrics: ProcessMetrics, *, topic_id: str, source_epoch: int | None = None
    ) -> None:
        """Record `removed`, each from our position to the log start, and return where they may be passed over.

        Raises:
            RetentionGapError: they may not.
            CommitError: they may, but cannot be recorded.
        """
        gaps = [self._gap(each, self._removed_text(each), topic_id, source_epoch) for each in removed]
        if not gaps:
            return
        if not self.accepts:
            first = f"{gaps[0].detail}{self._more(gaps)}"
            try:
                self._record(gaps)
            except StreamForgeError as error:
                msg = f"{first}. It could not be recorded in the table pipeline_gaps: {error}"
                raise RetentionGapError(msg) from error
            raise RetentionGapError(first)
        self._record(gaps)
        for gap in gaps:
            _log.warning("retention gap accepted", consumer=gap.consumer, detail=gap.detail)
            metrics.retention_gap(gap.topic, gap.end_offset - gap.start_offset)

    def never_had(self, log_starts: Mapping[int, int], *, topic_id: str, source_epoch: int) -> None:
        """Record what was removed from topic-partitions before their first claim, by their log starts.

        Nothing was promised of these offsets, so the writer goes on; the ledger keeps them open until a person
        has accepted them.

        Raises:
            CommitError: they cannot be recorded.
        """
        gaps = []
        for partition, start in sorted(log_starts.items()):
            if start:
                removed = OffsetRange(self.topic.name, partition, 0, start)
                text = (
                    f"{removed.topic_partition}: Kafka removed offsets [0,{start}) before {self.kind} {self.consumer} "
                    f"first claimed them, {self._held_text(removed)}"
                )
                if not self.accepts:
                    text += (
                        f". `streamforge reconcile {self.consumer.split('.')[-1]} --accept-retention-gap` accepts it"
                    )
                gaps.append(self._gap(removed, text, topic_id, source_epoch))
        if gaps:
            self._record(gaps)
        for gap in gaps:
            _log.warning(
                "first claim above offset 0",
                table=gap.consumer,
                topic_partition=f"{gap.topic}-{gap.source_partition}",
                next_offset=gap.end_offset,
                offsets_never_landed=gap.end_offset,
                detail=gap.detail,
            )

    def _record(self, gaps: Sequence[PipelineGap]) -> None:
        # The catalog is loaded only where there is a gap: a processor does not need it otherwise.
        from streamforge.lakehouse.pipeline_gaps import record_gaps  # noqa: PLC0415

        record_gaps(self.settings, self.contracts, gaps)

    def _gap(self, removed: OffsetRange, detail: str, topic_id: str, source_epoch: int | None) -> PipelineGap:
        return PipelineGap(
            state=GapState.ACCEPTED if self.accepts else GapState.OPEN,
            consumer_kind=self.kind,
            consumer=self.consumer,
            topic=removed.topic,
            topic_id=topic_id,
            source_epoch=source_epoch,
            source_partition=removed.partition,
            start_offset=removed.start,
            end_offset=removed.end,
            records_removed=None if self.topic.transactional else len(removed),
            detail=detail,
            detected_by=self.who,
        )

    def _removed_text(self, removed: OffsetRange) -> str:
        text = (
            f"{removed.topic_partition}: next_offset of {self.kind} {self.consumer} is {removed.start}, Kafka's log "
            f"starts at {removed.end}: offsets [{removed.start},{removed.end}) were removed by retention, "
            f"{self._held_text(removed)}"
        )
        return text if self.accepts else f"{text}. {self.advice}"

    def _held_text(self, removed: OffsetRange) -> str:
        if self.topic.transactional:
            return "commit markers and aborted records among them, so how many records they held can no longer be known"
        return f"so {len(removed)} records were removed before we had them"

    @staticmethod
    def _more(gaps: Sequence[PipelineGap]) -> str:
        others = len(gaps) - 1
        return f" ({others} more topic-partitions have such a gap: see the table pipeline_gaps)" if others else ""
