"""Adapters of `queue-events` and `queue-control`: publish what a process does, hear what it is told.

Everything a running process calls here returns at once: events are handed to a bounded producer and
dropped (counted) when the broker is away, commands are polled. Threads and asyncio tasks can both use it.

Desired state: of all `pause` and `resume` commands that address a process (by `*`, its kind, `kind/slot`
or its process id), the one written last wins, however specific its target is. Commands are kept by target
(compaction), so this survives restarts; a target of a process id dies with that process.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge import __version__
from streamforge.contracts import Contracts, TopicSettings
from streamforge.errors import ConfigurationError, DecodeError, RetryableSourceError
from streamforge.events import (
    Command,
    CommandKind,
    EventKind,
    ProcessEvent,
    ProcessState,
    decode_command,
    decode_event,
)
from streamforge.kafka import producer_config, reader_config
from streamforge.liveness import judge
from streamforge.log_reader import log_ends, log_starts, offsets_since, read_range
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings

EVENTS_CONTRACT = "queue-events"
CONTROL_CONTRACT = "queue-control"

_CLIENT_LOG = logging.getLogger("streamforge.librdkafka")
_QUEUE_EVENTS = 10_000
_QUEUE_KIB = 16_384
_POLL_RECORDS = 500
_POLL_S = 0.1
_CLOCK_SKEW_MS = 60_000
_ALIVE_S = 60.0
_OBEYING = (ProcessState.STARTING, ProcessState.RUNNING, ProcessState.PAUSED)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Which process speaks: its kind, its slot (stable over restarts) and this start of it."""

    kind: str
    slot: str
    host: str
    pid: int
    started_ns: int

    @classmethod
    def of_this_process(cls, kind: str, slot: str, *, now_ns: int | None = None) -> ProcessIdentity:
        """Return the identity of the calling process, started now."""
        return cls(kind, slot, socket.gethostname(), os.getpid(), time.time_ns() if now_ns is None else now_ns)

    @property
    def process_id(self) -> str:
        """Return the id that events carry and commands can be addressed to: kind, slot and start."""
        return f"{self.kind}/{self.slot}@{self.started_ns}"

    def owner(self, topic_prefix: str) -> str:
        """Return what tables and ledgers say of it: no two starts have the same, on any host."""
        return f"{topic_prefix}{self.kind}.{self.slot}@{self.host}:{self.pid}:{self.started_ns}"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """What an event says of the process at that moment; topic-partitions as `topic-number`."""

    state: ProcessState
    assignment: Sequence[str] = ()
    positions: Mapping[str, int] = field(default_factory=dict)
    lag: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)


