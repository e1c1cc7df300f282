"""Rows a second of the writer from a backlog, against the Kafka client's own ceiling in the same run.

The ceiling is what one Python process can take from the broker at all: `consume` and `value()` of each
message. Then the writer lands the same records, with its real runner, protocol, catalog and settings.
CPU is that of one process, the client's threads included. Filling and ceiling have a process of their own, so that
the peak memory is the writer's.

    python -m benchmarks.writer_rate --records 1000000
    python -m benchmarks.writer_rate --records 5000000 --topic-partitions 16 --short
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import structlog
from confluent_kafka import Consumer, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # the stubs do not export it

from benchmarks import short_trades
from benchmarks.common import emit
from streamforge import broker
from streamforge.collector import calm_collector, plain_arrow_memory
from streamforge.contracts import Contracts, load_contracts
from streamforge.kafka import admin_client, producer_config, reader_config
from streamforge.log_reader import stable_ends
from streamforge.market.records import AggressorSide, Trade
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from streaming.runner import run_worker
from streaming.writer import WriterSettings, WriterWorker

TOPICS = ("trades", "trades.dlq", "queue-events", "queue-control")
FETCH_RECORDS = 10_000
INSTRUMENTS = 50


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--topic-partitions", type=int, default=4)
    parser.add_argument("--short", action="store_true", help="seven fields a trade, about 160 bytes of JSON")
    parser.add_argument("--profile", action="store_true", help="print where the writer's thread spends its time")
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with tempfile.TemporaryDirectory() as home:
        settings = WriterSettings(_env_file=None, home=Path(home), writer_contracts=("trades",))  # type: ignore[call-arg]
        if arguments.short:
            folder = short_trades.write_contracts(settings.contracts_dir, Path(home) / "contracts")
            settings = settings.model_copy(update={"contracts_dir": folder})
        broker.start(settings)
        try:
            result = run(settings, arguments)
        finally:
            broker.stop(settings)
    emit("writer_rate", vars(arguments), result)


def run(settings: WriterSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill the topic, measure the ceiling, then the writer."""
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    create_topics(settings, contracts, arguments.topic_partitions)
    topic = topic_of(contracts, "trades").name
    items = [TopicPartition(topic, number) for number in range(arguments.topic_partitions)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        record_bytes = other.submit(fill, settings, topic, arguments.records, short=arguments.short).result()
        ends = stable_ends(settings, items)
        ceiling = other.submit(_ceiling, settings, ends).result()
    writer = land(settings, contracts, ends, profile=arguments.profile)
    return {
        "record_bytes": record_bytes,
        "ceiling": ceiling,
        "writer": writer,
        "share_of_ceiling": round(writer["records_per_s"] / ceiling["records_per_s"], 3),
    }


def create_topics(settings: Settings, contracts: Contracts, partitions: int) -> None:
    """Create the topics that a writer of `trades` needs."""
    topics = [NewTopic(topic_of(contracts, name).name, partitions, 1) for name in TOPICS]
    admin = admin_client(settings)  # held until the results are in: its end cancels them
    for future in admin.create_topics(topics).values():
        future.result()


def fill(settings: Settings, topic: str, count: int, *, short: bool) -> int:
    """Produce trades and return the size of the last value."""
    records = short_trades.records(count, time.time_ns()) if short else _trades(count)
    limits: dict[str, Any] = {"queue.buffering.max.messages": 1_000_000, "linger.ms": 50}
    producer, value = Producer(producer_config(settings, **limits)), b""
    for number, (key, value) in enumerate(records):
        while True:
            try:
                producer.produce(topic, value, key)
                break
            except BufferError:
                producer.poll(0.5)
        if number % 10_000 == 0:
            producer.poll(0)
    producer.flush()
    return len(value)


def _trades(count: int) -> Iterator[tuple[bytes, bytes]]:
    encoder = msgspec.json.Encoder()
    for number in range(count):
        yield f"I{number % INSTRUMENTS}".encode(), encoder.encode(_trade(number))


def _trade(number: int) -> Trade:
    now_ns = time.time_ns()
    base = f"C{number % INSTRUMENTS}"
    return Trade(
        instrument=f"{base}-USDT.SIM",
        venue="SIM",
        symbol=f"{base}USDT",
        trade_id=str(10**9 + number),
        price=f"{60_000 + number % 997}.{number % 100:02d}",
        size=f"0.{number % 99_991 + 1:05d}",
        aggressor_side=AggressorSide.BUY if number % 3 else AggressorSide.SELL,
        ts_event_ns=now_ns - 2_000_000,
        ts_receive_ns=now_ns,
        raw_topic_id="AAAAAAAAAAAAAAAAAAAAAA",
        raw_partition=number % 4,
        raw_offset=number,
        raw_index=0,
        parser_version="0.1.0",
    )


def _ceiling(settings: Settings, ends: Mapping[TopicPartition, int]) -> dict[str, float]:
    consumer = Consumer(reader_config(settings, **{"enable.partition.eof": False}))
    consumer.assign([KafkaTopicPartition(item.topic, item.partition, 0) for item in ends])
    wanted, seen = sum(ends.values()), 0
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    while seen < wanted:
        messages = consumer.consume(FETCH_RECORDS, 0.1)
        values = [message.value() for message in messages]
        seen += len(values)
    result = _rate(seen, time.perf_counter() - began_s, time.process_time() - began_cpu_s)
    consumer.close()
    return result


def land(
    settings: WriterSettings, contracts: Contracts, ends: Mapping[TopicPartition, int], *, profile: bool = False
) -> dict[str, Any]:
    """Land the whole of `trades` with the writer as it runs in production, and return what it cost."""
    metrics, stop, profiler = ProcessMetrics("writer", "0"), threading.Event(), cProfile.Profile()
    worker = WriterWorker(settings, contracts, slot="0", metrics=metrics)

    def serve() -> None:
        calm_collector()
        plain_arrow_memory()
        if profile:
            profiler.enable()
        run_worker(worker, settings, contracts, slot="0", metrics=metrics, stop=stop)

    thread = threading.Thread(target=serve)
    thread.start()
    while not worker.positions() and thread.is_alive():
        time.sleep(0.001)
    # Start-up (the proof, tables, claim) is over: from here on it is the backlog.
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    while dict(worker.positions()) != dict(ends) and thread.is_alive():
        time.sleep(0.05)
    elapsed_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    stop.set()
    thread.join()
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(45)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {**_rate(sum(ends.values()), elapsed_s, cpu_s), "peak_rss_mib": peak_mib, "counters": metrics.counters()}


def _rate(records: int, elapsed_s: float, cpu_s: float) -> dict[str, float]:
    return {
        "records_per_s": round(records / elapsed_s),
        "cpu_us_per_record": round(cpu_s / records * 1e6, 3),
        "wall_s": round(elapsed_s, 3),
    }


if __name__ == "__main__":
    main()
