"""Bars sum to trades, however the trades come, and the stream ends where the batch does."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from streamforge.market.bars import (
    INTERVAL_NS,
    WATERMARK_KEY,
    BarRules,
    BarsState,
    SourcedTrade,
    add_trades,
    bars_of,
    latest_revision,
)
from streamforge.market.records import Bar
from tests.pipeline_support import INSTRUMENTS, START_MS, make_trade

SPAN_MS = 240_000
RULES = BarRules(out_of_orderness_ns=1_000_000_000, allowed_lateness_ns=SPAN_MS * 1_000_000)
TIGHT = BarRules(out_of_orderness_ns=0, allowed_lateness_ns=30_000_000_000)
NUMBERS = st.integers(1, 10**14).map(lambda units: format(Decimal(units).scaleb(-8), "f"))
TRADES = st.lists(
    st.tuples(st.sampled_from(INSTRUMENTS), st.integers(0, SPAN_MS - 1), NUMBERS, NUMBERS), min_size=1, max_size=60
).map(
    lambda rows: [
        SourcedTrade(make_trade(name, number, START_MS + ts_ms, price=price, size=size), "id", 0, 10 + 2 * number)
        for number, (name, ts_ms, price, size) in enumerate(rows)
    ]
)


def end_of_stream(offset: int) -> SourcedTrade:
    """Return a trade of another instrument far behind all, which closes every bar."""
    return SourcedTrade(make_trade("END-USDT.SIM", offset, START_MS + 10 * SPAN_MS), "id", 0, offset)


def values(bar: Bar) -> Bar:
    return msgspec.structs.replace(bar, revision=0)


def latest(bars: list[Bar]) -> dict[tuple[str, int], Bar]:
    return {(bar.instrument, bar.ts_start_ns): bar for bar in sorted(bars, key=lambda bar: bar.revision)}


@given(TRADES)
def test_bars_sum_to_trades(trades: list[SourcedTrade]) -> None:
    bars = bars_of(trades).bars
    for name in INSTRUMENTS:
        mine = [item.trade for item in trades if item.trade.instrument == name]
        own = [bar for bar in bars if bar.instrument == name]
        assert sum(bar.trade_count for bar in own) == len(mine)
        assert sum(Decimal(bar.volume) for bar in own) == sum(Decimal(trade.size) for trade in mine)
        bought = sum(Decimal(trade.size) for trade in mine if trade.aggressor_side == "BUY")
        assert sum(Decimal(bar.taker_buy_volume) for bar in own) == bought
    for bar in bars:
        low, high, vwap = Decimal(bar.low), Decimal(bar.high), Decimal(bar.vwap)
        assert low <= Decimal(bar.open) <= high
        assert low <= Decimal(bar.close) <= high
        assert low <= vwap <= high
        assert bar.ts_end_ns - bar.ts_start_ns == INTERVAL_NS
        assert bar.ts_start_ns % INTERVAL_NS == 0


@given(TRADES)
def test_stream_in_any_order_within_lateness_ends_with_the_batch_result(trades: list[SourcedTrade]) -> None:
    result = add_trades(BarsState(), [*trades, end_of_stream(10_000)], RULES)
    assert not result.gaps
    found = latest(result.bars)
    expected = {(bar.instrument, bar.ts_start_ns): bar for bar in bars_of(trades).bars}
    assert {key: values(bar) for key, bar in found.items()} == expected
    revisions = {key: [b.revision for b in result.bars if (b.instrument, b.ts_start_ns) == key] for key in found}
    assert all(numbers == list(range(len(numbers))) for numbers in revisions.values())


@given(TRADES, st.lists(st.integers(0, 60), max_size=6))
def test_stream_fetched_in_any_parts_and_restored_between_gives_the_same(
    trades: list[SourcedTrade], cuts: list[int]
) -> None:
    whole = add_trades(BarsState(), trades, TIGHT)
    state, saved = BarsState(), dict[str, str]()
    bars, gaps = [], []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(trades)], strict=True):
        before = {key: state.save(key) for key in (*state.instruments, WATERMARK_KEY)}
        result = add_trades(state, trades[start:end], TIGHT)
        assert {key: state.save(key) for key in before} == before, "the former state was changed"
        bars += result.bars
        gaps += result.gaps
        for key in result.changed:
            text = result.state.save(key)
            if text is None:
                saved.pop(key, None)
            else:
                saved[key] = text
        state = BarsState.restore(saved)
        assert state == result.state
    assert (bars, gaps) == (whole.bars, whole.gaps)


@given(TRADES)
def test_every_trade_is_in_its_bar_or_marked_as_a_gap(trades: list[SourcedTrade]) -> None:
    result = add_trades(BarsState(), [*trades, end_of_stream(10_000)], TIGHT)
    counted = sum(bar.trade_count for bar in latest(result.bars).values())
    assert counted + len(result.gaps) == len(trades)


@given(TRADES, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_latest_revision_of_a_table_in_any_order_is_the_last_of_each_bar(
    trades: list[SourcedTrade], chance: object
) -> None:
    result = add_trades(BarsState(), [*trades, end_of_stream(10_000)], RULES)
    rebuilt = [msgspec.structs.replace(bar, replay_epoch=1) for bar in result.bars[:1]]
    rows = [msgspec.to_builtins(bar) for bar in (*result.bars, *rebuilt)]
    chance.shuffle(rows)  # type: ignore[attr-defined]
    view = latest_revision(pa.Table.from_pylist(rows)).to_pylist()
    expected = latest(result.bars) | {(bar.instrument, bar.ts_start_ns): bar for bar in rebuilt}
    assert {(row["instrument"], row["ts_start_ns"]): row for row in view} == {
        key: msgspec.to_builtins(bar) for key, bar in expected.items()
    }
    assert len(view) == len(expected)
