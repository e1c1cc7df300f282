"""Candle files: which are taken, and that their rows are what stands in them."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
from pyarrow import feather

from cli.history import HistoryFormat
from streamforge.errors import ConfigurationError, PermanentSourceError, StreamForgeError
from streamforge.market.candles import FORMATS
from streaming.loaders.history import _READERS, _read, plan_history
from tests.history_support import MINUTE_NS, START_NS, csv_row, write_csv, write_feather

HOURS, MINUTES = FORMATS["candles_1h"], FORMATS["candles_1m"]


def test_command_and_readers_know_every_format() -> None:
    assert {str(item) for item in HistoryFormat} == set(FORMATS) == set(_READERS)


def test_csv_rows_are_the_lines_of_the_file(tmp_path: Path) -> None:
    lines = [csv_row(number) for number in range(3)]
    path = write_csv(tmp_path, "BTCUSDT", [lines[0], lines[1] + b"\r", b"", b"not a row at all", lines[2]])
    assert list(_READERS["candles_1h"].rows(path)) == [lines[0], lines[1], b"not a row at all", lines[2]]
    assert plan_history([path], HOURS).rows == 4


def test_feather_rows_are_objects_with_exact_numbers(tmp_path: Path) -> None:
    path = write_feather(tmp_path, "ADA_USDT_USDT", 20_000, price=0.1 + 0.2)
    rows = [msgspec.json.decode(row) for row in _READERS["candles_1m"].rows(path)]
    assert len(rows) == plan_history([path], MINUTES).rows == 20_000
    assert rows[-1] == {
        "date": START_NS + 19_999 * MINUTE_NS,
        **dict.fromkeys(("open", "high", "low", "close"), 0.1 + 0.2),
        "volume": 19_999.0,
    }


def test_plan_of_a_folder_takes_the_files_of_the_format(tmp_path: Path) -> None:
    write_csv(tmp_path, "ETHBTC", [csv_row(0)])
    write_csv(tmp_path, "BTCUSDT", [csv_row(0), csv_row(1)])
    write_feather(tmp_path, "ADA_USDT_USDT", 1)
    (tmp_path / "inside").mkdir()
    hours = plan_history([tmp_path, tmp_path / "BTCUSDT_1h.csv.gz"], HOURS)
    assert [(item.instrument, item.rows) for item in hours.files] == [("BTC-USDT.BINANCE", 2), ("ETH-BTC.BINANCE", 1)]
    assert (hours.others, hours.rows) == (1, 3)
    minutes = plan_history([tmp_path], MINUTES, "OTHER")
    assert [item.instrument for item in minutes.files] == ["ADA-USDT.OTHER"]
    assert plan_history([tmp_path], MINUTES).files[0].instrument == "ADA-USDT.BINANCEUSDM"


def _gone(folder: Path) -> Path:
    return folder / "BTCUSDT_1h.csv.gz"


def _empty_folder(folder: Path) -> Path:
    return folder


def _other_name(folder: Path) -> Path:
    path = folder / "BTCUSDT.csv"
    path.write_text("x")
    return path


def _other_quote(folder: Path) -> Path:
    return write_csv(folder, "BTCXYZ", [csv_row(0)])


def _other_columns(folder: Path) -> Path:
    return write_csv(folder, "BTCUSDT", [csv_row(0)], header="time,price")


def _not_gzip(folder: Path) -> Path:
    path = folder / "BTCUSDT_1h.csv.gz"
    path.write_text("open_time")
    return path


def _cut_off(folder: Path) -> Path:
    path = write_csv(folder, "BTCUSDT", [csv_row(number) for number in range(50)])
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_gone, "does not exist"),
        (_empty_folder, "has 0 files and none named like a file of candles_1h"),
        (_other_name, "is not named like a file of candles_1h, for instance BTCUSDT_1h.csv.gz"),
        (_other_quote, "cannot tell base and quote of 'BTCXYZ'"),
        (_other_columns, "expected the columns open_time, open, .* found time,price"),
        (_not_gzip, "cannot be read: .*Nothing was loaded"),
        (_cut_off, "cannot be read: .*Nothing was loaded"),
    ],
)
def test_plan_says_what_is_wrong_with_a_path(tmp_path: Path, make: object, said: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises((ConfigurationError, PermanentSourceError), match=said):
        plan_history([path], HOURS)


@pytest.mark.parametrize(
    "columns",
    [
        {"date": pa.array([0], pa.int64())},
        {"date": pa.array([0], pa.timestamp("ns"))},
        {"date": pa.array([0], pa.timestamp("ns", tz="UTC")), "open": ["1"]},
    ],
)
def test_plan_refuses_feather_with_other_columns(tmp_path: Path, columns: dict[str, object]) -> None:
    path = write_feather(tmp_path, "ADA_USDT_USDT", 1)
    feather.write_feather(pa.table(columns), path)
    with pytest.raises(PermanentSourceError, match="date: timestamp with a zone"):
        plan_history([path], MINUTES)


def test_file_that_is_spoilt_while_it_is_read_says_how_far_it_came(tmp_path: Path) -> None:
    path = tmp_path / "BTCUSDT_1h.csv.gz"
    whole = gzip.compress(b"\n".join(b"%d,x" % (number * 7919) for number in range(100_000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StreamForgeError, match=r"cannot be read to its end: .* 41 rows of the files before it"):
        list(_read(_READERS["candles_1h"].rows(path), path, 41))
