"""What the tests of the writer share: records, a writer in a thread or process, and identities to compare."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from streamforge.contracts import Contracts
from streamforge.errors import ConfigurationError
from streamforge.kafka import describe_topics, producer_config
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.log_reader import log_ends, log_starts, read_range, stable_ends
from streamforge.market.records import Trade
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from streaming.runner import RunnerOptions, run_worker
from streaming.writer import WriterSettings, WriterWorker
from tests.forked import Forked, streamforge
from tests.kafka_records import create_topic
from tests.object_store import store_environment, store_values
from tests.waiting import wait_until

TRADE_TOPICS = ("trades", "trades.dlq", "queue-events", "queue-control")
PARTITIONS = 2
RAW_TOPIC_ID = "AAAAAAAAAAAAAAAAAAAAAA"
Identity = tuple[int, int]
_PROCESS_FIELDS = ("home", "topic_prefix", "bootstrap_servers", "contracts_dir", "kill_at", "log_level", "log_file")


def writer_settings(platform: Settings, **overrides: Any) -> WriterSettings:
    """Return settings of a writer of `trades` on the platform, with short intervals."""
    values: dict[str, Any] = {
        "writer_contracts": ("trades",),
        "writer_commit_interval_s": 0.1,
        "writer_idle_interval_s": 0.2,
        "writer_maintenance_commits": 1_000_000,
        **{name: getattr(platform, name) for name in ("home", "topic_prefix", "bootstrap_servers", "contracts_dir")},
        **store_values(platform),
    }
    return WriterSettings(_env_file=None, **(values | overrides))


def trade_value(number: int, **overrides: Any) -> bytes:
    """Return the wire form of one trade; `overrides` may break it."""
    trade = Trade(
        instrument="BTC-USDT.SIM",
        venue="SIM",
        symbol="BTCUSDT",
        trade_id=str(number),
        price=f"{60_000 + number % 100}.25",
        size="0.5",
        aggressor_side="BUY",  # type: ignore[arg-type]
        ts_event_ns=1_700_000_000_000_000_000 + number,
        ts_receive_ns=1_700_000_000_001_000_000 + number,
        raw_topic_id=RAW_TOPIC_ID,
        raw_partition=0,
        raw_offset=number,
        raw_index=0,
        parser_version="1",
    )
    return msgspec.json.encode(msgspec.to_builtins(trade) | overrides)


def trades(count: int, start: int = 0) -> list[bytes]:
    """Return `count` trades."""
    return [trade_value(start + index) for index in range(count)]


def produce(
    settings: Settings, topic: str, values: Sequence[bytes | None], *, partitions: int = PARTITIONS, abort: bool = False
) -> None:
    """Write one transaction over the topic's partitions, as the parser does; `abort` leaves holes only."""
    producer = Producer(producer_config(settings, transactional_id=f"{settings.topic_prefix}test-{os.getpid()}"))
    producer.init_transactions(30)
    producer.begin_transaction()
    for index, value in enumerate(values):
        producer.produce(topic, value, b"BTC-USDT.SIM", index % partitions)
    if abort:
        producer.flush(30)
        producer.abort_transaction(30)
    else:
        producer.commit_transaction(30)


def topic_identities(
    settings: Settings, topic: str, partitions: int = PARTITIONS, *, only_good: bool = False
) -> Counter[Identity]:
    """Return (partition, offset) of every committed record, or only of those that are trades."""
    items = [TopicPartition(topic, number) for number in range(partitions)]
    starts, ends = log_starts(settings, items), stable_ends(settings, items)
    return Counter(
        (message.partition() or 0, message.offset() or 0)
        for messages in read_range(settings, starts, ends)
        for message in messages
        if not only_good or _is_trade(message.value())
    )


def _is_trade(value: bytes | None) -> bool:
    try:
        return bool(msgspec.json.decode(value or b"", type=Trade))
    except msgspec.MsgspecError:
        return False


def table_identities(settings: Settings, contracts: Contracts, contract_id: str = "trades") -> Counter[Identity]:
    """Return (source_partition, source_offset) of every row."""
    table = load_table(open_catalog(settings), settings, contracts[contract_id])
    rows = table.scan(selected_fields=("source_partition", "source_offset")).to_arrow()
    return Counter(zip(rows["source_partition"].to_pylist(), rows["source_offset"].to_pylist(), strict=True))


def next_offsets(settings: Settings, contracts: Contracts, contract_id: str = "trades") -> dict[int, int]:
    """Return the table's `next_offset`s of its current source epoch."""
    from streamforge.lakehouse.commit import view_of  # noqa: PLC0415

    table = load_table(open_catalog(settings), settings, contracts[contract_id])
    state = view_of(table).state
    epoch = state.epoch_of(topic_of(contracts, contract_id).name)
    return state.next_offsets(epoch or 0)


