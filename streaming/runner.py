"""The one loop (poll, decode, process, commit) that serves every consumer.

The loop owns the Kafka consumer, the control commands, the events and the metrics. What a consumer does
with its records is a `Worker`: the transactional processors (`streaming.processors.base`) and the writer
(`streaming.writer`) are the two kinds.

1. Hear `queue-control` to its end: the desired state is known before the first record is fetched.
2. Join the group as a static member. On assignment the worker takes over and says where to start; the
   consumer starts exactly there. On revocation the worker finishes its commit first.
3. Fetch, process, commit when the worker says that it is due; obey commands; report every few seconds.
4. On `stop`, SIGTERM or SIGINT: commit what was taken in, close, exit code 0. On an error: nothing more is
   committed, the error is published and logged, and its exit code is the process's.

A static member does not leave its group when it closes: a replica that comes back within the session
timeout has its topic-partitions at once, one that is gone for good gives them up after it.
"""

from __future__ import annotations

import operator
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress
from types import FrameType
from typing import Any, Protocol

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge.contracts import Contracts
from streamforge.errors import RetentionGapError, RetryableSourceError, SourceError, StreamForgeError
from streamforge.events import Command, CommandKind, ProcessState
from streamforge.kafka import REQUEST_TIMEOUT_S, consumer_config
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import ControlListener, EventPublisher, ProcessIdentity, ProcessStatus
from streaming.kafka_errors import is_passing, kafka_error
from streaming.log_ends import LogEnds

_GAP_CODES = frozenset({KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET})  # noqa: SLF001

_log = structlog.get_logger(__name__)


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

    def by_topic(self) -> Mapping[str, Sequence[Message]]:
        """Return the messages of each topic that moved, none where only its position did."""
        groups: dict[str, list[Message]] = {item.topic: [] for item in self.positions}
        if len(groups) == 1:
            return dict.fromkeys(groups, self.messages)
        for message in self.messages:
            groups[message.topic() or ""].append(message)
        return groups


