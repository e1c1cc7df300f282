"""The real recordings through the real servers: every message comes out byte for byte, and REST agrees."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import msgspec

from streaming.simulator.recordings import RecordedMarket
from tests.integration.simulated_venue import Venue, run, trade_ids, venue
from tests.recordings import RECORDINGS_DIR, needs_recordings

pytestmark = needs_recordings

SYMBOLS = ("btcusdt", "ethusdt")
CHANNELS = ("trade", "depth@100ms", "bookTicker")


def recorded(symbol: str, channel: str) -> list[str]:
    """Return the texts of one stream, read without the simulator's code."""
    found = []
    for file in sorted((RECORDINGS_DIR / "ws_binance").glob(f"spot_{symbol}_*.gz")):
        with gzip.open(file, "rt") as lines:
            texts = (line.rstrip("\n").partition(" ")[2] for line in lines)
            found += [text for text in texts if text.startswith(f'{{"stream":"{symbol}@{channel}"')]
    return found


async def pump(market: Venue) -> None:
    while not market.source.exhausted:
        market.server.tick()
        await asyncio.sleep(0)
    await market.server.close()


def test_recorded_messages_come_out_byte_for_byte(tmp_path: Path) -> None:
    async def test() -> None:
        source = RecordedMarket(RECORDINGS_DIR, speed=0)
        async with venue(tmp_path, source=source, start_streams=1, resume_buffer_bytes=1024) as market:
            streams = [f"{symbol}@{channel}" for symbol in SYMBOLS for channel in CHANNELS]
            client = await market.connect("/stream?streams=" + "/".join(streams))
            raw = await market.connect("/ws/btcusdt@trade")
            received: dict[str, list[str]] = {stream: [] for stream in streams}

            async def read() -> None:
                async for message in client:
                    received[msgspec.json.decode(message.data)["stream"]].append(message.data)

            async def read_raw() -> list[str]:
                return [message.data async for message in raw]

            _, _, bare = await asyncio.gather(pump(market), read(), read_raw())
            for symbol in SYMBOLS:
                for channel in CHANNELS:
                    assert received[f"{symbol}@{channel}"] == recorded(symbol, channel)
            assert [f'{{"stream":"btcusdt@trade","data":{text}}}' for text in bare] == received["btcusdt@trade"]
            sent = len(market.rows(fate="sent"))
            assert sent == sum(map(len, received.values())) + len(bare)

    run(test())


def test_ends_with_market_stops_once_everything_was_taken(tmp_path: Path) -> None:
    async def test() -> None:
        source = RecordedMarket(RECORDINGS_DIR, speed=0)
        async with venue(tmp_path, source=source, start_streams=1, ends_with_market=True) as market:
            client = await market.connect("/ws/ethusdt@trade")
            running = asyncio.create_task(market.server.run())
            received = [await client.receive_str(timeout=60) for _ in recorded("ethusdt", "trade")]
            assert trade_ids(received) == trade_ids(recorded("ethusdt", "trade"))
            await asyncio.wait_for(running, 60)

    run(test())


def test_rest_agrees_with_the_recorded_messages(tmp_path: Path) -> None:
    async def test() -> None:
        source = RecordedMarket(RECORDINGS_DIR, speed=0)
        async with venue(tmp_path, source=source) as market:
            for _ in range(40):
                market.server.tick()
            _, trades, _ = await market.get("historicalTrades", symbol="BTCUSDT", fromId=0, limit=1000)
            expected = [msgspec.json.decode(text)["data"] for text in recorded("btcusdt", "trade")[: len(trades)]]
            assert len(trades) > 500
            assert [(t["id"], t["price"], t["qty"], t["time"], t["isBuyerMaker"]) for t in trades] == [
                (t["t"], t["p"], t["q"], t["T"], t["m"]) for t in expected
            ]
            _, book, _ = await market.get("depth", symbol="BTCUSDT", limit=1)
            deltas = [msgspec.json.decode(text)["data"] for text in recorded("btcusdt", "depth@100ms")]
            assert book["lastUpdateId"] in {delta["u"] for delta in deltas}
            _, info, _ = await market.get("exchangeInfo")
            assert [item["symbol"] for item in info["symbols"]] == ["BTCUSDT", "ETHUSDT"]

    run(test())


def test_recorded_book_agrees_with_the_recorded_best_prices() -> None:
    source = RecordedMarket(RECORDINGS_DIR, speed=0)
    compared = 0
    tops: dict[int, tuple[str, str]] = {}
    while compared < 200 and not source.exhausted:
        for message in source.advance(0, {"btcusdt@bookTicker", "btcusdt@depth@100ms"}):
            payload = msgspec.json.decode(message.data)
            if message.channel == "bookTicker":
                tops[payload["u"]] = (payload["b"], payload["a"])
                continue
            # A depth message ends at u: the last ticker at or before u shows the same best prices.
            at = max((update for update in tops if update <= payload["u"]), default=None)
            book = source.depth("BTCUSDT", 1)
            if at is None or book.last_update_id != payload["u"]:
                continue
            compared += 1
            assert (book.bids[0][0], book.asks[0][0]) == tops[at]
            tops = {update: top for update, top in tops.items() if update >= at}
    assert compared >= 200
