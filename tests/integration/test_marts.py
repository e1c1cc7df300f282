"""The mart: an incremental run is a full refresh, and the numbers are those of TA-Lib and of exact sums."""

from __future__ import annotations

import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import talib
from pyarrow import feather

from streamforge.settings import Settings
from tests.marts_process import BTC, ETH, GONE, HOURS, LATE_MINUTE, REBUILT, SOL
from tests.marts_support import MINUTE_NS, START_NS

# Four runs of dbt on Spark before the first test, on a machine that may have other work.
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
SESSION_NS = 24 * 60 * MINUTE_NS
FIVE_NS = 5 * MINUTE_NS


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home in which dbt has run four times: first, after changes, again, and in full."""
    folder = tmp_path_factory.mktemp("marts") / "home"
    done = subprocess.run(
        [sys.executable, "-m", "tests.marts_process", str(folder)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("STREAMFORGE_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return folder


def step(home: Path, name: str) -> pa.Table:
    return feather.read_table(str(home / f"{name}.arrow"))


def series(table: pa.Table, instrument: str, interval: str) -> pa.Table:
    return table.filter((pc.field("instrument") == instrument) & (pc.field("interval") == interval))


def floats(table: pa.Table, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return a column as doubles, NaN where it is null."""
    return np.array([np.nan if value is None else float(value) for value in table[name].to_pylist()])


def starts(table: pa.Table) -> list[int]:
    return [int(value) for value in table["ts_start_ns"].to_pylist()]


def test_incremental_run_equals_full_refresh_to_the_last_bit(home: Path) -> None:
    incremental, full = step(home, "incremental"), step(home, "full")
    assert incremental.num_rows == full.num_rows
    for name in full.column_names:
        assert incremental[name].equals(full[name]), name
    assert step(home, "again").equals(incremental)


def test_changes_reached_the_mart(home: Path) -> None:
    before, after = step(home, "first"), step(home, "incremental")
    gone, late = START_NS + GONE.start * MINUTE_NS, START_NS + (LATE_MINUTE - LATE_MINUTE % 5) * MINUTE_NS
    eth_before, eth_after = series(before, ETH, "5m"), series(after, ETH, "5m")
    assert gone in starts(eth_before)
    assert gone not in starts(eth_after)
    minutes = [
        dict(zip(starts(each), each["minutes"].to_pylist(), strict=True))[late] for each in (eth_before, eth_after)
    ]
    assert minutes[1] == minutes[0] + 1
    assert series(before, SOL, "1h").num_rows == 0
    assert series(after, SOL, "1h").num_rows > 0
    # What lies before the first changed bar of a series stays as it was.
    rebuilt = START_NS + REBUILT.start * MINUTE_NS
    for interval in ("5m", "1h"):
        old, new = (series(each, BTC, interval) for each in (before, after))
        head = [
            index
            for index, start in enumerate(starts(old))
            if start + FIVE_NS * (12 if interval == "1h" else 1) <= rebuilt
        ]
        assert len(head) > 190
        assert new.slice(0, len(head)).equals(old.slice(0, len(head)))
        assert not new.slice(0, old.num_rows).equals(old)


def test_a_bar_that_is_not_over_is_left_out(home: Path) -> None:
    ends = step(home, "full")["ts_end_ns"].to_pylist()
    newest_minute = START_NS + (60 * HOURS + 3) * MINUTE_NS
    assert max(ends) == START_NS + 60 * HOURS * MINUTE_NS <= newest_minute
    # ETH stopped long before: its last bars are over by the minutes of the others.
    assert series(step(home, "full"), ETH, "5m").num_rows == 300 - 2


@pytest.mark.parametrize("interval", ["5m", "1h"])
@pytest.mark.parametrize("instrument", [BTC, ETH, SOL])
def test_indicators_are_those_of_talib(home: Path, instrument: str, interval: str) -> None:
    bars = series(step(home, "full"), instrument, interval)
    high, low, close = (floats(bars, name) for name in ("high", "low", "close"))
    expected = {
        "ema_50": talib.EMA(close, 50),
        "ema_200": talib.EMA(close, 200),
        "rsi_14": talib.RSI(close, 14),
        "atr_30": talib.ATR(high, low, close, 30),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(floats(bars, name), values, rtol=1e-9, atol=0, err_msg=name, equal_nan=True)
    if instrument == BTC:
        assert np.isfinite(floats(bars, "ema_200")).sum() == bars.num_rows - 199 > 0


def test_session_vwap_starts_anew_each_day_and_is_exact_sums_divided(home: Path) -> None:
    bars = series(step(home, "full"), ETH, "5m")
    sums: dict[int, tuple[Decimal, Decimal]] = {}
    for row in bars.select(["ts_start_ns", "quote_volume", "volume", "session_vwap"]).to_pylist():
        session = row["ts_start_ns"] // SESSION_NS
        quote, volume = sums.get(session, (Decimal(0), Decimal(0)))
        sums[session] = quote, volume = quote + row["quote_volume"], volume + row["volume"]
        assert row["session_vwap"] == pytest.approx(float(quote / volume), rel=1e-12)
    assert len(sums) == 2


def test_money_stays_decimal_and_indicators_are_double(home: Path) -> None:
    schema = step(home, "full").schema
    for name in ("open", "high", "low", "close", "volume", "quote_volume"):
        assert schema.field(name).type == pa.decimal128(38, 18)
    for name in ("ema_50", "ema_200", "rsi_14", "session_vwap", "atr_30"):
        assert schema.field(name).type == pa.float64()


def test_sql_sees_the_mart(home: Path) -> None:
    from streamforge.contracts import load_contracts  # noqa: PLC0415
    from streamforge.lakehouse.query import ask  # noqa: PLC0415

    settings = Settings(_env_file=None, home=home)  # type: ignore[call-arg]
    answer = ask(settings, load_contracts(settings.contracts_dir), "SELECT count(*) FROM market_bars", limit_rows=1)
    assert answer.rows == [(step(home, "full").num_rows,)]
