"""The transactional worker: a pure function of (state, records), made exactly once by Kafka transactions.

Outputs, state changelog, dead letters and input positions move together, in one transaction:

1. begin
2. outputs and dead letters, as records come in
3. changelog: each state key that changed, with the input position that it belongs to
4. flush: the broker has everything, nothing of it is visible
5. offsets, with the group's metadata: a member that is no longer in the group is refused here
6. commit

Takeover of topic-partitions, in this order (another order loses the last transaction of a zombie):

1. `init_transactions` fences the process that had this slot and ends its open transaction
2. the committed offsets, stable ones: the broker holds the answer back while a transaction may still move them
3. the changelog to the end that it has then, open transactions included: reading ends only when each of
   them has ended, so no committed state can lie behind an older open transaction
4. consume from the committed offset; none committed: from the log start; below the log start: an error,
   or from the log start where the settings accept that retention has removed records

A transaction that has to be aborted (a rebalance in the middle, a record that did not arrive) is aborted,
positions and state are taken again as on a takeover, and the work goes on. librdkafka puts a transaction
with an undelivered record into that state itself, so deliveries need no callback each.

A fenced member is the end of the process: another has the slot. A fenced producer is not, by itself: the
broker fences one whose transaction outlived its timeout, too. The group is asked who has the slot; while it
is this process, a new producer takes over again. A call that does not return at all ends the process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic

import msgspec
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge import __version__, faults
from streamforge.contracts import Contracts, TopicSettings
from streamforge.dead_letters import encode_dead_letter, make_dead_letter
from streamforge.errors import CommitError, RetryableSourceError, StreamForgeError
from streamforge.kafka import producer_config
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from streaming.kafka_errors import is_fenced, is_passing, is_producer_fenced, kafka_error
from streaming.processors.membership import group_metadata, slot_refusal
from streaming.processors.takeover import Takeover, retention_of
from streaming.processors.types import ChangelogRecord, Processor, Refused, S, Source, TransactionOptions
from streaming.runner import Fetched
from streaming.watchdog import Watchdog

TRANSACTION_STEPS = (
    "takeover_fenced",
    "takeover_positions",
    "takeover_state",
    "before_begin",
    "after_begin",
    "after_outputs",
    "after_changelog",
    "after_flush",
    "after_offsets",
    "after_commit",
)

_CALL_TIMEOUT_S = 10.0
_CALL_OVERDUE_S = 4 * _CALL_TIMEOUT_S
_UNTOLD_CODES = frozenset({KafkaError._STATE, KafkaError._FATAL})  # noqa: SLF001 - librdkafka's own names
_MAX_ABORTS_IN_A_ROW = 10
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Pending:
    """What the open transaction holds."""

    positions: dict[TopicPartition, int] = field(default_factory=dict)
    changed: dict[TopicPartition, set[str]] = field(default_factory=dict)
    since_s: float = 0.0
    records: int = 0
    outputs: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    ts_event_ns: int | None = None


class TransactionalWorker(Generic[S]):
    """Runs a `Processor` under the runner, one transaction at a time.

    Args:
        processor: what to do with the records.
        settings: which cluster and names.
        contracts: topics of input, outputs, changelog and dead letters.
        slot: replica name; with the kind it is the transactional id.
        metrics: where it counts what became durable.
        options: how often and how long.
        monotonic_s: clock for intervals, seconds.
        now_ns: wall clock, nanoseconds since 1970 UTC.
    """

    def __init__(
        self,
        processor: Processor[S],
        settings: Settings,
        contracts: Contracts,
        *,
        slot: str,
        metrics: ProcessMetrics,
        options: TransactionOptions | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.kind = processor.kind
        self._processor = processor
        self._settings = settings
        self._metrics = metrics
        self._options = options or TransactionOptions()
        self._monotonic_s = monotonic_s
        self._now_ns = now_ns
        self._input = topic_of(contracts, processor.input_id)
        self._changelog = topic_of(contracts, processor.changelog_id)
        self._dead_letters = topic_of(contracts, f"{processor.input_id}.dlq")
        self._outputs = {name: topic_of(contracts, name) for name in processor.output_ids}
        self.topics: Sequence[str] = (self._input.name,)
        self._transactional_id = f"{settings.topic_prefix}{self.kind}.{slot}"
        self._producer = self._make_producer()
        self._watchdog = Watchdog()
        self._retention = retention_of(self.kind, settings, contracts, self._input, slot=slot)
        self._consumer: Consumer | None = None
        self._initialised = False
        self._in_transaction = False
        self._aborts = 0
        self._sources: dict[TopicPartition, Source] = {}
        self._states: dict[TopicPartition, S] = {}
        self._durable: dict[TopicPartition, int] = {}
        self._pending = _Pending()
        self._log = _log.bind(kind=self.kind, slot=slot)

    # The worker's seam

    def open(self, consumer: Consumer) -> None:
        """Keep the consumer for group metadata, committed offsets and seeks."""
        self._consumer = consumer

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Fence the slot's former process, then take positions and state of `partitions`."""
        if not self._initialised:
            self._init_transactions()
            self._initialised = True
        faults.step(f"{self.kind}.takeover_fenced")
        return self._take_over(partitions)

    def revoked(self, partitions: Sequence[TopicPartition], *, lost: bool) -> None:
        """Commit what was taken in, or abort it where the partitions are already gone, and forget them."""
        try:
            if not lost and self._pending.positions:
                self._commit()
            self._abort()
        except KafkaException as error:
            self._require_abortable(error)
            self._give_up(error)
        for item in partitions:
            self._sources.pop(item, None)
            self._states.pop(item, None)
            self._durable.pop(item, None)

    def process(self, fetched: Fetched) -> None:
        """Run the processor over what was fetched and hand its outputs to the open transaction."""
        grouped: dict[int, list[Message]] = {}
        for message in fetched.messages:
            grouped.setdefault(message.partition() or 0, []).append(message)
        if not self._pending.positions:
            self._pending.since_s = self._monotonic_s()
        try:
            if grouped:
                self._begin()
            for partition, messages in grouped.items():
                self._process_partition(TopicPartition(self._input.name, partition), messages)
            self._producer.poll(0)
        except KafkaException as error:
            self._start_again(error)
            return
        self._pending.positions.update(fetched.positions)
        if grouped:
            faults.step(f"{self.kind}.after_outputs")

    def commit_due(self, now_s: float) -> bool:
        """Return whether the open transaction is old or large enough."""
        pending, options = self._pending, self._options
        if not pending.positions:
            return False
        interval_s = options.commit_interval_s if pending.records else options.idle_commit_interval_s
        return pending.records >= options.commit_records or now_s - pending.since_s >= interval_s

    def commit(self) -> None:
        """Commit outputs, changelog and positions as one; start again from the last commit if that cannot be."""
        if not self._pending.positions:
            return
        try:
            self._commit()
        except KafkaException as error:
            self._start_again(error)

    def positions(self) -> Mapping[TopicPartition, int]:
        """Return the committed position of each topic-partition held."""
        return self._durable

    def close(self) -> None:
        """Abort what is open and let go of the producer."""
        try:
            self._abort()
        except (KafkaException, StreamForgeError) as error:
            # The broker ends the transaction itself: by this slot's next start, or after its timeout.
            self._log.warning("transaction not aborted on close", detail=str(error))
            self._producer.purge()
        else:
            self._producer.purge()
            # A fenced producer says so once more, and is closed all the same.
            with suppress(KafkaException), self._watchdog.over("closing the producer", _CALL_OVERDUE_S):
                self._producer.close()
        finally:
            self._watchdog.close()

    # The transaction

    def _commit(self) -> None:
        self._begin()
        self._write_changelog()
        faults.step(f"{self.kind}.after_changelog")
        self._flush()
        faults.step(f"{self.kind}.after_flush")
        self._send_offsets()
        faults.step(f"{self.kind}.after_offsets")
        self._call("commit_transaction", lambda: self._producer.commit_transaction(_CALL_TIMEOUT_S))
        faults.step(f"{self.kind}.after_commit")
        self._in_transaction = False
        self._aborts = 0
        self._durable.update(self._pending.positions)
        self._count(self._pending)
        self._pending = _Pending()

    def _begin(self) -> None:
        if self._in_transaction:
            return
        faults.step(f"{self.kind}.before_begin")
        self._producer.begin_transaction()
        self._in_transaction = True
        faults.step(f"{self.kind}.after_begin")

    def _process_partition(self, item: TopicPartition, messages: Sequence[Message]) -> None:
        source = self._sources[item]
        step = self._processor.process(self._states[item], source, messages)
        for output in step.outputs:
            self._produce(self._outputs[output.contract_id].name, output.key, output.value)
        for refused in step.refused:
            self._refuse(source, refused)
        self._states[item] = step.state
        pending = self._pending
        pending.records += len(messages)
        pending.changed.setdefault(item, set()).update(step.changed)
        pending.outputs.update(output.contract_id for output in step.outputs)
        pending.refused.update(refused.reason for refused in step.refused)
        pending.counters.update(step.counters)
        if step.ts_event_ns is not None:
            pending.ts_event_ns = max(step.ts_event_ns, pending.ts_event_ns or 0)

    def _refuse(self, source: Source, refused: Refused) -> None:
        message = refused.message
        letter = make_dead_letter(
            topic=source.topic,
            topic_id=source.topic_id,
            partition=source.partition,
            offset=message.offset() or 0,
            index=refused.index,
            reason=refused.reason,
            detail=refused.detail,
            processor=self.kind,
            ts_ns=self._now_ns(),
            key=message.key(),
            payload=message.value() or b"",
            headers=message.headers(),
        )
        key, value = encode_dead_letter(letter, max_bytes=self._dead_letters.max_message_bytes)
        self._produce(self._dead_letters.name, key, value)

    def _write_changelog(self) -> None:
        for item, keys in self._pending.changed.items():
            for key in sorted(keys):
                text = self._processor.save(self._states[item], key)
                position, topic_id = self._pending.positions[item], self._sources[item].topic_id
                record = ChangelogRecord(key, position, text or "", __version__, topic_id)
                value = None if text is None else msgspec.json.encode(record)
                self._produce(self._changelog.name, key.encode(), value, item.partition)

    def _produce(self, topic: str, key: bytes, value: bytes | None, partition: int = -1) -> None:
        deadline_s = time.monotonic() + self._options.takeover_timeout_s
        while True:
            try:
                self._producer.produce(topic, value, key, partition)
            except BufferError as error:
                if time.monotonic() > deadline_s:
                    msg = f"{topic}: the broker takes no records; the producer's buffer stays full"
                    raise RetryableSourceError(msg) from error
                self._producer.poll(0.1)
            else:
                return

    def _flush(self) -> None:
        deadline_s = time.monotonic() + self._options.takeover_timeout_s
        while self._producer.flush(_CALL_TIMEOUT_S):
            if time.monotonic() > deadline_s:
                msg = f"{len(self._producer)} records did not reach the broker. Is it up? `streamforge broker status`"
                raise RetryableSourceError(msg)

    def _send_offsets(self) -> None:
        consumer = self._opened()
        offsets = [
            KafkaTopicPartition(item.topic, item.partition, offset, metadata=self._sources[item].topic_id)
            for item, offset in self._pending.positions.items()
        ]
        metadata = group_metadata(consumer)
        self._call(
            "send_offsets_to_transaction",
            lambda: self._producer.send_offsets_to_transaction(offsets, metadata, _CALL_TIMEOUT_S),
        )

    def _abort(self) -> None:
        self._pending = _Pending()
        if self._in_transaction:
            self._call("abort_transaction", lambda: self._producer.abort_transaction(_CALL_TIMEOUT_S))
            self._in_transaction = False

    def _start_again(self, cause: KafkaException) -> None:
        """Abort and go back to the last commit, where `cause` allows it; else raise what it means."""
        self._require_abortable(cause)
        self._log.warning("transaction aborted", detail=cause.args[0].str(), in_a_row=self._aborts)
        self._metrics.conflict()
        self._give_up(cause)
        consumer = self._opened()
        for item, offset in self._take_over(list(self._sources)).items():
            try:
                consumer.seek(KafkaTopicPartition(item.topic, item.partition, offset))
            except KafkaException as error:
                if any((held.topic, held.partition) == (item.topic, item.partition) for held in consumer.assignment()):
                    raise kafka_error(f"{item} cannot be read again from {offset}", error.args[0]) from error
                # Not assigned any more: the rebalance that took it away is told by the next poll.
                self._log.warning("not sought", item=str(item), detail=error.args[0].str())

    def _require_abortable(self, cause: KafkaException) -> None:
        """Raise what `cause` means unless the transaction can be aborted and made again.

        A call in a wrong state or after a fatal error does not tell why: the abort that follows does.
        """
        error = cause.args[0]
        self._aborts += 1
        abortable = error.txn_requires_abort() or error.code() in _UNTOLD_CODES or is_producer_fenced(error)
        if is_fenced(error) or not abortable or self._aborts > _MAX_ABORTS_IN_A_ROW:
            raise kafka_error(f"the transaction of {self.kind} failed", error) from cause

    def _give_up(self, cause: KafkaException) -> None:
        """Abort the transaction; where the producer turns out to be fenced, replace it."""
        if not is_producer_fenced(cause.args[0]):
            try:
                self._abort()
            except KafkaException as error:
                cause = error
            else:
                return
        self._replace_producer(cause.args[0])

    def _replace_producer(self, fence: KafkaError) -> None:
        """Go on with a new producer after `fence`, unless another process has the slot.

        Asking comes first: a new producer fences the other one, and two that did so by turns would never end.
        """
        self._pending = _Pending()
        self._in_transaction = False
        offsets = [KafkaTopicPartition(item.topic, item.partition, at) for item, at in self._durable.items()]
        try:
            with self._watchdog.over("asking the group for the slot", 2 * _CALL_OVERDUE_S):
                refusal = slot_refusal(self._settings, self._transactional_id, self._opened(), offsets)
        except KafkaException as error:
            raise kafka_error(f"whether {self.kind} still has its slot cannot be asked", error.args[0]) from error
        if refusal is not None and is_fenced(refusal):
            raise kafka_error(f"the transaction of {self.kind} failed ({fence.name()})", refusal)
        self._log.warning("producer replaced", detail=fence.str(), refusal=refusal and refusal.str())
        self._producer.purge()
        self._producer = self._make_producer()
        self._init_transactions()

    def _init_transactions(self) -> None:
        self._call("init_transactions", lambda: self._producer.init_transactions(_CALL_TIMEOUT_S))

    def _call(self, name: str, call: Callable[[], Any]) -> None:
        """Repeat a transactional call while its error says so; the call goes on where it was.

        Raises:
            KafkaException: the transaction has to be aborted, or the producer was fenced.
            StreamForgeError: anything else that does not pass.
        """
        deadline_s = time.monotonic() + self._options.takeover_timeout_s
        while True:
            try:
                with self._watchdog.over(f"{name} of {self.kind}", _CALL_OVERDUE_S):
                    call()
            except KafkaException as error:
                cause = error.args[0]
                if cause.txn_requires_abort() and name != "abort_transaction":
                    raise
                if is_producer_fenced(cause) and name != "init_transactions":
                    raise
                if not is_passing(cause) or time.monotonic() > deadline_s:
                    raise kafka_error(f"{name} of {self.kind} failed", cause) from error
            else:
                return

    # Takeover

    def _take_over(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        if not partitions:
            return {}
        takeover = Takeover(self._settings, self._input, self._changelog, self._options.takeover_timeout_s)
        topic_id = takeover.topic_id()
        found = takeover.positions(self._opened(), partitions, topic_id)
        starts = takeover.within_log(found, topic_id, self._retention, self._metrics)
        faults.step(f"{self.kind}.takeover_positions")
        saved = takeover.states(starts, topic_id)
        faults.step(f"{self.kind}.takeover_state")
        for item in partitions:
            self._sources[item] = Source(item.topic, topic_id, item.partition)
            self._states[item] = self._processor.restore(saved[item])
        self._durable.update(starts)
        return starts

    # Small things

    def _count(self, done: _Pending) -> None:
        for name, count in done.outputs.items():
            self._metrics.written(name, count)
        for reason, count in done.refused.items():
            self._metrics.dead_letter(reason, count)
        for name, count in done.counters.items():
            if name == "duplicates":
                self._metrics.duplicates(count)
            else:
                self._metrics.skipped(name.removeprefix("skipped."), count)
        if done.ts_event_ns is not None:
            self._metrics.event_time(self._processor.output_ids[0], done.ts_event_ns)

    def _opened(self) -> Consumer:
        if self._consumer is None:
            msg = "open(consumer) has to come before the first assignment"
            raise CommitError(msg)
        return self._consumer

    def _make_producer(self) -> Producer:
        topics: list[TopicSettings] = [self._changelog, self._dead_letters, *self._outputs.values()]
        config: dict[str, Any] = {
            "transaction.timeout.ms": self._options.transaction_timeout_ms,
            "message.max.bytes": max(topic.max_message_bytes for topic in topics),
            "queue.buffering.max.messages": 500_000,
        }
        return Producer(producer_config(self._settings, transactional_id=self._transactional_id, **config))
