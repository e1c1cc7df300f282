"""Small candle files in the formats that `streamforge load history` reads."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
from pyarrow import feather

from streamforge.market.candles import CSV_COLUMNS
from streamforge.market.records import RawRecord

HOUR_NS = 3_600_000_000_000
MINUTE_NS = 60_000_000_000
# 2020-10-25 00:00 UTC: the night in which files of Eastern Europe go from +03:00 to +02:00.
START_NS = 1_603_584_000_000_000_000
RECEIVED_NS = 1_700_000_000_000_000_000


def csv_row(number: int, *, offset_h: int = 3, price: str = "40.5", volume: str = "12.5") -> bytes:
    """Return hour `number` since `START_NS` as such files have it, its times `offset_h` ahead of UTC."""
    start = datetime.fromtimestamp(START_NS / 1e9, UTC) + timedelta(hours=number)
    local = start.astimezone(timezone(timedelta(hours=offset_h)))
    last = local + timedelta(hours=1) - timedelta(milliseconds=1)
    return f"{local},{price},41.0,39.5,40.25,{volume},{last},-0.01".encode()


def write_csv(folder: Path, symbol: str, rows: Sequence[bytes], header: str = ",".join(CSV_COLUMNS)) -> Path:
    """Write a file of `candles_1h`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{symbol}_1h.csv.gz"
    path.write_bytes(gzip.compress(b"\n".join([header.encode(), *rows, b""])))
    return path


def write_feather(folder: Path, pair: str, minutes: int, *, price: float = 0.000067) -> Path:
    """Write a file of `candles_1m`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{pair}-1m-futures.feather"
    dates = pa.array([START_NS + number * MINUTE_NS for number in range(minutes)], pa.timestamp("ns", tz="UTC"))
    numbers = pa.array([price] * minutes, pa.float64())
    volumes = pa.array([float(number) for number in range(minutes)], pa.float64())
    columns = {"date": dates, **dict.fromkeys(("open", "high", "low", "close"), numbers), "volume": volumes}
    feather.write_feather(pa.table(columns), path)
    return path


def raw_row(payload: bytes, offset: int = 0, **more: object) -> RawRecord:
    """Return a row as the history parser reads it."""
    values = {"instrument": "BTC-USDT.BINANCE", "venue": "BINANCE", "channel": "candles_1h", **more}
    return RawRecord(
        "topic-id",
        0,
        offset,
        str(values["instrument"]),
        str(values["venue"]),
        str(values["channel"]),
        "BTCUSDT_1h.csv.gz#1",
        offset,
        RECEIVED_NS,
        payload,
    )
