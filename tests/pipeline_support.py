"""What the tests of runner, parser and bars share: small topics, records, processes, and what came out."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from confluent_kafka import Message, Producer

from streamforge import broker
from streamforge.contracts import Contracts, load_contracts
from streamforge.kafka import producer_config
from streamforge.log_reader import log_ends, log_starts, read_range
from streamforge.market.binance import parse_trades
from streamforge.market.records import AggressorSide, DeadLetter, Trade
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings, load_settings
from streamforge.supervision import topic_of
from streamforge.topics import create_topics
from streaming.processors.bars import Bars
from streaming.processors.base import TransactionalWorker
from streaming.processors.history import HistoryParser
from streaming.processors.parser import Parser
from streaming.processors.types import TransactionOptions
from streaming.runner import RunnerOptions, Worker, run_worker
from tests.contract_files import copy_contracts
from tests.forked import Forked, streamforge
from tests.object_store import store_environment, store_values
from tests.waiting import wait_until

PARTITIONS = 2
TOPICS = (
    "raw-trades",
    "raw-trades.dlq",
    "trades",
    "trades.dlq",
    "bars",
    "market-gaps",
    "parser-changelog",
    "bars-changelog",
    "queue-events",
    "queue-control",
)
PROCESSORS: Mapping[str, Callable[[Settings], Any]] = {
    "parser": Parser,
    "bars": Bars,
    "history-parser": HistoryParser,
}
START_MS = 1_700_000_000_000
INSTRUMENTS = ("BTC-USDT.SIM", "ETH-USDT.SIM", "SOL-USDT.SIM", "XRP-USDT.SIM")


class Pipeline(NamedTuple):
    """A platform of its own with few topic-partitions, its topics made."""

    settings: Settings
    contracts: Contracts

    def topic(self, contract_id: str) -> str:
        """Return the name of a contract's topic."""
        return topic_of(self.contracts, contract_id).name

    def partitions(self, contract_id: str) -> list[TopicPartition]:
        """Return the topic-partitions of a contract's topic."""
        topic = topic_of(self.contracts, contract_id)
        return [TopicPartition(topic.name, number) for number in range(topic.partitions)]


def make_pipeline(
    broker_settings: Settings,
    folder: Path,
    prefix: str,
    topics: Sequence[str] = TOPICS,
    *,
    store: Mapping[str, Any] = MappingProxyType({}),
) -> Pipeline:
    """Make `topics` with at most `PARTITIONS` topic-partitions each; `store` says where tables are."""
    contracts_dir = copy_contracts(folder / "contracts")
    for path in contracts_dir.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        fewer = re.sub(r"(topic\.partitions, value: )(64|16|4)\b", rf"\g<1>{PARTITIONS}", text)
        path.write_text(fewer, encoding="utf-8")
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        home=folder / "home",
        contracts_dir=contracts_dir,
        topic_prefix=prefix,
        bootstrap_servers=broker.status(broker_settings).address,
        **store,
    )
    contracts = load_contracts(contracts_dir, topic_prefix=prefix)
    create_topics(settings, contracts, topics)
    return Pipeline(settings, contracts)


class RawFrame(NamedTuple):
    """A raw record to be produced."""

    instrument: str
    payload: bytes
    channel: str = "trade"
    ts_receive_ns: int = START_MS * 1_000_000 + 10**9
    headers: tuple[tuple[str, str | bytes], ...] | None = None


def trade_frame(
    instrument: str,
    trade_id: int,
    *,
    price: str = "61837.63000000",
    size: str = "0.02000000",
    ts_ms: int = START_MS,
    is_buyer_maker: bool = True,
) -> bytes:
    """Return a combined Binance trade frame."""
    symbol = instrument.partition(".")[0].replace("-", "")
    event = {
        "e": "trade",
        "E": ts_ms + 1,
        "s": symbol,
        "t": trade_id,
        "p": price,
        "q": size,
        "T": ts_ms,
        "m": is_buyer_maker,
        "M": True,
    }
    return msgspec.json.encode({"stream": f"{symbol.lower()}@trade", "data": event})


def produce_raw(pipeline: Pipeline, frames: Iterable[RawFrame]) -> None:
    """Produce raw records as a loader does."""
    producer = Producer(producer_config(pipeline.settings))
    topic = pipeline.topic("raw-trades")
    for number, frame in enumerate(frames):
        headers: Sequence[tuple[str, str | bytes]] = frame.headers or (
            ("venue", frame.instrument.rpartition(".")[2]),
            ("channel", frame.channel),
            ("connection_id", "c1"),
            ("sequence_in_connection", str(number)),
            ("ts_receive_ns", str(frame.ts_receive_ns)),
        )
        producer.produce(topic, frame.payload, frame.instrument.encode(), headers=list(headers))
        producer.poll(0)
    assert producer.flush(30) == 0


def produce_trades(
    pipeline: Pipeline, trades: Iterable[Trade | bytes], *, abort: bool = False, per_transaction: int = 50
) -> None:
    """Produce typed trades in transactions, so that commit markers lie between them."""
    config = producer_config(pipeline.settings, transactional_id=f"{pipeline.settings.topic_prefix}feeder")
    producer = Producer(config)
    producer.init_transactions(30)
    topic = pipeline.topic("trades")
    items = list(trades)
    for start in range(0, len(items), per_transaction):
        producer.begin_transaction()
        for item in items[start : start + per_transaction]:
            if isinstance(item, bytes):
                producer.produce(topic, item, b"BTC-USDT.SIM")
            else:
                producer.produce(topic, msgspec.json.encode(item), item.instrument.encode())
        if abort:
            producer.flush(30)
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)


