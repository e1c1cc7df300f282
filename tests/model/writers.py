"""The writer in the model: the real `WriterWorker` and `TableWriter`, with a consumer that reads the model's log.

Between two calls a writer is a value (`Writer`): what its buffers hold, what it believes to own, where its consumer
reads. A call is run on real objects that are set to that value, and read back when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import FencedError, HistoryRolledBackError, StreamForgeError
from streamforge.lakehouse import table_writer
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.protocol import SourceIdentity
from streamforge.lakehouse.rows import Decoded
from streamforge.lakehouse.table_writer import TableWriter
from streamforge.offsets import TopicPartition
from streaming import writer as writer_module
from streaming.runner import Fetched
from streaming.writer import WriterSettings, WriterWorker
from tests.kafka_records import Record
from tests.model.seams import Answer, Asks, Confirm, Port, Question, rows_of
from tests.model.world import Log, Table

CONTRACT = TOPIC = "market-gaps"
IDENTITY = SourceIdentity(TOPIC, "topic-id", "cluster-id")
Generations = tuple[tuple[int, int], ...]


NO_TABLE = Table()


class Status(StrEnum):
    """Whether a process runs, and why not."""

    UP = "up"
    FENCED = "fenced"
    ROLLED_BACK = "refuses the table"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Held:
    """A topic-partition that is claimed, and what is buffered of it."""

    partition: int
    owner_epoch: int
    start: int
    end: int
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ahead:
    """A fetch that the consumer has made and the writer has not yet taken in."""

    partition: int
    offsets: tuple[int, ...]
    position: int


@dataclass(frozen=True, slots=True)
class Writer:
    """One writer process between two steps.

    Args:
        incarnation: how often it was started.
        drafts: snapshot ids that it has given.
        believed: generation of the group in which it was assigned each topic-partition; None: it was not.
        reading: offset that its consumer fetches next, by topic-partition.
        held: claimed topic-partitions.
        epoch: source epoch of the claim; 0: nothing was claimed.
        table: metadata that it loaded last.
        ahead: a fetch not yet taken in.
        call: what it is in the middle of; empty: nothing.
        generations: of the topic-partitions that the call is about.
        hands_over: the topic-partition for which the group waits until the call has ended.
        answers: to the questions of the call.
        status: whether it runs.
    """

    incarnation: int
    drafts: int
    believed: tuple[int | None, ...]
    reading: tuple[int, ...]
    held: tuple[Held, ...] = ()
    epoch: int = 0
    table: Table = NO_TABLE
    ahead: Ahead | None = None
    call: str = ""
    generations: Generations = ()
    hands_over: int | None = None
    answers: tuple[Answer, ...] = ()
    status: Status = Status.UP

    def called(self, call: str, partitions: Sequence[int], believed: tuple[int | None, ...] | None = None) -> Writer:
        """Return the writer at the beginning of a call."""
        known = believed or self.believed
        generations = tuple((p, known[p] or 0) for p in partitions)
        return replace(self, call=call, generations=generations, believed=known)

    def restarted(self, drafts: int) -> Writer:
        """Return the same slot as a new process."""
        nothing = len(self.believed)
        return Writer(self.incarnation + 1, drafts, (None,) * nothing, (0,) * nothing)


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that waits for an answer."""

    question: Question
    drafts: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A call that has ended: the process after it, and what it raised."""

    process: Any
    error: StreamForgeError | None = None


class WriterModel:
    """Runs the calls of one writer.

    Args:
        number: of the slot.
        logs: what the topic holds.
        retained: table snapshots that it keeps when it expires some after each commit; None: it never does.
    """

    def __init__(self, number: int, logs: tuple[Log, ...], retained: int | None = None) -> None:
        self.number = number
        self._retained = retained
        self.name = f"writer {'AB'[number]}"
        self._logs = logs
        self._runs: dict[Writer, Asked | Ended] = {}

    def first(self) -> Writer:
        """Return the process as it starts."""
        return Writer(1, 0, (None,) * len(self._logs), (0,) * len(self._logs))

    def run(self, process: Writer) -> Asked | Ended:
        """Run the call to its next question or its end; a run is made once for each value."""
        if process not in self._runs:
            self._runs[process] = self._run(process)
        return self._runs[process]

    def _run(self, process: Writer) -> Asked | Ended:
        port = Port(self.name, self.number + 1, process.answers, process.drafts, process.generations)
        consumer = ModelConsumer(port, process)
        worker = self._worker(process, port, consumer)
        error: StreamForgeError | None = None
        status = Status.UP
        try:
            self._call(worker, consumer, process)
        except Asks as asks:
            return Asked(asks.question, port.drafts)
        except FencedError as raised:
            error, status = raised, Status.FENCED
        except HistoryRolledBackError as raised:
            error, status = raised, Status.ROLLED_BACK
        except StreamForgeError as raised:
            error, status = raised, Status.FAILED
        if error is not None:
            stopped = process.restarted(port.drafts)
            return Ended(replace(stopped, status=status), error)
        return Ended(self._after(worker, consumer, process, port))

    def _call(self, worker: WriterWorker, consumer: ModelConsumer, process: Writer) -> None:
        items = [TopicPartition(TOPIC, p) for p, _ in process.generations]
        match process.call:
            case "assigned":
                starts = worker.assigned(items)
                for item in items:
                    consumer.reading[item.partition] = starts[item]
            case "lost" | "revoked":
                worker.revoked(items, lost=process.call == "lost")
                consumer.ahead = None
            case "fetch":
                consumer.ahead = self._fetched(process, items[0].partition)
                consumer.reading[items[0].partition] = consumer.ahead.position
            case "take" if process.ahead is not None:
                worker.process(fetched_of(process.ahead))
                consumer.ahead = None
            case _:
                worker.commit()

    def _fetched(self, process: Writer, partition: int) -> Ahead:
        """Return the next record with the position behind it; behind the last one, the end of the log."""
        log, start = self._logs[partition], process.reading[partition]
        offsets = log.within(start, log.end)[:1]
        return Ahead(partition, offsets, offsets[0] + 1 if offsets else log.end)

    def _worker(self, process: Writer, port: Port, consumer: ModelConsumer) -> WriterWorker:
        worker = real_worker(self.name, process.incarnation)
        worker._consumer = consumer  # type: ignore[assignment]
        real = worker._writers[TOPIC]
        real.table = port.table(process.table)
        worker._commits = {}
        # The table is its own ledger: the summaries of a ledger are never copied.
        maintenance = (
            None if self._retained is None else Maintenance(real.table, real.contract, retained=self._retained)
        )
        worker._maintenance = maintenance
        real._identity, real._epoch = (IDENTITY if process.epoch else None), process.epoch
        worker._identities = {TOPIC: IDENTITY}
        real._held = {
            item.partition: table_writer._Held(
                item.owner_epoch, item.start, item.end, [rows_of(item.partition, item.offsets)] if item.offsets else []
            )
            for item in process.held
        }
        real._recount()
        return worker

    def _after(self, worker: WriterWorker, consumer: ModelConsumer, process: Writer, port: Port) -> Writer:
        real = worker._writers[TOPIC]
        value: Any = real.table.metadata
        held = tuple(
            Held(p, item.owner_epoch, item.start, item.end, tuple(o for rows in item.rows for o in offsets_of(rows)))
            for p, item in sorted(real._held.items())
        )
        return replace(
            process,
            drafts=port.drafts,
            reading=tuple(consumer.reading),
            held=held,
            epoch=real._epoch,
            table=value.value,
            ahead=consumer.ahead,
            call="",
            generations=(),
            hands_over=None,
            answers=(),
        )


class ModelConsumer:
    """What the writer uses of its consumer."""

    def __init__(self, port: Port, process: Writer) -> None:
        self._port = port
        self._assigned = [p for p, generation in enumerate(process.believed) if generation is not None]
        self.reading = list(process.reading)
        self.ahead = process.ahead

    def commit(self, *, offsets: list[KafkaTopicPartition], asynchronous: bool) -> list[KafkaTopicPartition]:
        """Take a hint in silence; ask the group when its answer is waited for."""
        if not asynchronous and not self._port.ask(Confirm(self._port.generations)):
            raise KafkaException(KafkaError(KafkaError.ILLEGAL_GENERATION))
        return offsets

    def seek(self, item: KafkaTopicPartition) -> None:
        """Read on from another offset; what was fetched ahead is forgotten."""
        self.reading[item.partition] = item.offset
        self.ahead = None

    def position(self, items: list[KafkaTopicPartition]) -> list[KafkaTopicPartition]:
        """Return where the next fetch begins, which may be ahead of what was taken in."""
        return [KafkaTopicPartition(TOPIC, item.partition, self.reading[item.partition]) for item in items]

    def assignment(self) -> list[KafkaTopicPartition]:
        """Return what the consumer believes to own."""
        return [KafkaTopicPartition(TOPIC, p) for p in self._assigned]


class Decoder:
    """Makes a row of each record; what is in a record is no matter of the protocol."""

    def decode(self, messages: Sequence[Any]) -> Decoded:
        """Return a row for each message."""
        offsets: dict[int, list[int]] = {}
        for message in messages:
            offsets.setdefault(message.partition(), []).append(message.offset())
        return Decoded({p: rows_of(p, found) for p, found in offsets.items()}, [])


def offsets_of(rows: Any) -> list[int]:
    """Return the offsets of buffered rows."""
    found: list[int] = rows["source_offset"].to_pylist()
    return found


def fetched_of(ahead: Ahead) -> Fetched:
    """Return a fetch as the runner hands it over."""
    messages: list[Any] = [Record(b"", offset, ahead.partition) for offset in ahead.offsets]
    return Fetched(messages, {TopicPartition(TOPIC, ahead.partition): ahead.position})


@cache
def settings() -> tuple[WriterSettings, Contracts]:
    """Return settings of a writer of one table, which reaches nothing by them, and the contracts."""
    made = WriterSettings(  # type: ignore[call-arg]
        _env_file=None,
        home=Path("model"),
        bootstrap_servers="model:0",
        writer_contracts=(CONTRACT,),
        writer_maintenance_commits=1,
    )
    return made, load_contracts(made.contracts_dir)


@cache
def real_worker(name: str, incarnation: int) -> WriterWorker:
    """Return the real worker of a process, which has its own owner name."""
    made, contracts = settings()
    metrics: Any = Silent()
    worker = WriterWorker(made, contracts, slot=name, metrics=metrics, monotonic_s=lambda: 0.0)
    worker.owner = f"{name}.{incarnation}"
    worker._log = structlog.wrap_logger(Silent())
    table: Any = None
    worker._writers[TOPIC] = TableWriter(contracts[CONTRACT], table, owner=worker.owner, deadline_s=60.0)
    worker._writers[TOPIC]._decoder = Decoder()  # type: ignore[assignment]
    return worker


class Silent:
    """Hears everything and says nothing: metrics, logs, a producer without dead letters."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments, **_named: None


def connect(patch: pytest.MonkeyPatch) -> None:
    """Connect the real writer to the model's topic."""

    def described(_admin: object, topics: Sequence[str]) -> Mapping[str, Any]:
        return {topic: SimpleNamespace(topic_id="topic-id", cluster_id="cluster-id") for topic in topics}

    def log_starts(_settings: object, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    patch.setattr(writer_module, "admin_client", lambda _settings: None)
    patch.setattr(writer_module, "Producer", lambda _settings: Silent())
    patch.setattr(writer_module, "describe_topics", described)
    patch.setattr(writer_module, "log_starts", log_starts)
    patch.setattr(table_writer, "finish_rows", lambda _contract, rows, **_: rows)
