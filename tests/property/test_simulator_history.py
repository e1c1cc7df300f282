"""Klines and aggregates of a trade history against sums over its trades, for any trades."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from streaming.simulator.history import MINUTE_MS, AggregateTrade, Kline, Trade, TradeHistory

START_MS = 1_700_000_000_000 - 1_700_000_000_000 % MINUTE_MS
STEPS = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.integers(1, 5),
        st.sampled_from([0, 1, 19_999, 20_000, 40_000]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=60,
)


def trades_of(steps: list[tuple[int, int, int, bool, bool]], first_id: int = 500) -> list[Trade]:
    """Build trades from (price, lots, ms since the last trade, buyer is maker, same taker as the last)."""
    trades: list[Trade] = []
    ts_ms, aggregate = START_MS, 90
    for number, (price, lots, gap_ms, maker, same) in enumerate(steps):
        if same and trades:
            last = trades[-1]
            trades.append(last._replace(trade_id=first_id + number, lots=lots))
            continue
        ts_ms += gap_ms
        aggregate += 1
        trades.append(Trade(first_id + number, price, lots, ts_ms, int(maker), aggregate))
    return trades


def history_of(trades: list[Trade], asked_every: int = 1_000) -> TradeHistory:
    history = TradeHistory(500)
    for number, trade in enumerate(trades, start=1):
        history.add(trade)
        if number % asked_every == 0:
            history.current_minute()
    return history


def kline_of(trades: list[Trade], start_ms: int, end_ms: int) -> Kline:
    bought = [trade for trade in trades if not trade.buyer_is_maker]
    prices = [trade.price for trade in trades]
    return Kline(
        start_ms,
        end_ms,
        trades[0].trade_id,
        trades[-1].trade_id,
        prices[0],
        max(prices),
        min(prices),
        prices[-1],
        sum(trade.lots for trade in trades),
        sum(trade.price * trade.lots for trade in trades),
        len(trades),
        sum(trade.lots for trade in bought),
        sum(trade.price * trade.lots for trade in bought),
    )


@given(STEPS, st.integers(1, 9), st.sampled_from([1, 3, 5]))
def test_klines_any_trades_equal_sums_over_the_trades(
    steps: list[tuple[int, int, int, bool, bool]], asked_every: int, minutes: int
) -> None:
    trades = trades_of(steps)
    interval_ms = minutes * MINUTE_MS
    expected = [
        kline_of(list(group), start_ms, start_ms + interval_ms)
        for start_ms, group in groupby(trades, key=lambda trade: trade.ts_ms - trade.ts_ms % interval_ms)
    ]
    assert list(history_of(trades, asked_every).klines(interval_ms)) == expected


@given(STEPS, st.integers(1, 20))
def test_aggregates_any_trades_join_those_of_one_taker(
    steps: list[tuple[int, int, int, bool, bool]], limit: int
) -> None:
    trades = trades_of(steps)
    expected = []
    for aggregate_id, group in groupby(trades, key=lambda trade: trade.aggregate_id):
        parts = list(group)
        first = parts[0]
        expected.append(
            AggregateTrade(
                aggregate_id,
                first.price,
                sum(part.lots for part in parts),
                first.trade_id,
                parts[-1].trade_id,
                first.ts_ms,
                bool(first.buyer_is_maker),
            )
        )
    history = history_of(trades)
    assert history.aggregates(limit) == expected[-limit:]
    assert history.aggregates(limit, from_id=0) == expected[:limit]
    if expected:
        middle = expected[len(expected) // 2]
        assert history.aggregates(limit, from_id=middle.aggregate_id)[0] == middle
        in_time = [item for item in expected if item.ts_ms >= middle.ts_ms]
        assert history.aggregates(limit, start_ms=middle.ts_ms) == in_time[:limit]
        until = [item for item in expected if item.ts_ms <= middle.ts_ms]
        assert history.aggregates(limit, end_ms=middle.ts_ms) == until[:limit]


@given(STEPS, st.integers(1, 20), st.integers(490, 570))
def test_trades_any_range_returns_what_was_added(
    steps: list[tuple[int, int, int, bool, bool]], limit: int, from_id: int
) -> None:
    trades = trades_of(steps)
    history = history_of(trades)
    assert history.trades(limit) == trades[-limit:]
    assert history.trades(limit, from_id) == [trade for trade in trades if trade.trade_id >= from_id][:limit]


def test_trim_beyond_the_bound_keeps_the_latest_and_the_klines() -> None:
    history = TradeHistory(1, max_trades=10)
    trades = [Trade(number, number, 1, START_MS + number * 5_000, 0, number) for number in range(1, 101)]
    for trade in trades:
        history.add(trade)
        history.trim()
    kept = history.trades(1000, 0)
    assert kept == trades[-len(kept) :]
    assert 10 <= len(kept) <= 20
    assert sum(kline.trades for kline in history.klines(MINUTE_MS)) == 100
