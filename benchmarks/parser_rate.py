"""Parser from a backlog, in records/s, against the client's own ceiling in the same run.

    python -m benchmarks.parser_rate --records 300000

The ceiling is what one Python process can take in when it does nothing: `consume()` and `value()` of the same
records. The parser runs as it does in production: under the runner, in transactions, with its changelog.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import shutil
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import structlog
from confluent_kafka import Consumer, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition

from benchmarks.common import emit
from streamforge import broker
from streamforge.collector import calm_collector
from streamforge.contracts import Contracts, load_contracts
from streamforge.kafka import producer_config, reader_config
from streamforge.log_reader import log_ends
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings, load_settings
from streamforge.supervision import topic_of
from streamforge.topics import create_topics
from streaming.processors.base import TransactionalWorker
from streaming.processors.parser import Parser
from streaming.runner import run_worker

TOPICS = ("raw-trades", "raw-trades.dlq", "trades", "parser-changelog", "queue-events", "queue-control")
INSTRUMENTS = [f"C{number}-USDT.SIM" for number in range(20)]
START_MS = 1_700_000_000_000


class Cost(NamedTuple):
    """Wall and CPU seconds of this process, the client's threads included."""

    wall_s: float
    cpu_s: float

    def rates(self, records: int) -> dict[str, float]:
        """Return the cost as rates."""
        return {
            "records_per_s": round(records / self.wall_s),
            "cpu_us_per_record": round(self.cpu_s / records * 1e6, 2),
            "records_per_cpu_s": round(records / self.cpu_s),
        }


def fill(settings: Settings, topic: str, records: int) -> None:
    """Produce a backlog of trade frames."""
    producer = Producer(producer_config(settings) | {"queue.buffering.max.messages": 1_000_000})
    for number in range(records):
        instrument = INSTRUMENTS[number % len(INSTRUMENTS)]
        symbol = instrument.partition(".")[0].replace("-", "")
        ts_ms = START_MS + number // 20
        frame = (
            f'{{"stream":"{symbol.lower()}@trade","data":{{"e":"trade","E":{ts_ms},"s":"{symbol}","t":{number // 20},'
            f'"p":"{60000 + number % 977}.{number % 100:02d}000000","q":"0.{1 + number % 89999:05d}000",'
            f'"T":{ts_ms},"m":{"true" if number % 3 else "false"},"M":true}}}}'
        )
        headers: list[tuple[str, str | bytes | None]] = [
            ("venue", "SIM"),
            ("channel", "trade"),
            ("connection_id", "bench"),
            ("sequence_in_connection", str(number)),
            ("ts_receive_ns", str(ts_ms * 1_000_000)),
        ]
        producer.produce(topic, frame, instrument, headers=headers)
        if number % 10_000 == 0:
            producer.poll(0)
    producer.flush()


def ceiling(settings: Settings, ends: dict[TopicPartition, int]) -> Cost:
    """Return what `consume` and `value()` of the whole backlog cost."""
    consumer = Consumer(reader_config(settings))
    consumer.assign([KafkaTopicPartition(item.topic, item.partition, 0) for item in ends])
    left = sum(ends.values())
    started_s = time.perf_counter()
    cpu_s = time.process_time()
    size_bytes = 0
    while left:
        for message in consumer.consume(10_000, 1.0):
            if message.error() is None:
                size_bytes += len(message.value() or b"")
                left -= 1
    cost = Cost(time.perf_counter() - started_s, time.process_time() - cpu_s)
    consumer.close()
    return cost


def parse(settings: Settings, contracts: Contracts, ends: dict[TopicPartition, int]) -> Cost:
    """Return the cost from the parser's first assignment until its durable position is the backlog's end."""
    metrics = ProcessMetrics("parser", "0")
    worker = TransactionalWorker(Parser(settings), settings, contracts, slot="0", metrics=metrics)
    stop = threading.Event()
    times_s: dict[str, float] = {}

    def watch() -> None:
        while not stop.wait(0.01):
            positions = dict(worker.positions())
            if positions and "start" not in times_s:
                times_s["start"], times_s["start_cpu"] = time.perf_counter(), time.process_time()
            if all(positions.get(item, -1) >= end for item, end in ends.items()):
                times_s["end"], times_s["end_cpu"] = time.perf_counter(), time.process_time()
                stop.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    calm_collector()
    code = run_worker(worker, settings, contracts, slot="0", metrics=metrics, stop=stop)
    stop.set()
    watcher.join()
    if code or "end" not in times_s:
        sys.exit(f"the parser ended with exit code {code}")
    return Cost(times_s["end"] - times_s["start"], times_s["end_cpu"] - times_s["start_cpu"])


def main() -> None:
    """Run the benchmark and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--records", type=int, default=300_000, help="records of the backlog")
    arguments.add_argument("--profile", action="store_true", help="print where the parser's time goes, to stderr")
    options = arguments.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    folder = Path(tempfile.mkdtemp(prefix="streamforge-bench-"))
    base = load_settings()
    own_broker = base.bootstrap_servers is None
    shared: dict[str, object] = {"topic_prefix": f"bench{uuid.uuid4().hex[:8]}.", "home": folder}
    try:
        if own_broker:
            broker.start(load_settings(home=folder))
        settings = load_settings(**shared)
        contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
        create_topics(settings, contracts, TOPICS)
        topic = topic_of(contracts, "raw-trades")
        fill(settings, topic.name, options.records)
        ends = log_ends(settings, [TopicPartition(topic.name, number) for number in range(topic.partitions)])
        ceiling_cost = ceiling(settings, ends)
        profile = cProfile.Profile() if options.profile else None
        if profile is not None:
            profile.enable()
        parser_cost = parse(settings, contracts, ends)
        if profile is not None:
            profile.disable()
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    finally:
        if own_broker:
            broker.stop(load_settings(home=folder))
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "ceiling": ceiling_cost.rates(options.records),
        "parser": parser_cost.rates(options.records),
        "share_of_ceiling": round(ceiling_cost.wall_s / parser_cost.wall_s, 3),
    }
    emit("parser_rate", vars(options), result)


if __name__ == "__main__":
    main()
