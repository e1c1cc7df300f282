"""Rows of candle files: what they become, and what is refused."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamforge.market.candles import FORMATS, CandleState, parse_candles
from streamforge.market.dedupe import SeenIds
from streamforge.market.records import RawRecord, VenueBar
from tests.history_support import HOUR_NS, MINUTE_NS, RECEIVED_NS, START_NS, csv_row, raw_row

AHEAD_NS = 60_000_000_000


def parse(*records: RawRecord, state: CandleState | None = None) -> tuple[list[VenueBar], list[str], CandleState, int]:
    """Return bars, reasons, state and how many were dropped."""
    found = parse_candles(state or {}, records, max_event_ahead_ns=AHEAD_NS)
    return found.bars, [item.reason for item in found.refusals], found.state, found.counters.get("duplicates", 0)


def minute(**cells: object) -> bytes:
    row = {"date": START_NS, "open": 0.5, "high": 0.75, "low": 0.25, "close": 0.5, "volume": 3.0}
    return msgspec.json.encode(row | cells)


def test_csv_row_becomes_a_bar_in_utc_with_its_raw_identity() -> None:
    [bar], reasons, _, _ = parse(raw_row(csv_row(5, volume="32264.50"), offset=7))
    assert not reasons
    assert (bar.instrument, bar.venue, bar.symbol, bar.interval) == ("BTC-USDT.BINANCE", "BINANCE", "BTCUSDT", "1h")
    assert (bar.ts_start_ns, bar.ts_end_ns) == (START_NS + 5 * HOUR_NS, START_NS + 6 * HOUR_NS)
    assert (bar.open, bar.high, bar.low, bar.close, bar.volume) == ("40.5", "41", "39.5", "40.25", "32264.5")
    assert (bar.raw_topic_id, bar.raw_partition, bar.raw_offset, bar.raw_index) == ("topic-id", 0, 7, 0)
    assert bar.ts_receive_ns == RECEIVED_NS


def test_csv_rows_over_a_change_of_offset_are_hours_in_a_row() -> None:
    rows = [raw_row(csv_row(n, offset_h=3 if n < 1 else 2), offset=n) for n in range(4)]
    bars, reasons, state, duplicates = parse(*rows)
    assert [bar.ts_start_ns for bar in bars] == [START_NS + n * HOUR_NS for n in range(4)]
    assert (reasons, duplicates) == ([], 0)
    assert (
        state["BTC-USDT.BINANCE/1h"].to_text()
        == SeenIds.of(range(START_NS // HOUR_NS, START_NS // HOUR_NS + 4)).to_text()
    )


def test_bar_that_comes_again_is_dropped_whatever_its_offset_from_utc() -> None:
    first, reasons, state, _ = parse(raw_row(csv_row(1, offset_h=3)))
    again, more, after, duplicates = parse(raw_row(csv_row(1, offset_h=2, price="40.75")), state=state)
    assert (len(first), again, reasons + more, duplicates) == (1, [], [], 1)
    assert after == state


def test_bar_of_another_interval_or_instrument_is_no_duplicate() -> None:
    other = {"instrument": "BTC-USDT.BINANCEUSDM", "venue": "BINANCEUSDM"}
    bars, reasons, _, duplicates = parse(
        raw_row(csv_row(0)),
        raw_row(minute(), channel="candles_1m"),
        raw_row(minute(), channel="candles_1m", **other),
    )
    assert ([bar.interval for bar in bars], reasons, duplicates) == (["1h", "1m", "1m"], [], 0)


@given(st.floats(1e-15, 1e15), st.integers(0, 10**6))
def test_binary_number_is_the_shortest_decimal_of_it_or_refused(price: float, minutes: int) -> None:
    cells = dict.fromkeys(("open", "high", "low", "close"), price)
    row = minute(date=START_NS + minutes * MINUTE_NS, **cells)
    bars, reasons, _, _ = parse(raw_row(row, channel="candles_1m"))
    exact = Decimal(repr(price))
    if exact.as_tuple().exponent < -18:  # type: ignore[operator]
        assert (bars, reasons) == ([], ["out_of_range"])
    else:
        assert (Decimal(bars[0].open), reasons) == (exact, [])
        assert "e" not in bars[0].open.lower()
        assert bars[0].ts_end_ns == START_NS + (minutes + 1) * MINUTE_NS


def test_bar_without_trades_has_volume_zero() -> None:
    [bar], reasons, _, _ = parse(raw_row(csv_row(0, volume="0.0")))
    assert (bar.volume, reasons) == ("0", [])


GOOD = csv_row(0).decode()
CLOSE = GOOD.split(",")[6]
BAD_ROWS = [
    ("malformed_row", b""),
    ("malformed_row", b"\xff\xfe,1,2"),
    ("malformed_row", GOOD.encode() + b",1"),
    ("bad_time", GOOD.replace("+03:00", "", 1).encode()),
    ("bad_time", GOOD.replace("03:00:00+", "03:30:00+", 1).encode()),
    ("bad_time", GOOD.replace(CLOSE, CLOSE.replace("59.999", "58.999")).encode()),
    ("bad_time", GOOD.replace("2020", "soon", 1).encode()),
    ("bad_decimal", csv_row(0, price="")),
    ("bad_decimal", csv_row(0, price="nan")),
    ("bad_decimal", csv_row(0, price="-40.5")),
    ("bad_decimal", csv_row(0, price="4_0")),
    ("bad_decimal", csv_row(0, volume="1e9999")),
    ("out_of_range", csv_row(0, volume="1e300")),
    ("out_of_range", csv_row(0, volume="0.0000000000000000001")),
    ("out_of_range", GOOD.replace("39.5", "0").encode()),
    ("inconsistent_prices", csv_row(0, price="41.25")),
    ("event_in_future", csv_row((RECEIVED_NS - START_NS) // HOUR_NS)),
]


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS)
def test_row_that_is_no_bar_is_refused_and_the_next_is_not(reason: str, row: bytes) -> None:
    bars, reasons, _, _ = parse(raw_row(row), raw_row(csv_row(0), offset=1))
    assert reasons == [reason]
    assert [bar.raw_offset for bar in bars] == [1]


BAD_MINUTES = [
    ("malformed_row", b"[]"),
    ("malformed_row", minute(open=None)),
    ("malformed_row", minute(date="2020-10-25")),
    ("bad_time", minute(date=START_NS + 1)),
    ("out_of_range", minute(volume=1e30)),
    ("out_of_range", b'{"date":%d,"open":1,"high":1,"low":1,"close":1,"volume":1e999999999}' % START_NS),
]


@pytest.mark.parametrize(("reason", "row"), BAD_MINUTES)
def test_binary_row_that_is_no_bar_is_refused(reason: str, row: bytes) -> None:
    assert parse(raw_row(row, channel="candles_1m"))[:2] == ([], [reason])


@pytest.mark.parametrize(
    ("reason", "more"),
    [
        ("unknown_stream", {"channel": "trade"}),
        ("symbol_mismatch", {"venue": "SIM"}),
        ("bad_key", {"instrument": "BTCUSDT"}),
    ],
)
def test_row_with_headers_that_do_not_fit_is_refused(reason: str, more: dict[str, str]) -> None:
    assert parse(raw_row(csv_row(0), **more))[:2] == ([], [reason])


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(0, 60))
def test_how_rows_come_together_changes_nothing(hours: list[int], cut: int) -> None:
    rows = [raw_row(csv_row(hour), offset=offset) for offset, hour in enumerate(hours)]
    whole, _, state, duplicates = parse(*rows)
    first, _, between, dropped = parse(*rows[:cut])
    rest, _, after, dropped_later = parse(*rows[cut:], state=between)
    assert [*first, *rest] == whole
    assert (after, dropped + dropped_later) == (state, duplicates)
    assert sorted(bar.ts_start_ns for bar in whole) == [START_NS + hour * HOUR_NS for hour in sorted(set(hours))]


def test_every_format_takes_its_own_example_only() -> None:
    for kind in FORMATS.values():
        taken = [other.name for other in FORMATS.values() if kind.file_name.fullmatch(other.example)]
        assert taken == [kind.name]
