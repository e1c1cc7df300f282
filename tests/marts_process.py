"""Run in a process of its own: land bars, run dbt, change what landed, run dbt again. `marts_process HOME`.

After each run the mart is written to HOME/<step>.arrow. The runs share a Spark, which is most of what a run costs, and
which ends with the process, so that no test inherits it.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
from pyarrow import feather
from pyiceberg.expressions import And, EqualTo, GreaterThanOrEqual, LessThan

from streamforge.lakehouse.catalog import open_catalog
from streamforge.marts.project import marts_namespace
from streamforge.marts.run import run_dbt
from streamforge.settings import Settings
from streamforge.spark.session import spark_session
from tests.marts_support import MINUTE_NS, START_NS, MinuteBar, append_bars, settings_of, table_of

BTC, ETH, SOL = "BTC-USDT.SIM", "ETH-USDT.SIM", "SOL-USDT.SIM"
MART = "market_bars"
HOURS = 205
"""Long enough for an EMA of 200 hours."""
FIRST_END, END = 60 * (HOURS - 4), 60 * HOURS + 3
REBUILT = range(60 * (HOURS - 10) + 7, 60 * (HOURS - 10) + 12)
LATE_MINUTE, REVISED_MINUTE = 333, 701
GONE = range(40, 45)
ETH_FIRST_END, ETH_END = 1_200, 1_500
SELECT = ["--select", f"+{MART}"]


def walk(instrument: str, minutes: Iterable[int], start: float) -> Iterator[MinuteBar]:
    """Return a random walk that is the same each time, one bar for each minute named."""
    rng = random.Random(instrument)
    price = start
    for minute in minutes:
        opened = price
        price = max(price * (1 + rng.gauss(0, 0.001)), 0.001)
        high, low = max(opened, price) * 1.0003, min(opened, price) * 0.9997
        prices = (Decimal(f"{value:.9f}") for value in (opened, high, low, price))
        yield MinuteBar(instrument, minute, *prices, volume=Decimal(f"{rng.uniform(0.1, 9):.6f}"))


def eth_minutes() -> list[int]:
    """Return the minutes in which ETH traded: with holes, one of them over a whole bar of five minutes."""
    return [minute for minute in range(ETH_END) if minute % 7 and minute not in range(905, 910)]


def land_first(settings: Settings) -> None:
    """Land what the first run finds."""
    append_bars(settings, walk(BTC, range(FIRST_END), 60_000))
    eth = [bar for bar in walk(ETH, eth_minutes(), 3_000) if bar.minute < ETH_FIRST_END]
    append_bars(settings, [bar for bar in eth if bar.minute != LATE_MINUTE])


def land_changes(settings: Settings) -> None:
    """Land new bars, a late one, a revision, a rebuild; remove the rows of a bar, as a replay may."""
    btc = list(walk(BTC, range(END), 60_000))
    eth = {bar.minute: bar for bar in walk(ETH, eth_minutes(), 3_000)}
    append_bars(settings, [*btc[FIRST_END:], *(bar for minute, bar in eth.items() if minute >= ETH_FIRST_END)])
    append_bars(settings, walk(SOL, range(FIRST_END, END), 150))
    append_bars(settings, [eth[LATE_MINUTE]])
    append_bars(settings, [_moved(eth[REVISED_MINUTE], revision=1)])
    append_bars(settings, [_moved(btc[minute], replay_epoch=1) for minute in REBUILT])
    # A revision that says the same again changes nothing.
    append_bars(settings, [dataclasses.replace(btc[5], revision=1)])
    within = And(
        EqualTo("instrument", ETH),
        GreaterThanOrEqual("ts_start_ns", START_NS + GONE.start * MINUTE_NS),
        LessThan("ts_start_ns", START_NS + GONE.stop * MINUTE_NS),
    )
    table_of(settings, "bars").delete(within)


def mart(settings: Settings) -> pa.Table:
    """Return the mart in its own order."""
    table = open_catalog(settings).load_table((marts_namespace(settings), MART))
    order = [("instrument", "ascending"), ("interval", "ascending"), ("ts_start_ns", "ascending")]
    return table.scan().to_arrow().sort_by(order)


def main(home: Path) -> None:
    """Run every step; fail with the first dbt run that fails."""
    settings = settings_of(home, "bars")
    spark_session(settings)
    steps = {
        "first": (land_first, ["run"]),
        "incremental": (land_changes, ["run"]),
        "again": (None, ["run"]),
        "full": (None, ["build", "--full-refresh"]),
    }
    for name, (land, arguments) in steps.items():
        if land is not None:
            land(settings)
        if not run_dbt(settings, [*arguments, *SELECT]):
            sys.exit(f"dbt failed in step {name}")
        feather.write_feather(mart(settings), str(home / f"{name}.arrow"), compression="uncompressed")


def _moved(bar: MinuteBar, *, revision: int = 0, replay_epoch: int = 0) -> MinuteBar:
    changed = {"high": bar.high * 2, "close": bar.high * 2, "volume": bar.volume + 1}
    return dataclasses.replace(bar, revision=revision, replay_epoch=replay_epoch, **changed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