class EventPublisher:
    """Publishes the events of one process; never waits for the broker and never raises because of it.

    Args:
        settings: where the broker is.
        contracts: has `queue-events`.
        identity: who speaks.
        metrics_port: port of metrics and readiness, said in every event.
        clock_ns: wall clock, nanoseconds since 1970 UTC.
    """

    def __init__(
        self,
        settings: Settings,
        contracts: Contracts,
        identity: ProcessIdentity,
        *,
        metrics_port: int | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.identity = identity
        self.metrics_port = metrics_port
        self.dropped_events = 0
        self._clock_ns = clock_ns
        self._topic = topic_of(contracts, EVENTS_CONTRACT).name
        self._status = ProcessStatus(ProcessState.STARTING)
        # Not idempotent: a record that timed out would be a fatal error for an idempotent producer, and
        # events are at least once anyway.
        bounds: dict[str, Any] = {
            "enable.idempotence": False,
            "queue.buffering.max.messages": _QUEUE_EVENTS,
            "queue.buffering.max.kbytes": _QUEUE_KIB,
        }
        self._producer = Producer(producer_config(settings, **bounds), logger=_CLIENT_LOG)

    def started(self, status: ProcessStatus | None = None, *, detail: str = "") -> None:
        """Say that the process is there."""
        self._publish(EventKind.STARTED, status, detail=detail)

    def heartbeat(self, status: ProcessStatus | None = None, *, detail: str = "") -> None:
        """Say that the process lives."""
        self._publish(EventKind.HEARTBEAT, status, detail=detail)

    def progress(self, status: ProcessStatus, *, detail: str = "") -> None:
        """Say how far it is."""
        self._publish(EventKind.PROGRESS, status, detail=detail)

    def answer(self, command: Command, status: ProcessStatus | None = None, *, detail: str = "") -> None:
        """Answer `command` by a heartbeat that names it, with the state after obeying."""
        self._publish(EventKind.HEARTBEAT, status, detail=detail, in_reply_to=command.command_id)

    def finished(self, *, exit_code: int = 0, detail: str = "") -> None:
        """Say that the process ends as it was told to."""
        self._status = _with(self._status, ProcessState.STOPPED)
        self._publish(EventKind.FINISHED, None, detail=detail, exit_code=exit_code)

    def error(self, detail: str, *, exit_code: int | None = None) -> None:
        """Say what went wrong; with `exit_code` the process ends by it."""
        if exit_code is not None:
            self._status = _with(self._status, ProcessState.FAILED)
        self._publish(EventKind.ERROR, None, detail=detail, exit_code=exit_code)

    def flush(self, timeout_s: float = 5.0) -> int:
        """Wait until the broker has every event or `timeout_s` is over; return how many it does not have."""
        return self._producer.flush(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush within `timeout_s` and drop what is left."""
        if self.flush(timeout_s):
            self._producer.purge()
            self._producer.poll(0)
        self._producer.close()

    def _publish(
        self,
        kind: EventKind,
        status: ProcessStatus | None,
        *,
        detail: str,
        in_reply_to: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        self._status = status or self._status
        event = ProcessEvent(
            process_id=self.identity.process_id,
            kind=self.identity.kind,
            slot=self.identity.slot,
            host=self.identity.host,
            pid=self.identity.pid,
            version=__version__,
            event=kind,
            state=self._status.state,
            ts_ns=self._clock_ns(),
            assignment=list(self._status.assignment),
            positions=dict(self._status.positions),
            lag=dict(self._status.lag),
            counters=dict(self._status.counters),
            metrics_port=self.metrics_port,
            in_reply_to=in_reply_to,
            exit_code=exit_code,
            detail=detail,
        )
        try:
            self._producer.produce(
                self._topic,
                key=event.process_id.encode(),
                value=msgspec.json.encode(event),
                on_delivery=self._delivered,
            )
        except (BufferError, KafkaException):
            self.dropped_events += 1
        self._producer.poll(0)

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self.dropped_events += 1


class ControlListener:
    """Hears the commands that are addressed to one process, by assignment and without a group.

    Every process hears every command: there is no group that would share them out. The topic is read from
    its beginning, so the desired state is known as soon as `caught_up`; commands that are done once (`stop`,
    `ping`, `fault`) are for processes that live when they are issued, and older ones are ignored. Old and
    new are told by the issuer's clock: keep the clocks of the machines together.

    Args:
        settings: where the broker is.
        contracts: has `queue-control`.
        identity: who listens.
    """

    def __init__(self, settings: Settings, contracts: Contracts, identity: ProcessIdentity) -> None:
        self._identity = identity
        self.paused = False
        topic = topic_of(contracts, CONTROL_CONTRACT)
        self._topic_name = topic.name
        self._unread = set(range(topic.partitions))
        # Not `error` as elsewhere: this reader has no position that could be lost, it starts at the log start.
        self._consumer = Consumer(
            reader_config(settings, **{"auto.offset.reset": "earliest", "topic.metadata.refresh.interval.ms": 5_000}),
            logger=_CLIENT_LOG,
        )
        self._consumer.assign([KafkaTopicPartition(topic.name, n, OFFSET_BEGINNING) for n in range(topic.partitions)])

    @property
    def caught_up(self) -> bool:
        """Return whether everything written before the start has been heard; `paused` is right from then on."""
        return not self._unread

    def poll(self) -> list[Command]:
        """Return the commands that came since the last call and were issued since the process started.

        `paused` is already the desired state after them. A record that is not a command is skipped: it
        cannot be obeyed, and a listener that stops at it would hear nothing more.
        """
        return self._hear(0)

    def wait_until_caught_up(self, timeout_s: float) -> list[Command]:
        """Poll until `caught_up`; return the commands heard meanwhile.

        Raises:
            RetryableSourceError: it is not within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        commands = self._hear(0)
        while not self.caught_up and time.monotonic() < deadline_s:
            commands.extend(self._hear(_POLL_S))
        if not self.caught_up:
            raise self.not_caught_up(timeout_s)
        return commands

    def not_caught_up(self, waited_s: float) -> RetryableSourceError:
        """Return the error of a process that cannot know whether it was paused before its start."""
        msg = (
            f"{self._topic_name} was not read to its end within {waited_s} s. Whether this process was told to pause "
            "is not known, so it does no work. Is the broker up, does the topic exist? `streamforge doctor`"
        )
        return RetryableSourceError(msg)

    def close(self) -> None:
        """Let go of the client."""
        self._consumer.close()

    def _hear(self, timeout_s: float) -> list[Command]:
        heard = []
        for message in self._consumer.consume(_POLL_RECORDS, timeout_s):
            error = message.error()
            if error is None:
                heard.append(self._understood(message.value()))
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own name
                self._unread.discard(message.partition() or 0)
        return [command for command in heard if command is not None]

    def _understood(self, value: bytes | None) -> Command | None:
        if value is None:  # the tombstone of a command that was done once
            return None
        try:
            command = decode_command(value)
        except DecodeError as error:
            _CLIENT_LOG.warning("%s: skipped", error)
            return None
        me = self._identity
        if not command.addresses(process_id=me.process_id, kind=me.kind, slot=me.slot):
            return None
        if command.is_desired_state:
            self.paused = command.command is CommandKind.PAUSE
        return command if command.ts_issued_ns >= me.started_ns else None


def send_command(
    settings: Settings,
    contracts: Contracts,
    *,
    target: str,
    command: CommandKind,
    issued_by: str,
    arguments: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
) -> Command:
    """Write one command to `queue-control` and return it once the broker has it.

    The tombstone behind a command that is done once lets compaction remove it: its key never comes back.

    Raises:
        RetryableSourceError: the broker did not take it within `timeout_s`; it is then not sent later.
    """
    topic = topic_of(contracts, CONTROL_CONTRACT)
    record = Command(
        command_id=uuid.uuid4().hex,
        target=target,
        command=command,
        issued_by=issued_by,
        ts_issued_ns=time.time_ns(),
        arguments=dict(arguments or {}),
    )
    failures: list[str] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        failures.extend([error.str()] if error is not None else [])

    producer = Producer(producer_config(settings), logger=_CLIENT_LOG)
    body = msgspec.json.encode(record)
    for value in (body,) if record.is_desired_state else (body, None):
        producer.produce(topic.name, key=record.key.encode(), value=value, on_delivery=delivered)
    if producer.flush(timeout_s):
        producer.purge()
        producer.poll(0)
        failures.append(f"no answer within {timeout_s} s")
    if failures:
        msg = f"{command} to {target!r} was not written to {topic.name}: {failures[0]}. Is the broker up?"
        raise RetryableSourceError(msg)
    return record


def wait_for_answer(
    settings: Settings, contracts: Contracts, command: Command, *, timeout_s: float = 15.0
) -> ProcessEvent:
    """Return the first event that answers `command`, as `send_command` returned it.

    Raises:
        RetryableSourceError: nobody answered within `timeout_s`.
    """
    with closing(_answers(settings, contracts, command, timeout_s)) as answers:
        for event in answers:
            return event
    msg = (
        f"nobody answered {command.command} to {command.target!r} within {timeout_s} s. "
        "`streamforge status` shows which processes live"
    )
    raise RetryableSourceError(msg)


def wait_for_answers(
    settings: Settings, contracts: Contracts, command: Command, *, timeout_s: float = 15.0
) -> list[ProcessEvent]:
    """Return what every live process that `command` addresses answered, as `send_command` returned it, by process id.

    Alive is who spoke in the minute before the command and did not say that it ends. Where nobody like that is known
    the first answer is enough; so it is for a fault, which only the simulator has.

    Raises:
        RetryableSourceError: not all of them answered within `timeout_s`; names the others.
    """
    missing = set() if command.command is CommandKind.FAULT else _live_targets(settings, contracts, command)
    if not missing:
        return [wait_for_answer(settings, contracts, command, timeout_s=timeout_s)]
    found: dict[str, ProcessEvent] = {}
    with closing(_answers(settings, contracts, command, timeout_s)) as answers:
        for event in answers:
            found.setdefault(event.process_id, event)
            missing.discard(event.process_id)
            if not missing:
                return [found[process_id] for process_id in sorted(found)]
    msg = (
        f"no answer to {command.command} within {timeout_s} s from {', '.join(sorted(missing))}; "
        f"{', '.join(sorted(found)) or 'nobody'} answered. A process that was killed counts as alive for a minute; "
        "`streamforge status` shows who lives"
    )
    raise RetryableSourceError(msg)


def _live_targets(settings: Settings, contracts: Contracts, command: Command) -> set[str]:
    """Return the process ids of those that lived when `command` was issued and that it addresses."""
    issued_ns = command.ts_issued_ns
    # What came after it may be its effect already: who has ended by it was told, too.
    said = read_events(settings, contracts, within_s=_ALIVE_S, now_ns=issued_ns)
    latest = [each.last for each in judge((each for each in said if each.ts_ns <= issued_ns), issued_ns)]
    return {
        each.process_id
        for each in latest
        if each.state in _OBEYING and command.addresses(process_id=each.process_id, kind=each.kind, slot=each.slot)
    }


def _answers(settings: Settings, contracts: Contracts, command: Command, timeout_s: float) -> Generator[ProcessEvent]:
    """Yield the events that answer `command` as they come, until `timeout_s` is over."""
    topic = topic_of(contracts, EVENTS_CONTRACT)
    since_ms = command.ts_issued_ns // 1_000_000 - _CLOCK_SKEW_MS
    partitions = _partitions(topic)
    ends = log_ends(settings, partitions)
    found = offsets_since(settings, partitions, since_ms)
    starts = {item: ends[item] if offset is None else offset for item, offset in found.items()}
    consumer = Consumer(reader_config(settings), logger=_CLIENT_LOG)
    deadline_s = time.monotonic() + timeout_s
    try:
        consumer.assign([KafkaTopicPartition(i.topic, i.partition, start) for i, start in starts.items()])
        while time.monotonic() < deadline_s:
            for event in _events(consumer.consume(_POLL_RECORDS, _POLL_S)):
                if event.in_reply_to == command.command_id:
                    yield event
    finally:
        consumer.close()


def read_events(
    settings: Settings, contracts: Contracts, *, within_s: float, now_ns: int | None = None
) -> Iterator[ProcessEvent]:
    """Yield what the processes said in the last `within_s` seconds: each process in the order of its words.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    topic = topic_of(contracts, EVENTS_CONTRACT)
    since_ms = (time.time_ns() if now_ns is None else now_ns) // 1_000_000 - int(within_s * 1000)
    partitions = _partitions(topic)
    ends = log_ends(settings, partitions)
    first = log_starts(settings, partitions)
    found = offsets_since(settings, partitions, max(since_ms, 0))
    starts = {item: ends[item] if offset is None else max(offset, first[item]) for item, offset in found.items()}
    for messages in read_range(settings, starts, ends):
        yield from _events(messages)


def read_process_states(
    settings: Settings, contracts: Contracts, *, within_s: float = 86_400.0, now_ns: int | None = None
) -> dict[str, ProcessEvent]:
    """Return the latest event of each process that said something in the last `within_s` seconds, by process id."""
    states: dict[str, ProcessEvent] = {}
    for event in read_events(settings, contracts, within_s=within_s, now_ns=now_ns):
        known = states.get(event.process_id)
        if known is None or event.ts_ns >= known.ts_ns:
            states[event.process_id] = event
    return states


def topic_of(contracts: Contracts, contract_id: str) -> TopicSettings:
    """Return the topic of a contract.

    Raises:
        ConfigurationError: the contract is missing or has no topic.
    """
    contract = contracts[contract_id]
    if contract.topic is None:
        msg = f"contract {contract_id} ({contract.path}) has no topic; it needs topic.partitions"
        raise ConfigurationError(msg)
    return contract.topic


def _with(status: ProcessStatus, state: ProcessState) -> ProcessStatus:
    return ProcessStatus(state, status.assignment, status.positions, status.lag, status.counters)


def _partitions(topic: TopicSettings) -> list[TopicPartition]:
    return [TopicPartition(topic.name, number) for number in range(topic.partitions)]


def _events(messages: Sequence[Message]) -> list[ProcessEvent]:
    events = []
    for message in messages:
        if message.error() is not None:
            continue
        try:
            events.append(decode_event(message.value() or b""))
        except DecodeError as error:
            _CLIENT_LOG.warning("%s: skipped", error)
    return events
