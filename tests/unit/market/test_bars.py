"""Bars: the rules at their edges."""

from __future__ import annotations

import msgspec
import pytest

from streamforge.errors import DecodeError
from streamforge.market.bars import BarRules, BarsState, SourcedTrade, add_trades, bars_of
from streamforge.market.records import GapKind
from streaming.processors.bars import decode_trade
from tests.pipeline_support import make_trade

BTC, ETH = "BTC-USDT.SIM", "ETH-USDT.SIM"
MINUTE_MS = 60_000
START_MS = 1_700_000_040_000  # a full minute
RULES = BarRules(out_of_orderness_ns=1_000_000_000, allowed_lateness_ns=120_000_000_000)


def at(offset: int, ms: int, *, name: str = BTC, price: str = "100", size: str = "1") -> SourcedTrade:
    return SourcedTrade(make_trade(name, offset, START_MS + ms, price=price, size=size), "id", 0, offset)


def test_bar_stays_open_until_the_watermark_reaches_its_end() -> None:
    trades = [at(0, 0), at(1, MINUTE_MS + 999)]
    assert not add_trades(BarsState(), trades, RULES).bars
    [bar] = add_trades(BarsState(), [*trades, at(2, MINUTE_MS + 1_000)], RULES).bars
    assert (bar.ts_start_ns, bar.trade_count, bar.revision) == (START_MS * 10**6, 1, 0)


def test_bar_of_an_idle_instrument_closes_by_its_partitions_watermark() -> None:
    result = add_trades(BarsState(), [at(0, 0, name=ETH), at(1, 2 * MINUTE_MS)], RULES)
    assert [bar.instrument for bar in result.bars] == [ETH]


def test_bar_open_and_close_go_by_event_time_then_input_order() -> None:
    trades = [at(0, 500, price="2"), at(1, 500, price="3"), at(2, 100, price="1"), at(3, 500, price="4")]
    [bar] = bars_of(trades).bars
    assert (bar.open, bar.close, bar.first_trade_id, bar.last_trade_id) == ("1", "4", "2", "3")
    assert (bar.high, bar.low, bar.trades_start_offset, bar.trades_end_offset) == ("4", "1", 0, 4)


def test_bar_late_trade_within_lateness_corrects_with_the_next_revision() -> None:
    state = add_trades(BarsState(), [at(0, 0), at(1, 2 * MINUTE_MS)], RULES).state
    result = add_trades(state, [at(2, 10, price="50")], RULES)
    assert [(bar.revision, bar.low, bar.trade_count) for bar in result.bars] == [(1, "50", 2)]


def test_bar_that_only_late_trades_reach_begins_with_revision_0() -> None:
    result = add_trades(BarsState(), [at(1, 2 * MINUTE_MS), at(2, 10)], RULES)
    assert [(bar.ts_start_ns, bar.revision) for bar in result.bars] == [(START_MS * 10**6, 0)]


def test_bar_trade_beyond_lateness_leaves_it_and_marks_its_range() -> None:
    edge_ms = MINUTE_MS + 120_000 + 1_000
    state = add_trades(BarsState(), [at(0, 0), at(1, edge_ms)], RULES).state
    result = add_trades(state, [at(2, 10)], RULES)
    assert not result.bars
    [gap] = result.gaps
    assert gap.kind is GapKind.LATE_TRADE
    assert (gap.ts_start_ns, gap.ts_end_ns) == (START_MS * 10**6, (START_MS + MINUTE_MS) * 10**6)
    assert add_trades(state, [at(2, MINUTE_MS + 10)], RULES).bars, "the next bar can still be corrected"


def test_bar_forgotten_after_lateness_leaves_no_state() -> None:
    result = add_trades(BarsState(), [at(0, 0), at(1, 10 * MINUTE_MS, name=ETH)], RULES)
    assert BTC in result.changed
    assert result.state.save(BTC) is None


def test_bar_sums_are_exact_where_floats_are_not() -> None:
    [bar] = bars_of([at(0, 0, price="0.1", size="0.1"), at(1, 1, price="0.2", size="0.2")]).bars
    assert (bar.volume, bar.quote_volume) == ("0.3", "0.05")
    assert bar.vwap == "0.166666666666666667"


def test_bar_quote_volume_is_rounded_once_from_the_exact_sum() -> None:
    tiny = "0.0000000005"
    [bar] = bars_of([at(n, n, price=tiny, size=tiny) for n in range(4)]).bars
    assert bar.quote_volume == "0.000000000000000001"


def test_bar_trade_that_overflows_a_sum_is_refused_and_changes_nothing() -> None:
    huge = "99999999999999999999"
    by_volume = [at(0, 0, price="0.5", size=huge), at(1, 1, price="0.5")]
    by_quote_volume = [at(0, 0), at(1, 1, price=huge, size="2")]
    for trades in (by_volume, by_quote_volume):
        result = add_trades(BarsState(), trades, RULES)
        assert [(r.source.offset, r.reason) for r in result.refusals] == [(1, "out_of_range")]
        [bar] = add_trades(result.state, [at(9, 5 * MINUTE_MS)], RULES).bars
        assert bar.trade_count == 1


def test_bar_trade_that_is_no_decimal_is_refused() -> None:
    result = add_trades(BarsState(), [at(0, 0, price="1e5")], RULES)
    assert [r.reason for r in result.refusals] == ["bad_decimal"]
    assert not result.state.instruments


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "malformed_json"),
        (b"{", "malformed_json"),
        (b"[]", "wrong_type"),
        (b'{"instrument":1}', "wrong_type"),
        (b'{"instrument":"\xff"}', "malformed_json"),
    ],
)
def test_decode_trade_of_what_is_none_is_refused(value: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_trade(value)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("field", "value", "reason"), [("symbol", "x" * 257, "too_long"), ("ts_event_ns", -1, "bad_time")]
)
def test_decode_trade_that_no_bar_can_hold_is_refused(field: str, value: object, reason: str) -> None:
    record = msgspec.to_builtins(make_trade(BTC, 1, START_MS)) | {field: value}
    with pytest.raises(DecodeError) as caught:
        decode_trade(msgspec.json.encode(record))
    assert caught.value.reason == reason
