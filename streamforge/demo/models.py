"""The demo's models: a made history by the one path, a retraining through Dagster, forecasts of live bars.

history     candle files of a market whose volatility spills over, loaded with `streamforge load history`
retraining  the job `retrain` of the code location `ml`, on Dagster's instance of the demo's home
forecasts   the inference processor takes the new champion and forecasts the next live bars
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import feather

from streamforge.demo.report import ModelFigures
from streamforge.errors import ProcessError
from streamforge.gnn import registry
from streamforge.gnn.libraries import require_libraries
from streamforge.gnn.synthetic import SyntheticMarket, synthetic_candles
from streamforge.platform.control_plane import dagster_environment, prepare_instance
from streamforge.platform.plan import SIMULATED_VENUE, PlatformFiles, environment_of
from streamforge.settings import Settings

JOB = "retrain"
LOCATION_MODULE = "orchestration.ml"
_FORMAT = "candles_1m"
_MINUTE_NS = 60_000_000_000
_INTERVALS = 720
_SEED = 11
_TIMEOUT_S = 600.0


def train_demo_model(settings: Settings, tell: Callable[[str], None], *, now_ns: int | None = None) -> ModelFigures:
    """Load a made history into `venue-bars` and retrain on it, as a user would: with the command and with Dagster.

    Args:
        settings: of a running platform.
        tell: hears what is going on.
        now_ns: when the history ends; None: now.

    Raises:
        ConfigurationError: the libraries for models are not installed.
        ProcessError: a step failed; names its log.
    """
    require_libraries()
    folder = settings.home_path / "history"
    rows = write_history(folder, end_ns=time.time_ns() if now_ns is None else now_ns)
    tell(f"{rows:,} made candles are loaded into venue_bars")
    loaded = ["-m", "cli", "load", "history", str(folder), "--format", _FORMAT, "--venue", SIMULATED_VENUE]
    _run(settings, "load-history", loaded)
    tell(f"Dagster runs the job {JOB}")
    prepare_instance(settings.home_path)
    config = settings.home_path / "retrain.json"
    config.write_text(json.dumps({"ops": {"features": {"config": {"source": "VENUE_BARS"}}}}), encoding="utf-8")
    job = ["-m", "dagster", "job", "execute", "-m", LOCATION_MODULE, "-j", JOB, "-c", str(config)]
    _run(settings, JOB, job)
    champion = registry.champion_version(settings)
    version = champion or registry.alias_version(settings, registry.CHALLENGER)
    if version is None:
        msg = f"the job {JOB} ended well and registered no model; see {_log(settings, JOB)}"
        raise ProcessError(msg)
    errors = {
        name.removesuffix(".rmse"): value
        for name, value in registry.version_metrics(settings, version).items()
        if name.endswith(".rmse")
    }
    return ModelFigures(history_rows=rows, version=version, is_champion=champion is not None, rmse=errors, forecasts=0)


def write_history(folder: Path, *, end_ns: int) -> int:
    """Write candle files of a synthetic market that ends at the last full minute; return the number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    first_ns = end_ns // _MINUTE_NS * _MINUTE_NS - _INTERVALS * _MINUTE_NS
    market = SyntheticMarket()
    candles = synthetic_candles(market, intervals=_INTERVALS, interval_ns=_MINUTE_NS, first_ns=first_ns, seed=_SEED)
    candles = candles.append_column("date", candles["ts_start_ns"].cast(pa.timestamp("ns", tz="UTC")))
    for number, symbol in enumerate(market.symbols):
        part = candles.slice(number * _INTERVALS, _INTERVALS)
        columns = part.select(["date", "open", "high", "low", "close", "volume"])
        feather.write_feather(columns, folder / f"{symbol}_USDT_USDT-1m-futures.feather")
    return candles.num_rows


def _run(settings: Settings, name: str, arguments: Sequence[str]) -> None:
    """Run a Python module to its end, its output in a log of the platform.

    Raises:
        ProcessError: it failed, or took too long.
    """
    log = _log(settings, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **environment_of(settings), **dagster_environment(settings.home_path)}
    with log.open("ab") as output:
        try:
            done = subprocess.run(  # noqa: S603  # our own modules
                [sys.executable, *arguments],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            msg = f"{name} did not end within {_TIMEOUT_S:g} s; see {log}"
            raise ProcessError(msg) from error
    if done.returncode != 0:
        msg = f"{name} ended with exit code {done.returncode}; see {log}"
        raise ProcessError(msg)


def _log(settings: Settings, name: str) -> Path:
    return PlatformFiles(settings.home_path).logs / f"{name}.out"
