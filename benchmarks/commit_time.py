"""Time of a commit over many commits of one table: it must not grow.

Each commit appends a few rows as one data file, with the writer's own commit and maintenance.

    python -m benchmarks.commit_time --commits 1000
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.common import emit
from streamforge.contracts import Contract, load_contracts
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.protocol import Batch, Move, SourceIdentity
from streamforge.settings import Settings

OWNER = "benchmark"
IDENTITY = SourceIdentity("market-gaps", "topic-id", "cluster-id")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commits", type=int, default=1_000)
    parser.add_argument("--rows", type=int, default=1_000, help="rows a commit")
    parser.add_argument("--retained", type=int, default=100, help="table snapshots that are kept")
    parser.add_argument("--every", type=int, default=50, help="commits between two maintenance runs")
    parser.add_argument("--topic-partitions", type=int, default=64, help="positions kept in the table's properties")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        result = run(Path(home), arguments)
    emit("commit_time", vars(arguments), result)


def run(home: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Commit again and again; return the times of the first and the last tenth."""
    settings = Settings(_env_file=None, home=home)  # type: ignore[call-arg]
    contracts = load_contracts(settings.contracts_dir)
    catalog = open_catalog(settings)
    table = ensure_table(catalog, settings, contracts["market-gaps"])
    ledger = ensure_table(catalog, settings, contracts["commits"])
    maintenance = Maintenance(ledger, contracts["commits"], retained=arguments.retained)
    log_starts = dict.fromkeys(range(arguments.topic_partitions), 0)
    table, claim = commit.claim(table, owner=OWNER, identity=IDENTITY, log_starts=log_starts)
    rows = _rows(contracts["market-gaps"], arguments.rows)
    commits_s, cpu_s, maintenance_s = [], [], []
    for number in range(arguments.commits):
        start = number * arguments.rows
        batch = Batch(OWNER, IDENTITY, claim.epoch, {0: Move(start, start + arguments.rows, 1)}, {})
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        files = commit.write_data_files(table, rows)
        table = commit.commit_batch(table, batch, added=files).table
        commits_s.append(time.perf_counter() - began_s)
        cpu_s.append(time.process_time() - began_cpu_s)
        if (number + 1) % arguments.every == 0:
            began_s = time.perf_counter()
            table = maintenance.expire(table)
            maintenance_s.append(time.perf_counter() - began_s)
    tenth = max(1, arguments.commits // 10)
    second = slice(tenth, 2 * tenth)
    return {
        "first_tenth": _summary(commits_s[:tenth], cpu_s[:tenth]),
        "second_tenth_bound_reached": _summary(commits_s[second], cpu_s[second]),
        "last_tenth": _summary(commits_s[-tenth:], cpu_s[-tenth:]),
        "maintenance_s": {"runs": len(maintenance_s), "p50": round(statistics.median(maintenance_s or [0.0]), 4)},
        "snapshots_at_the_end": len(table.snapshots()),
        "manifests_at_the_end": len(table.current_snapshot().manifests(table.io)),  # type: ignore[union-attr]
    }


def _summary(wall_s: list[float], cpu_s: list[float]) -> dict[str, float]:
    ordered = sorted(wall_s)
    return {
        "wall_p50_s": round(statistics.median(ordered), 4),
        "wall_p99_s": round(ordered[int(len(ordered) * 0.99) - 1], 4),
        "cpu_mean_s": round(statistics.fmean(cpu_s), 4),
    }


def _rows(contract: Contract, count: int) -> pa.Table:
    columns: dict[str, Any] = {}
    for field in contract.arrow_schema:
        value: Any = 1
        if pa.types.is_timestamp(field.type):
            value = datetime(2026, 1, 1, tzinfo=UTC)
        elif not pa.types.is_integer(field.type):
            value = "text"
        columns[field.name] = pa.array([value] * count, field.type)
    return pa.table(columns, schema=contract.arrow_schema)


if __name__ == "__main__":
    main()