class Worker(Protocol):
    """What a consumer process does with what the runner fetched; called from one thread only.

    A worker that has to go back (an aborted transaction, a stale commit) seeks the consumer that it was
    opened with; the runner keeps no position of its own.
    """

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


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How the loop runs.

    Args:
        fetch_records: most records of one fetch.
        poll_s: longest wait for `fetch_records` to come together, seconds.
        report_interval_s: seconds between heartbeat or progress events.
        control_timeout_s: longest wait for `queue-control` at start, seconds; it is an error to know less.
        consumer: librdkafka settings on top of `streamforge.kafka.consumer_config`.
    """

    fetch_records: int = 5_000
    poll_s: float = 0.1
    report_interval_s: float = 3.0
    control_timeout_s: float = 30.0
    consumer: Mapping[str, Any] | None = None


def run_worker(
    worker: Worker,
    settings: Settings,
    contracts: Contracts,
    *,
    slot: str,
    metrics: ProcessMetrics,
    metrics_port: int | None = None,
    options: RunnerOptions | None = None,
    stop: threading.Event | None = None,
    monotonic_s: Callable[[], float] = time.monotonic,
    now_ns: Callable[[], int] = time.time_ns,
) -> int:
    """Run `worker` until it is told to stop, and return the process's exit code.

    Args:
        worker: what to do with the records; it is closed at the end, however the end comes.
        settings: which cluster and names.
        contracts: has `queue-events` and `queue-control`.
        slot: replica name, stable over restarts.
        metrics: where the loop counts.
        metrics_port: port that `metrics` is served on, said in events.
        options: how the loop runs.
        stop: set by the caller to end the loop; signals set it too when called from the main thread.
        monotonic_s: clock for intervals, seconds.
        now_ns: wall clock, nanoseconds since 1970 UTC.

    Returns:
        0 after a stop, else the exit code of the error.

    Raises:
        ConfigurationError: no client can be made of the settings; nothing was started.
    """
    identity = ProcessIdentity.of_this_process(worker.kind, slot, now_ns=now_ns())
    publisher = EventPublisher(settings, contracts, identity, metrics_port=metrics_port, clock_ns=now_ns)
    log = _log.bind(process_id=identity.process_id)
    loop = _Loop(
        worker,
        settings,
        contracts,
        publisher,
        metrics=metrics,
        options=options or RunnerOptions(),
        monotonic_s=monotonic_s,
    )
    try:
        with _stop_on_signals(stop or threading.Event()) as stopping:
            loop.run(stopping)
        code, detail = 0, ""
    except StreamForgeError as error:
        code, detail = error.exit_code, f"{type(error).__name__}: {error}"
        log.error("stopped", error=type(error).__name__, detail=str(error), exit_code=code)  # noqa: TRY400
    except Exception as error:  # the one place where the unexpected is recorded before the process stops
        code, detail = 1, f"unexpected {type(error).__name__}: {error}"
        log.exception("stopped by an unexpected error", exit_code=code)
    metrics.set_ready(False)
    late = loop.close(failed=code != 0)
    if late is not None and not code:
        code, detail = late.exit_code, f"{type(late).__name__}: {late}"
        log.error("stopped", error=type(late).__name__, detail=str(late), exit_code=code)
    if code:
        publisher.error(detail, exit_code=code)
    else:
        publisher.finished()
    publisher.close()
    log.info("finished", exit_code=code)
    return code


class _Loop:
    """State of one run of the loop."""

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        contracts: Contracts,
        publisher: EventPublisher,
        *,
        metrics: ProcessMetrics,
        options: RunnerOptions,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._worker = worker
        self._publisher = publisher
        self._metrics = metrics
        self._options = options
        self._monotonic_s = monotonic_s
        self._log = _log.bind(process_id=publisher.identity.process_id)
        self._listener = ControlListener(settings, contracts, publisher.identity)
        self._held: set[TopicPartition] = set()
        self._seen: dict[TopicPartition, int] = {}
        self._state = ProcessState.STARTING
        self._paused = False
        self._failed = False
        self._report_at_s = 0.0
        self._reported: Mapping[TopicPartition, int] = {}
        config = consumer_config(
            settings,
            group=f"{settings.topic_prefix}{worker.kind}",
            slot=publisher.identity.slot,
            **(options.consumer or {}),
        )
        self._consumer = Consumer(config)
        self._log_ends = LogEnds(settings, self._consumer)

    def run(self, stopping: threading.Event) -> None:
        """Serve until `stopping` is set, then commit what was taken in.

        Raises:
            RetryableSourceError: whether it is paused could not be learned.
        """
        early = self._listener.wait_until_caught_up(self._options.control_timeout_s)
        self._paused = self._listener.paused
        self._worker.open(self._consumer)
        self._state = self._running_state()
        self._publisher.started(self._status())
        self._log.info("started", topics=list(self._worker.topics), paused=self._paused)
        self._consumer.subscribe(
            list(self._worker.topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        for command in early:
            self._obey(command, stopping)
        while not stopping.is_set():
            for command in self._listener.poll():
                self._obey(command, stopping)
            self._apply_desired_state()
            self._take(self._fetch())
            if self._worker.commit_due(self._monotonic_s()):
                self._commit()
            self._report()
        self._state = ProcessState.STOPPING
        self._commit()

    def close(self, *, failed: bool) -> StreamForgeError | None:
        """Close consumer, worker and listener; after a failure nothing is committed on the way.

        Returns:
            What the worker's last commit raised, in the revocation that the consumer makes of its close.
        """
        self._failed = failed
        late = None
        try:
            self._consumer.close()
        except StreamForgeError as error:
            late = error
        except (KafkaException, RuntimeError) as error:
            self._log.warning("consumer not closed cleanly", detail=str(error))
        self._worker.close()
        self._listener.close()
        return late

    # What the consumer tells

    def _on_assign(self, consumer: Consumer, partitions: list[KafkaTopicPartition]) -> None:
        items = [TopicPartition(item.topic, item.partition) for item in partitions]
        starts = self._worker.assigned(items)
        targets = [KafkaTopicPartition(item.topic, item.partition, starts[item]) for item in items]
        consumer.assign(targets)
        if self._paused and targets:
            consumer.pause(targets)
        self._held = set(items)
        self._seen = dict(starts)
        self._metrics.set_ready(bool(items))
        self._log.info("assigned", assignment=[str(item) for item in items])
        self._report(now=True)

    def _on_revoke(self, _consumer: Consumer, partitions: list[KafkaTopicPartition]) -> None:
        self._give_up(partitions, lost=self._failed)

    def _on_lost(self, _consumer: Consumer, partitions: list[KafkaTopicPartition]) -> None:
        self._give_up(partitions, lost=True)

    def _give_up(self, partitions: list[KafkaTopicPartition], *, lost: bool) -> None:
        items = [TopicPartition(item.topic, item.partition) for item in partitions]
        self._worker.revoked(items, lost=lost)
        self._held -= set(items)
        for item in items:
            self._seen.pop(item, None)
        if not self._held:
            self._metrics.rest()
        self._log.info("revoked", lost=lost, assignment=[str(item) for item in items])

    # One round

    def _fetch(self) -> Fetched:
        try:
            messages = self._consumer.consume(self._options.fetch_records, self._options.poll_s)
        except KafkaException as error:
            raise kafka_error("the consumer stopped", error.args[0]) from error
        records = [message for message in messages if message.error() is None]
        positions = {
            TopicPartition(message.topic() or "", message.partition() or 0): (message.offset() or 0) + 1
            for message in _ends_of_runs(records, many_topics=len(self._worker.topics) > 1)
        }
        if len(records) != len(messages):
            for message in messages:
                self._note_event(message, positions)
        if not self._held.issuperset(positions):
            records = [m for m in records if TopicPartition(m.topic() or "", m.partition() or 0) in self._held]
            positions = {item: offset for item, offset in positions.items() if item in self._held}
        self._seen.update(positions)
        return Fetched(records, positions)

    def _note_event(self, message: Message, positions: dict[TopicPartition, int]) -> None:
        """Take the position of an end-of-partition event, which lies behind commit markers; raise what is an error."""
        error = message.error()
        if error is None:
            return
        item = TopicPartition(message.topic() or "", message.partition() or 0)
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own name
            position = max(message.offset() or 0, positions.get(item, 0))
            # What is durable decides, not what was seen before: a worker that went back meets the same end again.
            if position != self._worker.positions().get(item):
                positions[item] = position
        elif error.code() in _GAP_CODES:
            raise self._retention_gap(item, error)
        elif not is_passing(error):
            raise kafka_error(f"reading {item if message.topic() else ', '.join(self._worker.topics)} failed", error)
        else:
            self._log.warning("kafka", detail=error.str())

    def _take(self, fetched: Fetched) -> None:
        if not fetched.positions:
            return
        self._worker.process(fetched)
        for topic, messages in fetched.by_topic().items():
            if messages:
                self._metrics.consumed(topic, len(messages))

    def _commit(self) -> None:
        started_s = self._monotonic_s()
        self._worker.commit()
        self._metrics.committed(self._monotonic_s() - started_s)

    # What it is told

    def _obey(self, command: Command, stopping: threading.Event) -> None:
        self._log.info("command", command=str(command.command), issued_by=command.issued_by)
        if command.command is CommandKind.STOP:
            self._state = ProcessState.STOPPING
            stopping.set()
        self._apply_desired_state()
        detail = "only the simulator has faults" if command.command is CommandKind.FAULT else ""
        self._publisher.answer(command, self._status(), detail=detail)

    def _apply_desired_state(self) -> None:
        """Pause or resume fetching; a paused consumer keeps polling, so the group does not give it up."""
        if self._paused == self._listener.paused:
            return
        self._paused = self._listener.paused
        held = [KafkaTopicPartition(item.topic, item.partition) for item in self._held]
        if self._paused:
            self._consumer.pause(held)
            self._commit()
        else:
            self._consumer.resume(held)
        if self._state is not ProcessState.STOPPING:
            self._state = self._running_state()
        self._log.info("paused" if self._paused else "resumed")

    def _running_state(self) -> ProcessState:
        return ProcessState.PAUSED if self._paused else ProcessState.RUNNING

    # What it says

    def _report(self, *, now: bool = False) -> None:
        now_s = self._monotonic_s()
        if now_s < self._report_at_s and not now:
            return
        self._report_at_s = now_s + self._options.report_interval_s
        status = self._status()
        positions = dict(self._worker.positions())
        if positions != self._reported:
            self._reported = positions
            self._publisher.progress(status, detail=self._metrics.note)
        else:
            self._publisher.heartbeat(status, detail=self._metrics.note)

    def _status(self) -> ProcessStatus:
        positions = dict(self._worker.positions())
        ends = self._log_ends.of(self._held, is_fetching=not self._paused)
        lag = {item: max(0, ends[item] - offset) for item, offset in positions.items() if item in ends}
        self._metrics.positions(positions, lag)
        return ProcessStatus(
            self._state,
            [str(item) for item in sorted(self._held)],
            {str(item): offset for item, offset in positions.items()},
            {str(item): records for item, records in lag.items()},
            self._metrics.counters(),
        )

    def _retention_gap(self, item: TopicPartition, error: KafkaError) -> SourceError:
        wanted = self._seen.get(item, 0)
        partition = KafkaTopicPartition(item.topic, item.partition)
        try:
            low, high = self._consumer.get_watermark_offsets(partition, timeout=REQUEST_TIMEOUT_S)
        except KafkaException as cause:
            msg = f"{item}: offset {wanted} is out of range ({error.str()}) and the log's range cannot be read"
            return RetryableSourceError(f"{msg}: {cause.args[0].str()}")
        msg = f"{item}: next_offset {wanted} is not in the log, which holds [{low},{high}). "
        if wanted > high:
            msg += (
                "The log was cut, or the topic was made anew, which a restart tells. For tables there are "
                "`streamforge reconcile` and `streamforge rebind`"
            )
        else:
            msg += (
                f"Records below {low} were removed by retention; nothing brings them back into this topic. A restart "
                "goes on at the log start where it may: STREAMFORGE_PROCESSOR_ACCEPT_RETENTION_GAP=true, "
                "STREAMFORGE_WRITER_ACCEPT_RETENTION_GAP=true for the writer"
            )
        return RetentionGapError(msg)


def _ends_of_runs(messages: Sequence[Message], *, many_topics: bool) -> Iterator[Message]:
    """Yield the last message of each run of one topic-partition: a fetch is long, its runs are few."""
    places: Sequence[Any] = [message.partition() for message in messages]
    if many_topics:
        places = list(zip(places, [message.topic() for message in messages], strict=True))
    return compress(messages, chain(map(operator.ne, places, places[1:]), (True,)))


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[threading.Event]:
    """Set `stop` on SIGTERM and SIGINT; outside the main thread signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
