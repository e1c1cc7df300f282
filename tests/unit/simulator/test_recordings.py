"""Recordings of a few lines, made here: pace, book, history and errors."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from streamforge.errors import ConfigurationError
from streaming.simulator.history import Trade
from streaming.simulator.instruments import new_listing
from streaming.simulator.recordings import RecordedMarket
from streaming.simulator.source import BookSnapshot, Message

BASE_NS = 1_723_161_254_000_000_000
ALL = {"btcusdt@trade", "btcusdt@depth@100ms", "btcusdt@bookTicker", "ethusdt@trade"}


def trade(trade_id: int, symbol: str = "BTCUSDT", price: str = "61837.63000000", maker: str = "true") -> str:
    stream = symbol.lower()
    return (
        f'{{"stream":"{stream}@trade","data":{{"e":"trade","E":1723161255343,"s":"{symbol}","t":{trade_id},'
        f'"p":"{price}","q":"0.02000000","T":1723161255342,"m":{maker},"M":true}}}}'
    )


def depth(first: int, last: int, bids: str = "[]", asks: str = "[]") -> str:
    return (
        f'{{"stream":"btcusdt@depth@100ms","data":{{"e":"depthUpdate","E":1723161255208,"s":"BTCUSDT",'
        f'"U":{first},"u":{last},"b":{bids},"a":{asks}}}}}'
    )


SNAPSHOT = (
    '{"lastUpdateId":10,"bids":[["100.00000000","1.00000000"],["99.00000000","2.00000000"]],'
    '"asks":[["101.00000000","3.00000000"]]}'
)
TICKER = '{"stream":"btcusdt@bookTicker","data":{"u":12,"s":"BTCUSDT","b":"1","B":"2","a":"3","A":"4"}}'


def record(folder: Path, name: str, lines: list[str], gap_ms: int = 100, after_ms: int = 0) -> None:
    target = folder / "ws_binance"
    target.mkdir(exist_ok=True)
    text = "".join(f"{BASE_NS + (after_ms + n * gap_ms) * 1_000_000} {line}\n" for n, line in enumerate(lines))
    (target / name).write_bytes(gzip.compress(text.encode()))


def ids(messages: list[Message]) -> list[int]:
    return [message.first_id for message in messages]


def test_advance_speed_zero_gives_everything_as_recorded_in_order_of_receipt(tmp_path: Path) -> None:
    record(tmp_path, "spot_btcusdt_1.gz", [SNAPSHOT, trade(5), TICKER])
    record(tmp_path, "spot_btcusdt_2.gz", [trade(6)], after_ms=1000)
    eth = SNAPSHOT.replace("10", "1")
    record(tmp_path, "spot_ethusdt_1.gz", [eth, trade(70, "ETHUSDT", "2683.80000000")], after_ms=120)
    market = RecordedMarket(tmp_path, speed=0)
    messages = list(market.advance(0, ALL))
    assert [m.combined for m in messages] == [trade(5), TICKER, trade(70, "ETHUSDT", "2683.80000000"), trade(6)]
    assert messages[0].data == trade(5).partition('"data":')[2][:-1]
    assert [(m.stream, m.symbol, m.channel) for m in messages[1:3]] == [
        ("btcusdt@bookTicker", "BTCUSDT", "bookTicker"),
        ("ethusdt@trade", "ETHUSDT", "trade"),
    ]
    assert messages[0].ts_event_ns == 1_723_161_255_343_000_000
    assert messages[1].ts_event_ns == BASE_NS + 200 * 1_000_000
    assert market.exhausted
    assert not market.behind


@pytest.mark.parametrize(("speed", "factor", "at_300_ms"), [(1.0, 1.0, 4), (2.0, 1.0, 7), (0.5, 1.0, 2), (1.0, 2.0, 7)])
def test_advance_speed_sets_the_pace(tmp_path: Path, speed: float, factor: float, at_300_ms: int) -> None:
    record(tmp_path, "spot_btcusdt_1.gz", [*(trade(n) for n in range(10)), SNAPSHOT])
    market = RecordedMarket(tmp_path, speed=speed)
    market.set_rate_factor(factor)
    assert ids(list(market.advance(1_000, ALL))) == [0]
    assert ids(list(market.advance(1_300, ALL))) == list(range(1, at_300_ms))
    assert ids(list(market.advance(99_999, ALL))) == list(range(at_300_ms, 10))


def test_advance_many_messages_come_in_portions(tmp_path: Path) -> None:
    record(tmp_path, "spot_btcusdt_1.gz", [SNAPSHOT, *(trade(n) for n in range(1_200))], gap_ms=0)
    market = RecordedMarket(tmp_path, speed=0)
    portions = []
    while not market.exhausted:
        portions.append(ids(list(market.advance(0, ALL))))
        assert market.behind is not market.exhausted
    assert [len(portion) for portion in portions] == [499, 500, 201]
    assert [number for portion in portions for number in portion] == list(range(1_200))


def test_advance_only_wanted_streams_but_everything_is_remembered(tmp_path: Path) -> None:
    record(tmp_path, "spot_btcusdt_1.gz", [SNAPSHOT, trade(5), TICKER, trade(6, maker="false")])
    market = RecordedMarket(tmp_path, speed=0)
    assert [m.channel for m in market.advance(0, {"btcusdt@bookTicker"})] == ["bookTicker"]
    assert market.history("BTCUSDT").trades(10) == [
        Trade(5, 6_183_763, 2_000, 1_723_161_255_342, 1, 1),
        Trade(6, 6_183_763, 2_000, 1_723_161_255_342, 0, 2),
    ]


def test_depth_is_the_snapshot_and_what_followed_it(tmp_path: Path) -> None:
    old = depth(8, 10, '[["1.00000000","1.00000000"]]')
    new = depth(
        11, 13, '[["99.00000000","0.00000000"],["98.00000000","5.00000000"]]', '[["100.50000000","7.00000000"]]'
    )
    record(tmp_path, "spot_btcusdt_1.gz", [old, SNAPSHOT, trade(5), new])
    market = RecordedMarket(tmp_path, speed=1)
    before = BookSnapshot(
        10, [("100.00000000", "1.00000000"), ("99.00000000", "2.00000000")], [("101.00000000", "3.00000000")]
    )
    assert market.depth("BTCUSDT", 10) == before
    list(market.advance(0, ALL))
    assert market.depth("BTCUSDT", 10) == before
    list(market.advance(1_000, ALL))
    assert market.depth("BTCUSDT", 10) == BookSnapshot(
        13,
        [("100.00000000", "1.00000000"), ("98.00000000", "5.00000000")],
        [("100.50000000", "7.00000000"), ("101.00000000", "3.00000000")],
    )
    assert market.depth("BTCUSDT", 1).bids == [("100.00000000", "1.00000000")]


def test_history_after_a_hole_in_the_ids_keeps_what_follows(tmp_path: Path) -> None:
    record(tmp_path, "spot_btcusdt_1.gz", [SNAPSHOT, trade(5), trade(9), trade(10)])
    market = RecordedMarket(tmp_path, speed=0)
    list(market.advance(0, ALL))
    assert [item.trade_id for item in market.history("BTCUSDT").trades(10, 0)] == [9, 10]


def test_recordings_wrong_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no recordings in .*ws_binance/spot_\*\.gz"):
        RecordedMarket(tmp_path)


def test_recordings_negative_speed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="speed must be 0"):
        RecordedMarket(tmp_path, speed=-1)


def test_recordings_without_snapshot_are_refused(tmp_path: Path) -> None:
    record(tmp_path, "spot_btcusdt_1.gz", [trade(5)])
    with pytest.raises(ConfigurationError, match="no depth snapshot"):
        RecordedMarket(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"12 {}\n")[:-9], gzip.compress(b"no number {}\n")],
    ids=["not_gzip", "cut_short", "no_number"],  # its own would hold the second at which a worker of pytest began
)
def test_recordings_broken_file_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ws_binance").mkdir()
    (tmp_path / "ws_binance" / "spot_btcusdt_1.gz").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"spot_btcusdt_1\.gz"):
        RecordedMarket(tmp_path)


def test_recordings_line_that_is_no_message_is_shown(tmp_path: Path) -> None:
    record(tmp_path, "spot_btcusdt_1.gz", [SNAPSHOT, trade(5), '{"stream":7}'])
    with pytest.raises(ConfigurationError, match="a line is no spot message"):
        list(RecordedMarket(tmp_path, speed=0).advance(0, ALL))


def test_list_instrument_is_refused(tmp_path: Path) -> None:
    record(tmp_path, "spot_btcusdt_1.gz", [SNAPSHOT, trade(5)])
    with pytest.raises(ConfigurationError, match="recordings are replayed"):
        RecordedMarket(tmp_path).list_instrument(new_listing("NEWUSDT"))