def make_trade(instrument: str, trade_id: int, ts_ms: int, *, price: str = "100.5", size: str = "0.25") -> Trade:
    """Return a typed trade."""
    return Trade(
        instrument=instrument,
        venue=instrument.rpartition(".")[2],
        symbol=instrument.partition(".")[0].replace("-", ""),
        trade_id=str(trade_id),
        price=price,
        size=size,
        aggressor_side=AggressorSide.BUY if trade_id % 2 else AggressorSide.SELL,
        ts_event_ns=ts_ms * 1_000_000,
        ts_receive_ns=ts_ms * 1_000_000 + 5_000_000,
        raw_topic_id="AAAAAAAAAAAAAAAAAAAAAA",
        raw_partition=0,
        raw_offset=trade_id,
        raw_index=0,
        parser_version="0.1.0",
    )


def committed(pipeline: Pipeline, contract_id: str) -> list[Message]:
    """Return the committed records of a topic, by topic-partition and offset.

    A commit is answered before its markers lie in every topic-partition: the stable end may lag behind it.
    """
    partitions = pipeline.partitions(contract_id)
    starts, ends = log_starts(pipeline.settings, partitions), log_ends(pipeline.settings, partitions)
    messages = [message for part in read_range(pipeline.settings, starts, ends) for message in part]
    return sorted(messages, key=lambda message: (message.partition() or 0, message.offset() or 0))


def dead_letters(pipeline: Pipeline, contract_id: str) -> list[DeadLetter]:
    """Return the dead letters of a topic."""
    return [
        msgspec.json.decode(message.value() or b"", type=DeadLetter)
        for message in committed(pipeline, f"{contract_id}.dlq")
    ]


def is_trade_frame(payload: bytes) -> bool:
    """Return whether the frame is one of a trade stream."""
    return parse_trades(payload) is not None


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """Return the environment of a process with these settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFORGE_")}
    names = ("home", "contracts_dir", "topic_prefix", "bootstrap_servers")
    ours = {f"STREAMFORGE_{name.upper()}": str(getattr(settings, name)) for name in names}
    return {**kept, **ours, **store_environment(settings), **more}


@contextmanager
def process(
    pipeline: Pipeline,
    kind: str,
    *,
    slot: str = "0",
    kill_at: str | None = None,
    log: Path,
    more: Mapping[str, str] | None = None,
) -> Iterator[Forked]:
    """Run `streamforge run KIND` as a process, with `more` in its environment; it is gone at the end."""
    armed = {} if kill_at is None else {"STREAMFORGE_KILL_AT": kill_at}
    variables = environment(pipeline.settings, **armed, **(more or {}))
    started = streamforge(["run", kind, "--slot", slot], variables, log=log)
    try:
        yield started
    finally:
        started.end()


class WorkerThread:
    """A worker under the runner, in a thread of this process."""

    def __init__(
        self,
        pipeline: Pipeline,
        worker: Worker,
        *,
        slot: str = "0",
        metrics: ProcessMetrics | None = None,
        consumer: Mapping[str, Any] | None = None,
    ) -> None:
        self.worker = worker
        self._consumer = consumer
        self.exit_code: int | None = None
        self.metrics = metrics or ProcessMetrics(worker.kind, slot)
        self._stop = threading.Event()
        self._pipeline = pipeline
        self._slot = slot
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop the loop and return its exit code."""
        self._stop.set()
        return self.join()

    def join(self, timeout_s: float = 60.0) -> int:
        """Wait for the end and return the exit code."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the worker does not end"
        assert self.exit_code is not None
        return self.exit_code

    def _run(self) -> None:
        self.exit_code = run_worker(
            self.worker,
            self._pipeline.settings,
            self._pipeline.contracts,
            slot=self._slot,
            metrics=self.metrics,
            options=RunnerOptions(poll_s=0.02, report_interval_s=0.2, consumer=self._consumer),
            stop=self._stop,
        )


def make_worker(
    pipeline: Pipeline,
    kind: str,
    *,
    slot: str = "0",
    options: TransactionOptions | None = None,
    metrics: ProcessMetrics | None = None,
) -> TransactionalWorker[object]:
    """Return the worker of a processor of the pipeline."""
    known = {name: getattr(pipeline.settings, name) for name in ("home", "contracts_dir", "topic_prefix")}
    known["bootstrap_servers"] = pipeline.settings.bootstrap_servers
    known |= store_values(pipeline.settings)
    settings = load_settings(_env_file=None, **known)
    return TransactionalWorker(
        PROCESSORS[kind](settings),
        pipeline.settings,
        pipeline.contracts,
        slot=slot,
        metrics=metrics or ProcessMetrics(kind, slot),
        options=options or TransactionOptions(commit_interval_s=0.05, idle_commit_interval_s=0.1),
    )


@contextmanager
def running(pipeline: Pipeline, kind: str, *, slot: str = "0") -> Iterator[WorkerThread]:
    """Run the worker of a processor in a thread; it has stopped at the end."""
    thread = WorkerThread(pipeline, make_worker(pipeline, kind, slot=slot), slot=slot)
    try:
        yield thread
    finally:
        thread.stop()


def wait_for_positions(pipeline: Pipeline, thread: WorkerThread, contract_id: str) -> None:
    """Wait until the durable positions have reached the end of the input, markers included."""
    ends = log_ends(pipeline.settings, pipeline.partitions(contract_id))

    def reached() -> bool:
        assert thread.exit_code is None, f"the worker ended with exit code {thread.exit_code}"
        positions = dict(thread.worker.positions())
        return all(positions.get(item, -1) >= end for item, end in ends.items())

    wait_until(reached, what=f"positions of {thread.worker.kind} at {ends}")
