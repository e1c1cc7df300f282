"""The only writer of live tables: every topic that has a table lands in it, exactly once.

One fetch after another is decoded and buffered for its table; every commit interval, or when the buffer is
full, each table gets one snapshot with rows and positions together (`streamforge.lakehouse.commit`). In order:

1. each topic's identity is read: one that was made anew since the claim has offsets of its own;
2. dead letters are flushed to the broker: their offsets may pass only when they are safe;
3. for each table: data files, manifests, one compare-and-set;
4. the group's offsets, as a hint for lag tools; positions are read from the tables, never from the group.

Topic-partitions are claimed in the table when Kafka assigns them, and reading starts where the table says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition
from pydantic import Field

from streamforge import faults
from streamforge.contracts import Contract, Contracts
from streamforge.dead_letters import encode_dead_letter, make_dead_letter
from streamforge.errors import (
    CommitError,
    ConfigurationError,
    PermanentSourceError,
    RetryableSourceError,
)
from streamforge.kafka import admin_client, describe_topics, producer_config
from streamforge.lakehouse.catalog import ensure_table, open_catalog, probe_compare_and_set, table_identifier
from streamforge.lakehouse.commit import ClaimedMeanwhileError, PositionsMovedError, view_of
from streamforge.lakehouse.freshness import EVENT_COLUMN, RECEIVE_COLUMN, LatencyHistogram
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.pipeline_gaps import LEDGER_ID
from streamforge.lakehouse.protocol import SourceIdentity
from streamforge.lakehouse.rows import Refused
from streamforge.lakehouse.table_writer import Landed, TableWriter
from streamforge.log_reader import log_starts
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.retention_gaps import ConsumerKind
from streamforge.settings import Settings
from streamforge.supervision import ProcessIdentity, topic_of
from streaming.kafka_errors import is_fenced, kafka_error
from streaming.retention import Retention
from streaming.runner import Fetched

KIND = "writer"
WRITER_STEPS = (
    "writer.before_claim",
    "writer.claim_staged",
    "writer.claim_sent",
    "writer.after_claim",
    "writer.before_dead_letters",
    "writer.after_dead_letters",
    "writer.data_written",
    "writer.commit_staged",
    "writer.commit_sent",
    "writer.after_commit",
    "writer.after_group_offsets",
)
"""Kill points in the order in which one commit passes them; tests kill the process at each."""

_FLUSH_TIMEOUT_S = 30.0
_CLAIM_ATTEMPTS = 3

_log = structlog.get_logger(__name__)


class WriterSettings(Settings):
    """Settings of the writer."""

    writer_contracts: tuple[str, ...] = Field(
        (), description="Ids of the contracts to land. Empty: every contract that has a topic and a table."
    )
    writer_commit_interval_s: float = Field(2.0, gt=0, description="Seconds from the start of a commit to the next.")
    writer_idle_interval_s: float = Field(
        30.0, gt=0, le=60, description="Seconds after which a position that moved without rows is committed."
    )
    writer_max_rows: int = Field(500_000, gt=0, description="Buffered rows at which a commit is made at once.")
    writer_max_buffer_bytes: int = Field(
        256 * 1024 * 1024, gt=0, description="Buffered bytes at which a commit is made at once."
    )
    writer_commit_deadline_s: float = Field(60.0, gt=0, description="Seconds after which a commit is given up.")
    writer_retained_snapshots: int = Field(
        100, ge=2, description="Table snapshots that are kept; tagged ones are kept beside them."
    )
    writer_maintenance_commits: int = Field(50, gt=0, description="Commits of a table between two maintenance runs.")
    writer_accept_retention_gap: bool = Field(
        False,
        description="Go on at the log start where Kafka has removed what the table still needed; what was removed is "
        "recorded in the table pipeline_gaps and counted.",
    )


class WriterWorker:
    """Lands topics in their tables; see `streaming.runner.Worker`.

    Args:
        settings: which cluster, catalog and limits.
        contracts: topics, tables and dead letters.
        slot: replica name, stable over restarts; part of the owner string.
        metrics: where it counts what became durable.
        monotonic_s: clock for intervals, seconds.
        now_ns: wall clock, nanoseconds since 1970 UTC.

    Raises:
        ConfigurationError: a setting names a contract that does not exist or has no table.
    """

    kind = KIND

    def __init__(
        self,
        settings: WriterSettings,
        contracts: Contracts,
        *,
        slot: str,
        metrics: ProcessMetrics,
        monotonic_s: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._settings = settings
        self._contracts = contracts
        self._metrics = metrics
        self._monotonic_s = monotonic_s
        self._now_ns = now_ns
        self.owner = ProcessIdentity.of_this_process(KIND, slot, now_ns=now_ns()).owner(settings.topic_prefix)
        self._by_topic: dict[str, Contract] = {topic_of(contracts, item.id).name: item for item in self._landed()}
        self.topics: Sequence[str] = tuple(self._by_topic)
        self.freshness = {EVENT_COLUMN: LatencyHistogram(), RECEIVE_COLUMN: LatencyHistogram()}
        self._writers: dict[str, TableWriter] = {}
        self._identities: dict[str, SourceIdentity] = {}
        self._retention = {topic: self._retention_of(topic) for topic in self.topics}
        self._maintenance: Maintenance | None = None
        self._commits: dict[str, int] = {}
        self._consumer: Consumer | None = None
        self._since_s: float | None = None
        self._commit_started_s = monotonic_s()
        self._undelivered: KafkaError | None = None
        self._letters = 0
        limits: dict[str, Any] = {"message.max.bytes": self._max_letter_bytes()}
        self._admin = admin_client(settings)
        self._producer = Producer(producer_config(settings, **limits))
        self._log = _log.bind(owner=self.owner)

    # The worker's seam

    def open(self, consumer: Consumer) -> None:
        """Refuse a catalog that does not compare and set, then open or create the tables."""
        self._consumer = consumer
        proof = probe_compare_and_set(self._settings)
        catalog = open_catalog(self._settings)
        for topic, contract in self._by_topic.items():
            table = ensure_table(catalog, self._settings, contract)
            view_of(table)  # refuses another protocol version before anything is claimed
            self._writers[topic] = TableWriter(
                contract, table, owner=self.owner, deadline_s=self._settings.writer_commit_deadline_s
            )
        ensure_table(catalog, self._settings, self._contracts[LEDGER_ID])
        ledger = ensure_table(catalog, self._settings, self._contracts["commits"])
        self._maintenance = Maintenance(
            ledger, self._contracts["commits"], retained=self._settings.writer_retained_snapshots
        )
        self._log.info("tables open", proof=proof, tables=[item.contract.id for item in self._writers.values()])

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Claim `partitions` in their tables and return the tables' `next_offset`s."""
        faults.step("writer.before_claim")
        for attempt in range(1, _CLAIM_ATTEMPTS + 1):
            try:
                offsets = self._claim(partitions)
                break
            except ClaimedMeanwhileError as error:
                if attempt == _CLAIM_ATTEMPTS:
                    raise
                self._log.warning("claim given up", attempt=attempt, detail=str(error))
        faults.step("writer.after_claim")
        return offsets

    def revoked(self, partitions: Sequence[TopicPartition], *, lost: bool) -> None:
        """Commit what was taken in, unless the partitions are already gone, and forget them."""
        if not lost:
            self.commit()
        for topic, writer in self._writers.items():
            writer.release(item.partition for item in partitions if item.topic == topic)

    def process(self, fetched: Fetched) -> None:
        """Decode and buffer; a record that cannot be decoded goes to the dead letters."""
        positions: dict[str, dict[int, int]] = {}
        for item, position in fetched.positions.items():
            positions.setdefault(item.topic, {})[item.partition] = position
        for topic, messages in fetched.by_topic().items():
            for refused in self._writers[topic].take(messages, positions[topic]):
                self._refuse(topic, refused)
        if self._since_s is None:
            self._since_s = self._monotonic_s()
        self._producer.poll(0)

    def commit_due(self, now_s: float) -> bool:
        """Return whether the buffer is old enough or full."""
        if self._since_s is None:
            return False
        settings = self._settings
        rows = sum(writer.rows for writer in self._writers.values())
        size_bytes = sum(writer.bytes for writer in self._writers.values())
        if rows >= settings.writer_max_rows or size_bytes >= settings.writer_max_buffer_bytes:
            return True
        with_rows = rows or self._letters
        if with_rows:
            # From start to start: a commit's own time must not add to the age of what came meanwhile.
            return now_s - self._commit_started_s >= settings.writer_commit_interval_s
        return now_s - self._since_s >= settings.writer_idle_interval_s

    def commit(self) -> None:
        """Commit every table that moved; where a table is elsewhere, forget its batch and seek."""
        if not any(writer.moved for writer in self._writers.values()):
            return
        self._commit_started_s = self._monotonic_s()
        self._check_identities()
        faults.step("writer.before_dead_letters")
        self._flush_dead_letters()
        faults.step("writer.after_dead_letters")
        hints: list[KafkaTopicPartition] = []
        for topic, writer in self._writers.items():
            try:
                landed = writer.commit()
            except PositionsMovedError as error:
                self._go_back(topic, writer, error)
                continue
            if landed is not None:
                faults.step("writer.after_commit")
                self._count(topic, landed)
                hints += [KafkaTopicPartition(topic, item, offset) for item, offset in landed.positions.items()]
                self._maintain(topic, writer)
        self._since_s = None
        self._hint(hints)
        faults.step("writer.after_group_offsets")

    def positions(self) -> Mapping[TopicPartition, int]:
        """Return the tables' `next_offset` of each topic-partition held."""
        return {
            TopicPartition(topic, partition): offset
            for topic, writer in self._writers.items()
            for partition, offset in writer.positions.items()
        }

    def close(self) -> None:
        """Let go of the dead letters' producer; nothing is committed."""
        self._producer.flush(_FLUSH_TIMEOUT_S)

    # Claims and identities

    def _claim(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """Claim once: what the owner epochs are, then whether we are still assigned, then the claim that goes by both.

        A process that stood still after its assignment may have an heir by now. The heir was assigned either
        before the group confirmed ours, so the group does not, or after it, so its claim is one that we refuse.
        """
        starts = log_starts(self._settings, partitions)
        topics = sorted({item.topic for item in partitions})
        live = self._live_identities(topics)
        for topic in topics:
            if topic not in live:
                msg = f"topic {topic} does not exist. Create it with `streamforge contracts apply`"
                raise PermanentSourceError(msg)
        known = {topic: self._writers[topic].look(topic) for topic in topics}
        self._confirm_assignment({item: known[item.topic].get(item.partition, starts[item]) for item in partitions})
        offsets: dict[TopicPartition, int] = {}
        for topic in topics:
            self._identities[topic] = live[topic]
            writer = self._writers[topic]
            first = {item.partition: starts[item] for item in partitions if item.topic == topic}
            never_had = {partition: start for partition, start in first.items() if partition not in known[topic]}
            self._retention[topic].never_had(
                never_had, topic_id=live[topic].topic_id, source_epoch=writer.epoch_of(topic)
            )
            claimed = self._pass_over(topic, writer.claim(live[topic], first), first)
            offsets |= {TopicPartition(topic, partition): offset for partition, offset in claimed.items()}
        return offsets

    def _confirm_assignment(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Have the group's coordinator take our offsets, which it does of no process that it has given up."""
        if not next_offsets:
            return
        hints = [KafkaTopicPartition(item.topic, item.partition, offset) for item, offset in next_offsets.items()]
        try:
            answers = self._opened().commit(offsets=hints, asynchronous=False) or []
        except KafkaException as cause:
            error: KafkaError | None = cause.args[0]
        else:
            error = next((answer.error for answer in answers if answer.error is not None), None)
        if error is None:
            return
        what = f"the group does not confirm the assignment of {', '.join(str(item) for item in next_offsets)}"
        if is_fenced(error):
            raise kafka_error(what, error)
        msg = f"{what}: {error.name()}: {error.str()}. Nothing was claimed: a restart joins the group again"
        raise RetryableSourceError(msg)

    def _live_identities(self, topics: Sequence[str]) -> Mapping[str, SourceIdentity]:
        found = describe_topics(self._admin, topics)
        return {name: SourceIdentity(name, item.topic_id, item.cluster_id) for name, item in found.items()}

    def _check_identities(self) -> None:
        """Refuse to commit what came from a topic that was made anew since its claim.

        The identity is read after the last fetch of the batch: topic ids never come back, so one that is still
        the claimed one has been so all along.
        """
        moved = [topic for topic, writer in self._writers.items() if writer.moved]
        live = self._live_identities(moved)
        for topic in moved:
            self._writers[topic].check_live(live.get(topic))

    # Positions

    def _pass_over(self, topic: str, next_offsets: Mapping[int, int], log_starts: Mapping[int, int]) -> dict[int, int]:
        """Return where to start: at `next_offset`, or at the log start where a gap between them is accepted."""
        removed = [
            OffsetRange(topic, partition, next_offset, log_starts[partition])
            for partition, next_offset in sorted(next_offsets.items())
            if next_offset < log_starts[partition]
        ]
        writer = self._writers[topic]
        topic_id, epoch = self._identities[topic].topic_id, writer.epoch_of(topic)
        self._retention[topic].pass_over(removed, self._metrics, topic_id=topic_id, source_epoch=epoch)
        for gap in removed:
            writer.skip_to(gap.partition, gap.end)
        return {**next_offsets, **{gap.partition: gap.end for gap in removed}}

    def _go_back(self, topic: str, writer: TableWriter, error: PositionsMovedError) -> None:
        self._metrics.conflict()
        self._log.warning("batch forgotten", detail=str(error))
        for partition, offset in writer.forget().items():
            try:
                self._opened().seek(KafkaTopicPartition(topic, partition, offset))
            except KafkaException as cause:
                item = f"{topic}-{partition}"
                if self._is_assigned(topic, partition):
                    # Reading on from where it is would leave out what was forgotten.
                    raise kafka_error(f"{item} cannot be sought to {offset}", cause.args[0]) from cause
                # The rebalance that took it away is told by the next poll.
                self._log.warning("not sought", item=item, detail=cause.args[0].str())

    def _is_assigned(self, topic: str, partition: int) -> bool:
        return any((item.topic, item.partition) == (topic, partition) for item in self._opened().assignment())

    def _hint(self, offsets: list[KafkaTopicPartition]) -> None:
        """Commit the group's offsets for lag tools; nothing of ours reads them, so nothing depends on it."""
        if offsets:
            try:
                self._opened().commit(offsets=offsets, asynchronous=True)
            except KafkaException as error:
                self._log.warning("group offsets not committed", detail=error.args[0].str())

    # Dead letters

    def _refuse(self, topic: str, refused: Refused) -> None:
        contract, message = self._by_topic[topic], refused.message
        value = message.value()
        letter = make_dead_letter(
            topic=topic,
            topic_id=self._identities[topic].topic_id,
            partition=message.partition() or 0,
            offset=message.offset() or 0,
            index=0,
            reason=refused.reason,
            detail=refused.detail,
            processor=KIND,
            ts_ns=self._now_ns(),
            key=message.key(),
            payload=value or b"",
            headers=message.headers(),
        )
        target = topic_of(self._contracts, f"{contract.id}.dlq")
        key, data = encode_dead_letter(letter, max_bytes=target.max_message_bytes)
        try:
            self._producer.produce(target.name, data, key, on_delivery=self._delivered)
        except BufferError:
            self._flush_dead_letters()
            self._producer.produce(target.name, data, key, on_delivery=self._delivered)
        self._letters += 1  # only now: the flush above counts what it waited for as done
        self._metrics.dead_letter(refused.reason)

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._undelivered = error

    def _flush_dead_letters(self) -> None:
        """Wait until the broker has every dead letter: only then may their offsets pass."""
        left = self._producer.flush(_FLUSH_TIMEOUT_S) if self._letters else 0
        if self._undelivered is not None:
            raise kafka_error("a dead letter was not delivered; no offset has passed it", self._undelivered)
        if left:
            msg = f"{left} dead letters did not reach the broker within {_FLUSH_TIMEOUT_S} s. Is it up?"
            raise RetryableSourceError(msg)
        self._letters = 0

    # Small things

    def _retention_of(self, topic: str) -> Retention:
        contract, settings = self._by_topic[topic], self._settings
        return Retention(
            settings,
            self._contracts,
            ConsumerKind.TABLE,
            ".".join(table_identifier(settings, contract)),
            topic_of(self._contracts, contract.id),
            who=self.owner,
            accepts=settings.writer_accept_retention_gap,
            advice="Nothing brings them back into this topic. To go on at the log start without them, set "
            "STREAMFORGE_WRITER_ACCEPT_RETENTION_GAP=true; if the table is made from a raw topic or a raw table that "
            "still has them, `streamforge replay` then lands their rows",
        )

    def _count(self, topic: str, landed: Landed) -> None:
        contract = self._by_topic[topic]
        self._metrics.written(contract.id, landed.rows.num_rows)
        for _ in range(landed.committed.attempts - 1):
            self._metrics.conflict()
        if not landed.rows.num_rows:
            return
        now_ns = self._now_ns()
        for column, histogram in self.freshness.items():
            if column in landed.rows.column_names:
                histogram.add(landed.rows[column], now_ns)
        if EVENT_COLUMN in landed.rows.column_names:
            latest: Any = pc.max(landed.rows[EVENT_COLUMN]).as_py()
            self._metrics.event_time(contract.id, latest)
        p50_s, p99_s = (self.freshness[RECEIVE_COLUMN].quantile_s(q) for q in (0.5, 0.99))
        if p50_s is not None and p99_s is not None:
            self._metrics.freshness_quantiles(p50_s, p99_s)

    def _maintain(self, topic: str, writer: TableWriter) -> None:
        self._commits[topic] = self._commits.get(topic, 0) + 1
        if self._maintenance is not None and self._commits[topic] % self._settings.writer_maintenance_commits == 0:
            try:
                writer.table = self._maintenance.expire(writer.table)
            except CommitError as error:
                # More snapshots cost a little time with each commit; the next run has another try.
                self._log.warning("snapshots not expired", detail=str(error))

    def _landed(self) -> list[Contract]:
        wanted = self._settings.writer_contracts or tuple(
            item.id for item in self._contracts.with_table if item.topic is not None
        )
        found = [self._contracts[name] for name in wanted]
        for item in found:
            if item.table is None or item.topic is None:
                msg = f"STREAMFORGE_WRITER_CONTRACTS names {item.id}, which has no topic and table"
                raise ConfigurationError(msg)
        return found

    def _max_letter_bytes(self) -> int:
        return max(topic_of(self._contracts, f"{item.id}.dlq").max_message_bytes for item in self._by_topic.values())

    def _opened(self) -> Consumer:
        if self._consumer is None:
            msg = "open(consumer) has to come before the first assignment"
            raise ConfigurationError(msg)
        return self._consumer
