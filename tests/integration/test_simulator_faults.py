"""Each fault, as a client sees it and as the ledger says it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.integration.simulated_venue import drain, ids_by_fate, receive, run, trade_ids, venue


def test_fault_drop_the_client_misses_what_the_ledger_says_was_dropped(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@trade")
            market.fault("drop:count=3")
            market.tick(1000)
            fates = ids_by_fate(market.rows(channel="trade"))
            assert fates["dropped"] == [1_000, 1_001, 1_002]
            received = trade_ids(await receive(client, len(fates["sent"])))
            assert received == fates["sent"] == list(range(1_003, 1_003 + len(received)))

    run(test())


def test_fault_double_the_client_gets_the_same_bytes_twice(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@trade")
            market.fault("double:count=2")
            market.tick(1000)
            texts = await receive(client, 5)
            assert texts[0] == texts[1]
            assert texts[2] == texts[3]
            assert trade_ids(texts) == [1_000, 1_000, 1_001, 1_001, 1_002]
            assert ids_by_fate(market.rows(channel="trade"))["doubled"] == [1_000, 1_001]

    run(test())


def test_fault_reorder_a_message_comes_behind_the_next(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@trade")
            market.fault("reorder")
            market.tick(1000)
            assert trade_ids(await receive(client, 4)) == [1_001, 1_000, 1_002, 1_003]
            rows = market.rows(channel="trade")
            assert [(row["first_id"], row["fate"]) for row in rows[:3]] == [
                (1_001, "sent"),
                (1_000, "reordered"),
                (1_002, "sent"),
            ]

    run(test())


def test_fault_reorder_held_message_is_dropped_when_the_connection_ends(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/btcusdt@trade")
            market.fault("reorder:count=1000000")
            while not market.rows(channel="trade") and not next(iter(market.server._connections)).held:
                market.tick(1)
            market.fault("disconnect")
            market.tick(1)
            received = trade_ids(await drain(client))
            fates = ids_by_fate(market.rows(channel="trade"))
            assert fates["dropped"] == [1_000]
            assert received == []

    run(test())


def test_fault_malformed_the_client_gets_no_json(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/stream?streams=btcusdt@trade")
            market.fault("malformed")
            market.tick(1000)
            first, second = await receive(client, 2)
            assert first.startswith('{"stream":"btcusdt@trade"')
            with pytest.raises(msgspec.DecodeError):
                msgspec.json.decode(first)
            assert trade_ids([second]) == [1_001]
            assert ids_by_fate(market.rows(channel="trade"))["malformed"] == [1_000]

    run(test())


def test_fault_only_for_one_symbol_and_channel_leaves_the_rest_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            await market.connect("/stream?streams=btcusdt@trade/ethusdt@trade/btcusdt@depth@100ms")
            market.fault("drop:ratio=1,symbol=BTCUSDT,channel=trade")
            market.tick(1000)
            dropped = market.rows(fate="dropped")
            assert {(row["symbol"], row["channel"]) for row in dropped} == {("BTCUSDT", "trade")}
            sent = market.rows(fate="sent")
            assert {(row["symbol"], row["channel"]) for row in sent} == {
                ("ETHUSDT", "trade"),
                ("BTCUSDT", "depth@100ms"),
            }

    run(test())


def test_fault_disconnect_ends_every_connection_without_a_close_frame(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            clients = [await market.connect("/ws/btcusdt@trade") for _ in range(2)]
            market.tick(500)
            sent = {row["connection"]: 0 for row in market.rows(fate="connected")}
            for row in market.rows(fate="sent"):
                sent[row["connection"]] += 1
            market.fault("disconnect")
            market.tick(1)
            received = [await drain(client) for client in clients]
            assert [len(texts) for texts in received] == list(sent.values())
            assert [client.close_code for client in clients] == [1006, 1006]
            assert [row["detail"] for row in market.rows(fate="disconnected")] == ["fault", "fault"]
            again = await market.connect("/ws/btcusdt@trade")
            market.tick(500)
            first_missed = max(trade_ids(received[0])) + 1
            assert trade_ids(await receive(again, 1))[0] >= first_missed

    run(test())


def test_fault_disconnect_with_count_ends_the_oldest_only(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            clients = [await market.connect("/ws/btcusdt@trade") for _ in range(3)]
            market.fault("disconnect:count=2")
            market.tick(1)
            ended = [row["connection"][-2:] for row in market.rows(fate="disconnected")]
            assert ended == ["-1", "-2"]
            assert len(clients) == 3

    run(test())


def test_fault_stall_the_connection_stays_open_and_silent(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path, ping_interval_s=1, pong_timeout_s=1e9) as market:
            client = await market.connect("/ws/btcusdt@trade", autoping=False)
            market.fault("stall:duration_s=2")
            for _ in range(20):
                market.tick()
            fates = ids_by_fate(market.rows(channel="trade"))
            assert list(fates) == ["stalled"]
            market.tick(1000)
            fates = ids_by_fate(market.rows(channel="trade"))
            assert fates["sent"][0] == fates["stalled"][-1] + 1
            kinds = [(await client.receive(timeout=30)).type.name for _ in range(4)]
            assert "PING" in kinds[:2], "pings go on while the data stalls"
            assert market.rows(fate="disconnected") == []

    run(test())


def test_fault_rate_makes_the_market_busier_for_its_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            await market.connect("/ws/btcusdt@trade")
            counts = []
            for fault in (None, "rate:factor=20,duration_s=2", None):
                before = len(market.rows(fate="sent"))
                if fault:
                    market.fault(fault)
                for _ in range(21):
                    market.tick()
                counts.append(len(market.rows(fate="sent")) - before)
            assert counts[1] > 8 * counts[0]
            assert counts[1] > 8 * counts[2]

    run(test())


def test_fault_listing_appears_in_exchange_info_rest_and_streams(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            client = await market.connect("/ws/newusdt@trade")
            market.tick(1000)
            assert (await market.get("depth", symbol="NEWUSDT"))[0] == 400
            market.fault("listing:symbol=NEWUSDT")
            market.tick(1000)
            market.tick(1000)
            _, info, _ = await market.get("exchangeInfo")
            assert [item["symbol"] for item in info["symbols"]] == ["BTCUSDT", "ETHUSDT", "NEWUSDT"]
            assert (await market.get("depth", symbol="NEWUSDT"))[0] == 200
            assert msgspec.json.decode((await receive(client, 1))[0])["s"] == "NEWUSDT"
            market.fault("listing:symbol=NEWUSDT")
            market.tick(1000)

    run(test())


def test_fault_clear_ends_stall_and_drops(tmp_path: Path) -> None:
    async def test() -> None:
        async with venue(tmp_path) as market:
            await market.connect("/ws/btcusdt@trade")
            market.fault("stall:duration_s=1000")
            market.fault("drop:ratio=1")
            market.tick(1000)
            assert market.rows(fate="sent") == []
            market.fault("clear")
            market.tick(1000)
            assert len(market.rows(fate="sent")) > 10

    run(test())
