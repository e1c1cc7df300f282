"""Walk forward on recorded candles: the graph model beside last value, HAR, a linear model and LightGBM.

Every model sees the same rows; each seed trains the graph model and LightGBM anew. The table is printed on standard
error, whoever wins. Needs the dependency group `ml` and recorded candles (`candles_1h/` or `candles_1m/`).

    python -m benchmarks.model_comparison --data ../shared/data/candles_1h --intervals 4000 --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, feather

from benchmarks.common import emit
from streamforge.gnn.evaluation import Score, Walk, WalkConfig, scores_of, table_of, usable_rows, walk_forward
from streamforge.gnn.features import features_of
from streamforge.gnn.graph import graphs_of
from streamforge.gnn.panel import panel_of
from streamforge.gnn.training import Recipe
from streamforge.settings import load_settings

_INTERVALS_NS = {"1h": 3_600_000_000_000, "1m": 60_000_000_000}


def main() -> None:
    """Run and print."""
    recordings = load_settings().recordings_dir
    recorded = recordings / "candles_1h" if recordings else None
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=recorded, help="folder of candles")
    parser.add_argument("--intervals", type=int, default=4_000, help="latest intervals that are read; 0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.data is None or not arguments.data.is_dir():
        absent = "no candles: give --data, or set STREAMFORGE_RECORDINGS_DIR to the folder that has candles_1h/"
        if arguments.data != recorded:
            parser.error(absent)
        emit("model_comparison", vars(arguments), {"skipped": absent})
        return
    emit("model_comparison", vars(arguments), run(arguments))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Walk once a seed; return figures of every model over all seeds."""
    recipe = Recipe()
    panel = panel_of(read_candles(arguments.data), max_intervals=arguments.intervals or None)
    features = features_of(panel, recipe.features)
    graphs = graphs_of(features, recipe.graph)
    walk = WalkConfig()
    rows = usable_rows(features, walk)
    found: list[Mapping[str, Score]] = []
    walks_s = []
    for seed in range(1, arguments.seeds + 1):
        training = msgspec.structs.replace(recipe.training, seed=seed, threads=arguments.threads)
        began_s = time.perf_counter()
        walked: Walk = walk_forward(features, graphs, rows, msgspec.structs.replace(recipe, training=training), walk)
        walks_s.append(time.perf_counter() - began_s)
        found.append(scores_of(walked))
        sys.stderr.write(f"seed {seed}, {walks_s[-1]:.1f} s\n{table_of(found[-1])}\n")
    return {
        "instruments": len(features.instruments),
        "intervals": len(features.ts_start_ns),
        "interval_s": features.interval_ns / 1e9,
        "blocks": walk.blocks,
        "walk_s": round(statistics.median(walks_s), 2),
        "places": next(iter(found[0].values())).places,
        "models": {name: _summary([scores[name] for scores in found]) for name in found[0]},
    }


def read_candles(folder: Path) -> pa.Table:
    """Read every candle file of a folder: gzipped CSV of hours, or Feather of minutes.

    Raises:
        SystemExit: there is none.
    """
    parts = [_hours(path) for path in sorted(folder.glob("*_1h.csv.gz"))]
    parts += [_minutes(path) for path in sorted(folder.glob("*-1m-*.feather"))]
    if not parts:
        raise SystemExit(f"{folder} has no *_1h.csv.gz and no *-1m-*.feather")
    return pa.concat_tables(parts)


def _hours(path: Path) -> pa.Table:
    table = csv.read_csv(path)
    return _bars(table, table["open_time"], path.name.partition("_")[0], "1h")


def _minutes(path: Path) -> pa.Table:
    table = feather.read_table(path)
    return _bars(table, table["date"], path.name.partition("-")[0], "1m")


def _bars(table: pa.Table, starts: Any, instrument: str, interval: str) -> pa.Table:
    starts_ns = pc.cast(pc.cast(starts, pa.timestamp("ns", tz="UTC")), pa.int64())
    values = {name: pc.cast(table[name], pa.float64()) for name in ("high", "low", "close", "volume")}
    return pa.table(
        {
            "instrument": pa.array([instrument] * table.num_rows),
            "interval": pa.array([interval] * table.num_rows),
            "ts_start_ns": starts_ns,
            "ts_end_ns": pc.add(starts_ns, _INTERVALS_NS[interval]),
            **values,
        }
    )


def _summary(scores: list[Score]) -> dict[str, float]:
    figures = {name: [getattr(item, name) for item in scores] for name in ("rmse", "mae", "qlike", "skill_ratio")}
    result = {name: round(statistics.fmean(values), 4) for name, values in figures.items()}
    return result | {"rmse_least": round(min(figures["rmse"]), 4), "rmse_most": round(max(figures["rmse"]), 4)}


if __name__ == "__main__":
    main()
