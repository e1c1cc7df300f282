"""The WebSocket protocol, with a real client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.integration.simulated_venue import RECEIVE_TIMEOUT_S, ask, drain, receive, run, trade_ids, until, venue

CHANNELS = ("trade", "depth@100ms", "depth", "bookTicker", "kline_1m")


def test_stream_combined_wraps_every_channel_with_its_name(tmp_path: Path) -> None:
    async def test() -> None:
        streams = [f"btcusdt@{channel}" for channel in CHANNELS]
        async with venue(tmp_path) as market:
            client = await market.connect("/stream?streams=" + "/".join(streams))
            for _ in range(25):
                market.tick()
            texts = await receive(client, len(market.rows(fate="sent")))
            found = [msgspec.json.decode(text) for text in texts]
            assert {item["stream"] for item in found} == set(streams)
            assert all(list(item) == ["stream", "data"] for item in found)
            assert {item["data"]["s"] for item in found} == {"BTCUSDT"}

    run(test())


def test_ws_raw_stream_sends_bare_payloads(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/ethusdt@trade")
            market.tick(1000)
            found = [msgspec.json.decode(text) for text in await receive(client, 20)]
            assert all(item["e"] == "trade" and item["s"] == "ETHUSDT" for item in found)
            assert [item["t"] for item in found] == list(range(1_000, 1_020))

    run(test())


def test_ledger_says_exactly_what_each_client_received(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            first = await market.connect("/stream?streams=btcusdt@trade")
            second = await market.connect("/ws/btcusdt@trade")
            for _ in range(10):
                market.tick()
            await second.close()
            await until(lambda: len(market.rows(fate="disconnected")) == 1)
            for _ in range(10):
                market.tick()
            await market.server.close()
            received = {"first": trade_ids(await drain(first))}
            names = [row["connection"] for row in market.rows(fate="connected")]
            sent = {name: [row["first_id"] for row in market.rows(connection=name, fate="sent")] for name in names}
            assert received["first"] == sent[names[0]]
            assert len(sent[names[1]]) < len(sent[names[0]])
            assert sent[names[1]] == sent[names[0]][: len(sent[names[1]])]
            row = market.rows(connection=names[0], fate="sent")[0]
            assert (row["symbol"], row["channel"], row["last_id"]) == ("BTCUSDT", "trade", row["first_id"])
            assert row["ts_event_ns"] <= row["ts_sent_ns"]

    run(test())


def test_subscribe_unsubscribe_and_list_change_what_is_sent(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws")
            market.tick(1000)
            request = {"method": "SUBSCRIBE", "params": ["btcusdt@trade", "nosuch@trade"], "id": 1}
            assert await ask(client, request) == {"result": None, "id": 1}
            listed = await ask(client, {"method": "LIST_SUBSCRIPTIONS", "id": "two"})
            assert listed == {"result": ["btcusdt@trade", "nosuch@trade"], "id": "two"}
            market.tick(1000)
            sent = len(market.rows(fate="sent"))
            assert sent > 10
            assert await ask(client, {"method": "UNSUBSCRIBE", "params": ["btcusdt@trade"], "id": 3}) == {
                "result": None,
                "id": 3,
            }
            market.tick(1000)
            assert len(market.rows(fate="sent")) == sent

    run(test())


@pytest.mark.parametrize(
    ("request_text", "code", "words"),
    [
        ("nonsense", 3, "Invalid JSON"),
        ({"method": "SUBSCRIBE", "params": [1], "id": 1}, 2, "must be a string"),
        ({"method": "EXPLODE", "id": 1}, 2, "unknown variant"),
        ({"method": "GET_PROPERTY", "params": ["colour"], "id": 1}, 0, "Unknown property"),
        ({"method": "SET_PROPERTY", "params": ["combined", "yes"], "id": 1}, 1, "expected Boolean"),
        ({"method": "SET_PROPERTY", "params": ["combined", True, 1], "id": 1}, 2, "too many parameters"),
        ({"method": "SUBSCRIBE", "params": ["a@trade", "b@trade", "c@trade"], "id": 1}, 2, "too many parameters"),
    ],
)
def test_request_bad_one_is_answered_and_the_connection_stays(
    tmp_path: Path, request_text: Any, code: int, words: str
) -> None:
    async def test() -> None:
        async with venue(tmp_path, max_streams=2) as market:
            client = await market.connect("/ws/btcusdt@trade")
            answer = await ask(client, request_text)
            assert answer["error"]["code"] == code
            assert words in answer["error"]["msg"]
            assert await ask(client, {"method": "LIST_SUBSCRIPTIONS", "id": 9}) == {
                "result": ["btcusdt@trade"],
                "id": 9,
            }

    run(test())


def test_set_property_combined_changes_the_wrapping(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@trade")
            assert (await ask(client, {"method": "GET_PROPERTY", "params": ["combined"], "id": 1}))["result"] is False
            await ask(client, {"method": "SET_PROPERTY", "params": ["combined", True], "id": 2})
            market.tick(1000)
            assert (await receive(client, 1))[0].startswith('{"stream":"btcusdt@trade","data":{')

    run(test())


@pytest.mark.parametrize(("path", "status"), [("/", 404), ("/api", 404), ("/stream?streams=a/b/c", 400)])
def test_connect_wrong_path_or_too_many_streams_is_refused(tmp_path: Path, path: str, status: int) -> None:
    async def test() -> None:
        async with venue(tmp_path, max_streams=2) as market:
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await market.session.ws_connect(market.ws_url + path)
            assert caught.value.status == status

    run(test())


def test_incoming_more_than_five_a_second_ends_the_connection(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@trade")
            for number in range(5):
                await ask(client, {"method": "LIST_SUBSCRIPTIONS", "id": number})
            market.monotonic_s += 1
            for number in range(5):
                await ask(client, {"method": "LIST_SUBSCRIPTIONS", "id": number})
            await client.send_str('{"method":"LIST_SUBSCRIPTIONS","id":1}')
            message = await client.receive()
            assert message.type == aiohttp.WSMsgType.CLOSE
            assert message.data == aiohttp.WSCloseCode.POLICY_VIOLATION
            assert market.rows(fate="disconnected")[0]["detail"] == "too many requests"

    run(test())


def test_ping_answered_keeps_the_connection_unanswered_ends_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path, ping_interval_s=20, pong_timeout_s=60) as market:
            answers = await market.connect("/ws/btcusdt@trade", autoping=False)
            silent = await market.connect("/ws/btcusdt@trade", autoping=False)
            for _ in range(5):
                market.monotonic_s += 20
                market.server.tick()
                ping = await answers.receive(timeout=30)
                assert ping.type == aiohttp.WSMsgType.PING
                assert ping.data == str(market.now_ms).encode()
                await answers.pong(ping.data)
                await until(
                    lambda: max(item._ponged_ns for item in market.server._connections) == market.monotonic_s * 1e9
                )
            ended = market.rows(fate="disconnected")
            assert [(row["connection"][-2:], row["detail"]) for row in ended] == [("-2", "no pong")]
            assert silent.closed is False
            assert not answers.closed
            await drain(silent)

    run(test())


def test_ping_answered_with_other_bytes_does_not_count(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path, ping_interval_s=20, pong_timeout_s=60) as market:
            client = await market.connect("/ws/btcusdt@trade", autoping=False)
            market.monotonic_s += 20
            market.server.tick()
            assert (await client.receive(timeout=30)).type == aiohttp.WSMsgType.PING
            await client.pong(b"unasked")
            await ask(client, {"method": "LIST_SUBSCRIPTIONS", "id": 1})
            market.monotonic_s += 40
            market.server.tick()
            assert [row["detail"] for row in market.rows(fate="disconnected")] == ["no pong"]

    run(test())


def test_close_client_that_does_not_read_is_cut_off_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.simulator.server._CLOSE_GRACE_S", 0.2)

    async def test() -> None:
        async with venue(tmp_path) as market:
            reader, writer = await asyncio.open_connection("127.0.0.1", market.server.port, limit=1)
            key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13"
            upgrade = "Host: a\r\nUpgrade: websocket\r\nConnection: Upgrade"
            writer.write(f"GET /ws/btcusdt@trade HTTP/1.1\r\n{upgrade}\r\n{key}\r\n\r\n".encode())
            await until(lambda: market.server.connections_total == 1)
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            connection = next(iter(market.server._connections))
            market.server.source.set_rate_factor(50)
            while connection.buffered_bytes < 100_000:
                market.tick()
            await asyncio.wait_for(market.server.close(), RECEIVE_TIMEOUT_S)
            assert [row["detail"] for row in market.rows(fate="disconnected")] == ["server shutdown"]
            writer.transport.abort()

    run(test())


def test_day_old_connection_is_ended_in_good_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path, ping_interval_s=1e9) as market:
            client = await market.connect("/ws/btcusdt@trade")
            market.monotonic_s += 86_399
            market.server.tick()
            assert market.rows(fate="disconnected") == []
            market.monotonic_s += 1
            market.server.tick()
            message = await client.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.GOING_AWAY)
            assert market.rows(fate="disconnected")[0]["detail"] == "24 hours"

    run(test())


def test_client_ping_is_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws", autoping=False)
            await client.ping(b"hello")
            message = await client.receive(timeout=30)
            assert (message.type, bytes(message.data)) == (aiohttp.WSMsgType.PONG, b"hello")

    run(test())


def test_slow_client_is_disconnected_and_memory_stays_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        limit_bytes = 64 * 1024
        async with venue(tmp_path, max_buffer_bytes=limit_bytes, tick_ms=10) as market:
            client = await market.connect("/stream?streams=btcusdt@depth@100ms/btcusdt@trade/btcusdt@bookTicker")
            connection = next(iter(market.server._connections))
            market.server.source.set_rate_factor(20)
            # Nothing is read: the event loop does not run. The socket's own buffers fill first.
            most = 0
            for _ in range(3_000):
                market.tick()
                most = max(most, connection.buffered_bytes)
                if not connection.open:
                    break
            assert not connection.open
            assert market.rows(fate="disconnected")[0]["detail"] == "slow client"
            assert most < limit_bytes + 512 * 1024
            received = await drain(client)
            assert len(received) < len(market.rows(fate="sent"))

    run(test())


def test_start_streams_market_stands_still_until_they_are_listened_to(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path, start_streams=2) as market:
            client = await market.connect("/ws/btcusdt@trade")
            market.tick(1000)
            assert market.rows(fate="sent") == []
            await ask(client, {"method": "SUBSCRIBE", "params": ["ethusdt@trade"], "id": 1})
            market.tick(1000)
            assert trade_ids(await receive(client, 1)) == [1_000]
            await ask(client, {"method": "UNSUBSCRIBE", "params": ["ethusdt@trade"], "id": 2})
            sent = len(market.rows(fate="sent"))
            market.tick(1000)
            assert len(market.rows(fate="sent")) > sent

    run(test())


def test_paused_market_makes_up_for_the_time_when_it_resumes(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            await market.connect("/ws/btcusdt@trade")
            market.server.paused = True
            market.tick(500)
            assert market.rows(fate="sent") == []
            market.server.paused = False
            market.tick(500)
            ids = [row["first_id"] for row in market.rows(fate="sent")]
            assert ids == list(range(1_000, 1_000 + len(ids)))
            assert len(ids) > 10

    run(test())
