"""The synthetic market: reproducible, and its streams, book and history agree with each other."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from streamforge.errors import ConfigurationError
from streaming.simulator.history import MINUTE_MS
from streaming.simulator.instruments import default_instruments, new_listing
from streaming.simulator.protocol import CHANNELS, Formatter, stream_name
from streaming.simulator.source import BookSnapshot, Message
from streaming.simulator.synthetic import IDS_PER_MS, SyntheticMarket, SyntheticSettings

START_MS = 1_700_000_000_000 - 1_700_000_000_000 % MINUTE_MS


class Everything:
    """Contains every stream."""

    def __contains__(self, _stream: object) -> bool:
        """Return true."""
        return True


ALL = Everything()


def market(count: int = 2, **settings: Any) -> SyntheticMarket:
    return SyntheticMarket(default_instruments(count), SyntheticSettings(**{"start_ms": START_MS, **settings}))


def run(made: SyntheticMarket, until_s: float, step_ms: int = 1_000, wanted: Any = ALL) -> list[Message]:
    found: list[Message] = []
    end_ms = START_MS + int(until_s * 1000)
    for now_ms in range(START_MS + step_ms, end_ms + 1, step_ms):
        found += made.advance(now_ms, wanted)
    while made.behind:
        found += made.advance(end_ms, wanted)
    return found


def by_stream(messages: list[Message]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for message in messages:
        found[message.stream].append(message.data)
    return found


def test_advance_same_seed_and_clock_gives_the_same_bytes() -> None:
    assert run(market(), 20) == run(market(), 20)
    assert run(market(), 20) != run(market(seed=8), 20)


@pytest.mark.parametrize("step_ms", [7, 130, 5_000])
def test_advance_other_calls_give_the_same_bytes_of_each_stream(step_ms: int) -> None:
    until_s = 9.1 if step_ms == 7 else 10.4 if step_ms == 130 else 10
    assert by_stream(run(market(), until_s, step_ms)) == by_stream(run(market(), until_s, 100))


def test_advance_fewer_streams_wanted_changes_no_byte_of_the_others() -> None:
    stream = stream_name("ETHUSDT", "trade")
    assert by_stream(run(market(), 20, wanted={stream})) == {stream: by_stream(run(market(), 20))[stream]}


def test_advance_event_times_never_pass_the_clock_and_rise_within_a_stream() -> None:
    made = market(1, trades_per_s=50)
    last: dict[str, int] = {}
    for now_ms in range(START_MS, START_MS + 5_000, 33):
        for message in made.advance(now_ms, ALL):
            assert message.ts_event_ns <= now_ms * 1_000_000
            assert message.ts_event_ns >= last.get(message.stream, 0)
            last[message.stream] = message.ts_event_ns


def test_advance_trade_ids_rise_by_one_from_the_start_time() -> None:
    messages = run(market(trades_per_s=100), 5)
    for symbol in ("BTCUSDT", "ETHUSDT"):
        ids = [m.first_id for m in messages if m.stream == stream_name(symbol, "trade")]
        assert ids == list(range(START_MS * IDS_PER_MS, START_MS * IDS_PER_MS + len(ids)))
        assert len(ids) > 100


def test_advance_a_later_start_never_repeats_an_id() -> None:
    first = [m.last_id for m in run(market(trades_per_s=500), 3) if m.channel in ("trade", "depth@100ms")]
    later = SyntheticMarket(default_instruments(2), SyntheticSettings(start_ms=START_MS + 3_000))
    assert max(first) < min(m.first_id for m in later.advance(START_MS + 4_000, ALL) if m.channel == "trade")


def test_advance_first_id_setting_is_obeyed() -> None:
    trades = [m for m in run(market(1, first_id=42, trades_per_s=50), 2) if m.channel == "trade"]
    assert trades[0].first_id == 42


def test_advance_rate_setting_is_the_mean_trade_rate() -> None:
    messages = run(
        market(4, trades_per_s=100), 60, wanted={stream_name(s.symbol, "trade") for s in default_instruments(4)}
    )
    assert 70 < len(messages) / 60 / 4 < 140


def test_set_rate_factor_multiplies_the_rate() -> None:
    made = market(1, trades_per_s=20)
    calm = len([m for m in run(made, 20) if m.channel == "trade"])
    made.set_rate_factor(20)
    end_ms = START_MS + 20_000
    busy = [m for k in range(1, 21) for m in made.advance(end_ms + k * 1000, {stream_name("BTCUSDT", "trade")})]
    assert 10 * calm < len(busy) < 40 * calm


@pytest.mark.parametrize("channel", ["depth@100ms", "depth", "depth@1000ms"])
def test_depth_deltas_on_an_early_snapshot_give_the_book(channel: str) -> None:
    made = market(1, trades_per_s=50)
    run(made, 3.25, 50)
    snapshot = made.depth("BTCUSDT", 5_000)
    bids, asks = dict(snapshot.bids), dict(snapshot.asks)
    deltas = [m for now in range(START_MS + 3_300, START_MS + 10_001, 50) for m in made.advance(now, ALL)]
    last_update_id = snapshot.last_update_id
    applied = 0
    for message in deltas:
        if message.channel != channel:
            continue
        delta = msgspec.json.decode(message.data)
        assert delta["U"] <= last_update_id + 1, "a hole between snapshot and deltas"
        if delta["u"] <= snapshot.last_update_id:
            continue
        applied += 1
        for side, levels in ((bids, delta["b"]), (asks, delta["a"])):
            for price, size in levels:
                side[price] = size
                if Decimal(size) == 0:
                    del side[price]
        last_update_id = delta["u"]
    end = made.depth("BTCUSDT", 5_000)
    assert applied >= 7
    assert last_update_id == end.last_update_id
    assert BookSnapshot(last_update_id, *_sorted(bids, asks)) == end


def _sorted(bids: dict[str, str], asks: dict[str, str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    def price(level: tuple[str, str]) -> Decimal:
        return Decimal(level[0])

    return sorted(bids.items(), key=price, reverse=True), sorted(asks.items(), key=price)


@pytest.mark.parametrize("channel", ["depth@100ms", "depth"])
def test_depth_update_ids_are_continuous(channel: str) -> None:
    deltas = [m for m in run(market(1, trades_per_s=20), 10) if m.channel == channel]
    assert deltas[0].first_id == START_MS * IDS_PER_MS
    assert all(later.first_id == earlier.last_id + 1 for earlier, later in pairwise(deltas))
    assert len(deltas) >= 9


def test_book_ticker_is_always_the_best_of_the_book_and_told_only_when_it_changes() -> None:
    made = market(1, trades_per_s=50)
    tops = []
    for now_ms in range(START_MS + 1, START_MS + 2_000):
        tops += [msgspec.json.decode(m.data) for m in made.advance(now_ms, ALL) if m.channel == "bookTicker"]
        book = made.depth("BTCUSDT", 1)
        assert [(tops[-1]["b"], tops[-1]["B"])] == book.bids
        assert [(tops[-1]["a"], tops[-1]["A"])] == book.asks
    assert len(tops) > 50
    assert all([a[name] for name in "bBaA"] != [b[name] for name in "bBaA"] for a, b in pairwise(tops))
    assert all(Decimal(item["b"]) < Decimal(item["a"]) for item in tops)


def test_trade_whose_buyer_was_the_maker_is_a_sale_at_the_bid() -> None:
    top = {"b": "0", "a": "0"}
    sides = []
    for message in run(market(1, trades_per_s=50), 5, 100):
        payload = msgspec.json.decode(message.data)
        if message.channel == "bookTicker":
            top = payload
        elif message.channel == "trade":
            sides.append(payload["m"])
            if payload["m"]:
                assert Decimal(payload["p"]) <= Decimal(top["b"])
            else:
                assert Decimal(payload["p"]) >= Decimal(top["a"])
    assert set(sides) == {True, False}


def test_klines_agree_with_the_trades_and_the_last_one_of_a_minute_is_closed() -> None:
    messages = run(market(1, trades_per_s=10), 125)
    trades: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for message in messages:
        if message.channel == "trade":
            trade = msgspec.json.decode(message.data)
            trades[trade["T"] - trade["T"] % MINUTE_MS].append(trade)
    closed = [msgspec.json.decode(m.data)["k"] for m in messages if m.channel == "kline_1m"]
    closed = [kline for kline in closed if kline["x"]]
    assert [kline["t"] for kline in closed] == [START_MS, START_MS + MINUTE_MS]
    for kline in closed:
        inside = trades[kline["t"]]
        prices = [Decimal(trade["p"]) for trade in inside]
        assert (kline["f"], kline["L"], kline["n"]) == (inside[0]["t"], inside[-1]["t"], len(inside))
        assert (Decimal(kline["o"]), Decimal(kline["c"])) == (prices[0], prices[-1])
        assert (Decimal(kline["h"]), Decimal(kline["l"])) == (max(prices), min(prices))
        assert Decimal(kline["v"]) == sum(Decimal(trade["q"]) for trade in inside)
        assert Decimal(kline["q"]) == sum(Decimal(trade["q"]) * Decimal(trade["p"]) for trade in inside)
        bought = [trade for trade in inside if not trade["m"]]
        assert Decimal(kline["V"]) == sum(Decimal(trade["q"]) for trade in bought)


def test_history_is_what_the_trade_stream_said() -> None:
    made = market(1, trades_per_s=50)
    streamed = [msgspec.json.decode(m.data) for m in run(made, 5) if m.channel == "trade"]
    form = Formatter(made.instruments()[0])
    remembered = [form.rest_trade(trade) for trade in made.history("BTCUSDT").trades(1000, 0)]
    assert [(t["t"], t["p"], t["q"], t["T"], t["m"]) for t in streamed] == [
        (t["id"], t["price"], t["qty"], t["time"], t["isBuyerMaker"]) for t in remembered
    ]
    assert {t["m"] for t in streamed} == {True, False}


def test_trades_leader_returns_show_in_the_follower_later() -> None:
    made = market(2, trades_per_s=20, seed=7)
    edge = made.graph[0]
    wanted = {stream_name(symbol, "trade") for symbol in (edge.leader, edge.follower)}
    seconds = 1_200
    last: dict[str, list[float]] = {symbol: [np.nan] * seconds for symbol in (edge.leader, edge.follower)}
    for message in run(made, seconds, wanted=wanted):
        second = (message.ts_event_ns // 1_000_000 - START_MS) // 1000
        if second < seconds:
            last[message.symbol][second] = float(msgspec.json.decode(message.data)["p"])
    moves = {}
    for symbol, prices in last.items():
        path = np.array(prices)
        known = np.maximum.accumulate(np.where(np.isnan(path), 0, np.arange(seconds)))
        moves[symbol] = np.nan_to_num(np.diff(np.log(path[known])))
    lag = edge.lag_s
    along = np.corrcoef(moves[edge.leader][:-lag], moves[edge.follower][lag:])[0, 1]
    against = np.corrcoef(moves[edge.follower][:-lag], moves[edge.leader][lag:])[0, 1]
    assert along > 0.2
    assert abs(against) < 0.15


def test_list_instrument_trades_from_then_on_and_leaves_the_others_alone() -> None:
    plain, listing = market(), market()
    run(plain, 5), run(listing, 5)
    listing.list_instrument(new_listing("NEWUSDT"))
    later = [m for k in range(6, 16) for m in listing.advance(START_MS + k * 1000, ALL)]
    expected = [m for k in range(6, 16) for m in plain.advance(START_MS + k * 1000, ALL)]
    assert [m for m in later if m.symbol != "NEWUSDT"] == expected
    assert {m.channel for m in later if m.symbol == "NEWUSDT"} == set(CHANNELS)
    assert [spec.symbol for spec in listing.instruments()] == ["BTCUSDT", "ETHUSDT", "NEWUSDT"]
    with pytest.raises(ConfigurationError, match="listed already"):
        listing.list_instrument(new_listing("NEWUSDT"))


def test_advance_far_behind_moves_a_second_at_a_time() -> None:
    made = market(1)
    messages = made.advance(START_MS + 60_000, ALL)
    assert made.behind
    assert max(m.ts_event_ns for m in messages) <= (START_MS + 1_000) * 1_000_000
    run(made, 60)
    assert not made.behind


def test_seasonality_makes_some_hours_busier() -> None:
    def trades(hour: int) -> int:
        start_ms = START_MS - START_MS % 86_400_000 + hour * 3_600_000
        made = SyntheticMarket(
            default_instruments(1), SyntheticSettings(start_ms=start_ms, trades_per_s=50, seasonality=True)
        )
        return sum(len(made.advance(start_ms + k * 1000, {"btcusdt@trade"})) for k in range(1, 31))

    assert trades(6) > 2 * trades(18)
