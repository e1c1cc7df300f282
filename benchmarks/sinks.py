"""Sinks side by side: the same topic of short JSON trades into an Iceberg table, on the same machine, in one run.

Ours is the writer as it runs in production. Spark is Structured Streaming with `availableNow`, one local application on
the platform's own catalog. Each sink has a process of its own, after the one before has ended. The clock runs from when
it has started (the writer's claim is made, Spark's session is there) until all rows are committed. CPU and memory are
those of the process and its children. A row is lost or doubled by its topic-partition and offset.

    python -m benchmarks.sinks --rows 5000000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from benchmarks import short_trades
from benchmarks.common import emit
from benchmarks.writer_rate import create_topics, fill, land
from streamforge import broker
from streamforge.contracts import load_contracts
from streamforge.lakehouse.catalog import open_catalog
from streamforge.log_reader import stable_ends
from streamforge.offsets import TopicPartition
from streamforge.spark.kafka_source import COMMITTED_AND_COMPLETE, client_options
from streamforge.spark.session import spark_session
from streaming.writer import WriterSettings

OURS, SPARK = "market.trades", "market.trades_by_spark"
SAMPLE_S = 0.2
MIB = 2**20
JSON_SCHEMA = (
    "symbol STRING, trade_id STRING, price STRING, size STRING, aggressor_side STRING, ts_event_ns LONG, "
    "ts_receive_ns LONG"
)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--topic-partitions", type=int, default=16)
    arguments = parser.parse_args()
    _log_to_stderr()
    with tempfile.TemporaryDirectory() as home:
        settings = WriterSettings(_env_file=None, home=Path(home) / "home", writer_contracts=("trades",))  # type: ignore[call-arg]
        folder = short_trades.write_contracts(settings.contracts_dir, Path(home) / "contracts")
        settings = settings.model_copy(update={"contracts_dir": folder})
        broker.start(settings)
        try:
            result = run(settings, arguments.rows, arguments.topic_partitions)
        finally:
            broker.stop(settings)
    emit("sinks", vars(arguments), result)


def run(settings: WriterSettings, rows: int, partitions: int) -> dict[str, Any]:
    """Fill the topic and let one sink after the other land it."""
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    create_topics(settings, contracts, partitions)
    topic = f"{settings.topic_prefix}trades"
    record_bytes = _apart(fill, settings, topic, rows, short=True)["result"]
    ends = stable_ends(settings, [TopicPartition(topic, number) for number in range(partitions)])
    found: dict[str, Any] = {"record_bytes": record_bytes}
    for name, sink, table in (("streamforge", land_ours, OURS), ("spark_available_now", land_with_spark, SPARK)):
        cost = _apart(sink, settings, ends)
        wall_s, cpu_s = cost.pop("result")
        found[name] = {
            "rows_per_s": round(rows / wall_s),
            "rows_per_cpu_s": round(rows / cpu_s),
            "cpu_us_per_row": round(cpu_s / rows * 1e6, 3),
            "wall_s": round(wall_s, 3),
            **cost,
            **_compared(settings, table, rows),
        }
    return found


def land_ours(settings: WriterSettings, ends: Mapping[TopicPartition, int]) -> tuple[float, float]:
    """Land the topic with our writer; return wall and CPU seconds."""
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    landed = land(settings, contracts, ends)
    return landed["wall_s"], landed["cpu_us_per_record"] * sum(ends.values()) / 1e6


def land_with_spark(settings: WriterSettings, ends: Mapping[TopicPartition, int]) -> tuple[float, float]:
    """Land the topic with Spark Structured Streaming; return wall and CPU seconds."""
    session = spark_session(settings)
    session.sql(
        f"CREATE TABLE {SPARK} (symbol STRING, trade_id STRING, price DECIMAL(38,18), size DECIMAL(38,18), "
        "aggressor_side STRING, ts_event_ns LONG, ts_receive_ns LONG, source_partition INT, source_offset LONG, "
        "ts_event TIMESTAMP) USING iceberg PARTITIONED BY (days(ts_event)) "
        "TBLPROPERTIES ('write.parquet.compression-codec' = 'zstd')"
    )
    began_s, began_cpu_s = time.perf_counter(), _cpu_s()
    records = session.readStream.format("kafka").options(
        **client_options(settings),
        **COMMITTED_AND_COMPLETE,
        subscribe=next(iter(ends)).topic,
        startingOffsets="earliest",
    )
    rows = (
        records.load()
        .selectExpr(f"from_json(CAST(value AS STRING), '{JSON_SCHEMA}') AS t", "partition", "offset")
        .selectExpr(
            "t.symbol", "t.trade_id", "CAST(t.price AS DECIMAL(38,18)) AS price",
            "CAST(t.size AS DECIMAL(38,18)) AS size", "t.aggressor_side", "t.ts_event_ns", "t.ts_receive_ns",
            "partition AS source_partition", "offset AS source_offset",
            "timestamp_micros(t.ts_event_ns DIV 1000) AS ts_event",
        )
    )  # fmt: skip
    writer = rows.writeStream.format("iceberg").outputMode("append").trigger(availableNow=True)
    options = {"fanout-enabled": "true", "checkpointLocation": str(settings.home_path / "checkpoint")}
    writer.options(**options).toTable(SPARK).awaitTermination()
    spent = time.perf_counter() - began_s, _cpu_s() - began_cpu_s
    session.stop()
    return spent


def _apart(call: Callable[..., Any], *arguments: Any, **named: Any) -> dict[str, Any]:
    """Run a call in a process of its own; return its result and the greatest memory of it and its children."""
    peak_bytes = 0
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_log_to_stderr) as pool:
        future = pool.submit(call, *arguments, **named)
        while not future.done():
            peak_bytes = max(peak_bytes, sum(map(_rss_bytes, psutil.Process().children(recursive=True))))
            time.sleep(SAMPLE_S)
    return {"result": future.result(), "peak_rss_mib": peak_bytes // MIB}


def _log_to_stderr() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def _rss_bytes(process: psutil.Process) -> int:
    try:
        # Not the broker, which is this process's child too.
        return 0 if "kafka.Kafka" in process.cmdline() else int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _cpu_s() -> float:
    process = psutil.Process()
    times = [item.cpu_times() for item in (process, *process.children(recursive=True))]
    return float(sum(item.user + item.system for item in times))


def _compared(settings: WriterSettings, table: str, rows: int) -> dict[str, int]:
    scan = open_catalog(settings).load_table(table).scan(selected_fields=("source_partition", "source_offset"))
    places = scan.to_arrow()
    key: Any = pc.add(pc.multiply(places["source_partition"].cast(pa.int64()), 2**40), places["source_offset"])
    distinct = int(pc.count_distinct(key).as_py())
    return {"lost": rows - distinct, "doubled": places.num_rows - distinct}


if __name__ == "__main__":
    main()