class WriterThread:
    """A writer that runs in a thread; `exit_code` is there after `stop`."""

    def __init__(
        self,
        settings: WriterSettings,
        contracts: Contracts,
        *,
        slot: str = "0",
        consumer: Mapping[str, Any] | None = None,
    ) -> None:
        self.exit_code: int | None = None
        self.metrics = ProcessMetrics("writer", slot)
        self.worker = WriterWorker(settings, contracts, slot=slot, metrics=self.metrics)
        self._stop = threading.Event()
        self._arguments = (settings, contracts, slot)
        self._options = RunnerOptions(poll_s=0.02, consumer=consumer)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> WriterThread:
        """Begin."""
        self._thread.start()
        return self

    def consumed(self) -> int:
        """Return how many records it has taken in, records that came again among them."""
        return int(self.metrics.counters().get("records", 0))

    def stop(self, timeout_s: float = 30) -> int | None:
        """Stop, wait and return the exit code."""
        self._stop.set()
        return self.join(timeout_s)

    def join(self, timeout_s: float = 30) -> int | None:
        """Wait for the end and return the exit code."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the writer does not stop"
        return self.exit_code

    def _run(self) -> None:
        settings, contracts, slot = self._arguments
        self.exit_code = run_worker(
            self.worker,
            settings,
            contracts,
            slot=slot,
            metrics=self.metrics,
            options=self._options,
            stop=self._stop,
        )


@contextmanager
def running_writer(settings: WriterSettings, contracts: Contracts, *, slot: str = "0") -> Iterator[WriterThread]:
    """Run a writer in a thread and stop it at the end."""
    writer = WriterThread(settings, contracts, slot=slot).start()
    try:
        yield writer
    finally:
        writer.stop()


def wait_for_landed(
    settings: Settings,
    contracts: Contracts,
    topic: str,
    contract_id: str = "trades",
    *,
    writer: WriterThread | None = None,
    partitions: int = PARTITIONS,
) -> None:
    """Wait until the table's positions have reached the topic's stable end; fail at once if `writer` ends.

    A committed transaction's markers follow its commit: until they are there the stable end lies below the records.
    """
    items = [TopicPartition(topic, number) for number in range(partitions)]
    wait_until(lambda: stable_ends(settings, items) == log_ends(settings, items), what=f"markers in {topic}")
    ends = stable_ends(settings, items)
    wanted = {item.partition: end for item, end in ends.items()}

    def landed() -> bool:
        assert writer is None or writer.exit_code is None, f"the writer ended with exit code {writer.exit_code}"
        return _landed_positions(settings, contracts, contract_id) == wanted

    wait_until(landed, what=f"table {contract_id} at {wanted}")


def _landed_positions(settings: Settings, contracts: Contracts, contract_id: str) -> dict[int, int]:
    try:
        return next_offsets(settings, contracts, contract_id)
    except ConfigurationError:
        return {}  # the table is not there yet


def start_writer_process(settings: WriterSettings, *, kill_at: str | None = None, slot: str = "0", log: Path) -> Forked:
    """Start `streamforge run writer` as a process of its own."""
    environment = writer_environment(settings.model_copy(update={"kill_at": kill_at}))
    return streamforge(["run", "writer", "--slot", slot], environment, log=log)


def kill_writer_at(step: str, settings: WriterSettings, log: Path) -> None:
    """Run a writer's process until it is killed at a step."""
    process = start_writer_process(settings, kill_at=step, log=log)
    try:
        assert process.wait(100) == -signal.SIGKILL, f"{step}: {process.said()}"
    finally:
        process.end()


def assert_consistent(settings: Settings, contracts: Contracts, topic: str, step: str) -> None:
    """Check the table against the topic, below the table's positions, by identity."""
    try:
        positions, found = next_offsets(settings, contracts), table_identities(settings, contracts)
    except ConfigurationError:
        positions, found = {}, Counter[Identity]()  # killed before the table was there
    landed = Counter(
        (partition, offset)
        for partition, offset in topic_identities(settings, topic, only_good=True)
        if offset < positions.get(partition, 0)
    )
    assert found == landed, f"after {step}: doubled {found - landed}, lost {landed - found}"


def writer_environment(settings: WriterSettings) -> dict[str, str]:
    """Return the environment that gives a process these settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFORGE_")}
    for name in (*_PROCESS_FIELDS, *_writer_fields()):
        value = getattr(settings, name)
        if value is not None:
            text = msgspec.json.encode(value).decode() if isinstance(value, tuple) else str(value)
            environment[f"STREAMFORGE_{name.upper()}"] = text
    return {**environment, **store_environment(settings)}


def _writer_fields() -> Iterable[str]:
    return (name for name in WriterSettings.model_fields if name.startswith("writer_"))


def recreate_topic(admin: AdminClient, topic: str, partitions: int) -> tuple[str, str]:
    """Delete a topic and make it anew, empty; return its id before and after."""
    before = describe_topics(admin, [topic])[topic].topic_id
    for future in admin.delete_topics([topic]).values():
        future.result()
    wait_until(lambda: not describe_topics(admin, [topic]), what="the topic is gone")
    return before, create_topic(admin, topic, partitions)
