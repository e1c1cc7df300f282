"""Each REST route, and each way to ask wrongly."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.integration.simulated_venue import START_MS, receive, run, trade_ids, venue


def test_time_and_ping_and_weight_header(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            market.tick(1234)
            assert (await market.get("ping"))[:2] == (200, {})
            status, body, headers = await market.get("time")
            assert (status, body) == (200, {"serverTime": START_MS + 1234})
            assert headers["X-MBX-USED-WEIGHT-1M"] == "2"
            _, _, headers = await market.get("depth", symbol="BTCUSDT", limit=5000)
            assert headers["X-MBX-USED-WEIGHT-1M"] == "252"

    run(test())


def test_exchange_info_all_one_and_some(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            for params, expected in (
                ({}, ["BTCUSDT", "ETHUSDT"]),
                ({"symbol": "ETHUSDT"}, ["ETHUSDT"]),
                ({"symbols": '["ETHUSDT","BTCUSDT"]'}, ["ETHUSDT", "BTCUSDT"]),
            ):
                status, body, _ = await market.get("exchangeInfo", **params)
                assert status == 200
                assert [item["symbol"] for item in body["symbols"]] == expected
                assert list(body) == ["timezone", "serverTime", "rateLimits", "exchangeFilters", "symbols"]

    run(test())


def test_depth_snapshot_and_streamed_deltas_give_the_later_snapshot(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@depth@100ms")
            market.tick(350)
            _, snapshot, _ = await market.get("depth", symbol="BTCUSDT", limit=5000)
            for _ in range(20):
                market.tick(33)
            market.tick(-(market.now_ms % -100))
            _, later, _ = await market.get("depth", symbol="BTCUSDT", limit=5000)
            book = {"b": dict(snapshot["bids"]), "a": dict(snapshot["asks"])}
            applied = 0
            for text in await receive(client, len(market.rows(fate="sent"))):
                delta = msgspec.json.decode(text)
                if delta["u"] <= snapshot["lastUpdateId"]:
                    continue
                applied += 1
                for side, levels in book.items():
                    levels.update(delta[side])
                    book[side] = {price: size for price, size in levels.items() if Decimal(size)}
            assert applied > 5
            assert book["b"] == dict(later["bids"])
            assert book["a"] == dict(later["asks"])
            _, short, _ = await market.get("depth", symbol="BTCUSDT", limit=3)
            assert short["bids"] == later["bids"][:3]

    run(test())


def test_historical_trades_from_id_returns_what_a_client_missed(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@trade")
            market.fault("drop:count=10")
            market.tick(1000)
            missed = [row["first_id"] for row in market.rows(fate="dropped")]
            status, found, _ = await market.get("historicalTrades", symbol="BTCUSDT", fromId=missed[0], limit=11)
            assert status == 200
            assert [trade["id"] for trade in found[:10]] == missed
            first = msgspec.json.decode((await receive(client, 1))[0])
            last = found[10]
            assert (last["id"], last["price"], last["qty"], last["time"], last["isBuyerMaker"]) == (
                first["t"],
                first["p"],
                first["q"],
                first["T"],
                first["m"],
            )

    run(test())


def test_trades_without_from_id_are_the_latest(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@trade")
            market.tick(1000)
            ids = trade_ids(await receive(client, len(market.rows(fate="sent"))))
            for route in ("trades", "historicalTrades"):
                _, found, _ = await market.get(route, symbol="BTCUSDT", limit=5)
                assert [trade["id"] for trade in found] == ids[-5:]

    run(test())


def test_aggregate_trades_sum_up_the_trades(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            market.tick(1000)
            market.tick(1000)
            _, trades, _ = await market.get("historicalTrades", symbol="BTCUSDT", fromId=0, limit=1000)
            _, found, _ = await market.get("aggTrades", symbol="BTCUSDT", fromId=0, limit=1000)
            assert [item["a"] for item in found] == list(range(1_000, 1_000 + len(found)))
            assert sum(item["l"] - item["f"] + 1 for item in found) == len(trades)
            assert sum(Decimal(item["q"]) for item in found) == sum(Decimal(trade["qty"]) for trade in trades)
            middle = found[len(found) // 2]
            _, later, _ = await market.get("aggTrades", symbol="BTCUSDT", startTime=middle["T"], limit=1000)
            assert later == [item for item in found if item["T"] >= middle["T"]]

    run(test())


def test_klines_of_one_and_of_several_minutes_sum_up_the_trades(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            for _ in range(190):
                market.tick(1000)
            _, minutes, _ = await market.get("klines", symbol="BTCUSDT", interval="1m")
            _, fives, _ = await market.get("klines", symbol="BTCUSDT", interval="5m")
            assert len(minutes) == 4
            assert sum(kline[8] for kline in minutes) == sum(kline[8] for kline in fives)
            assert [kline[0] % 300_000 for kline in fives] == [0] * len(fives)
            _, last, _ = await market.get("klines", symbol="BTCUSDT", interval="1m", limit=2)
            assert last == minutes[-2:]
            _, first, _ = await market.get("klines", symbol="BTCUSDT", interval="1m", startTime=START_MS, limit=1)
            assert first == minutes[:1]

    run(test())


@pytest.mark.parametrize(
    ("route", "params", "code", "words"),
    [
        ("depth", {}, -1102, "Mandatory parameter 'symbol' was not sent"),
        ("depth", {"symbol": ""}, -1102, "Mandatory parameter 'symbol'"),
        ("depth", {"symbol": "NOSUCH"}, -1121, "Invalid symbol."),
        ("trades", {"symbol": "btcusdt"}, -1100, "Illegal characters found in parameter 'symbol'"),
        ("depth", {"symbol": "BTCUSDT", "limit": "ten"}, -1100, "Illegal characters found in parameter 'limit'"),
        ("depth", {"symbol": "BTCUSDT", "limit": "-1"}, -1100, "Illegal characters found in parameter 'limit'"),
        ("depth", {"symbol": "BTCUSDT", "limit": 0}, -1130, "Data sent for parameter 'limit' is not valid."),
        ("trades", {"symbol": "BTCUSDT", "limit": 0}, -1130, "Data sent for parameter 'limit' is not valid."),
        ("trades", {"symbol": "BTCUSDT", "limit": ""}, -1105, "Parameter 'limit' was empty."),
        ("trades", {"symbol": "BTCUSDT", "fromId": 1}, -1101, "Too many parameters; expected '2' and received '2'."),
        ("ping", {"symbol": "BTCUSDT"}, -1101, "Too many parameters; expected '0' and received '1'."),
        ("klines", {"symbol": "BTCUSDT"}, -1102, "Mandatory parameter 'interval'"),
        ("klines", {"symbol": "BTCUSDT", "interval": "2m"}, -1120, "Invalid interval."),
        ("historicalTrades", {"symbol": "BTCUSDT", "fromId": "x"}, -1100, "parameter 'fromId'"),
        ("aggTrades", {"symbol": "BTCUSDT", "fromId": 1, "startTime": 1}, -1128, "Combination of optional parameters"),
        ("exchangeInfo", {"symbol": "NOSUCH"}, -1121, "Invalid symbol."),
        ("exchangeInfo", {"symbols": "BTCUSDT"}, -1100, "parameter 'symbols'"),
    ],
)
def test_route_asked_wrongly_answers_the_venue_error(
    tmp_path: Path, route: str, params: dict[str, Any], code: int, words: str
) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            status, body, headers = await market.get(route, **params)
            assert status == 400
            assert list(body) == ["code", "msg"]
            assert body["code"] == code
            assert words in body["msg"]
            assert "X-MBX-USED-WEIGHT-1M" in headers

    run(test())


def test_unknown_route_is_not_found(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            response = await market.session.get(f"http://127.0.0.1:{market.rest.port}/api/v3/nosuch")
            assert response.status == 404

    run(test())


def test_too_much_weight_is_429_with_retry_after_then_418_then_served_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path, weight_limit=50, ban_after=2, ban_s=90) as market:
            assert (await market.get("trades", symbol="BTCUSDT"))[0] == 200
            assert (await market.get("trades", symbol="BTCUSDT"))[0] == 200
            for _ in range(2):
                status, body, headers = await market.get("ping")
                assert (status, body["code"]) == (429, -1003)
                assert "current limit is 50 request weight per 1 MINUTE" in body["msg"]
                assert 1 <= int(headers["Retry-After"]) <= 61
            status, body, headers = await market.get("ping")
            assert (status, body["code"]) == (418, -1003)
            assert f"IP banned until {market.now_ms + 90_000}." in body["msg"]
            market.now_ms += 89_000
            assert (await market.get("ping"))[0] == 418
            market.now_ms += 2_000
            assert (await market.get("ping"))[0] == 200

    run(test())
