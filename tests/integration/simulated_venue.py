"""A simulated venue inside the test's own event loop, whose clocks move only when the test says so."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from streamforge.ledger import LedgerWriter, read_ledger
from streaming.simulator.faults import FaultPlan, parse_fault
from streaming.simulator.instruments import default_instruments
from streaming.simulator.rest import RestServer
from streaming.simulator.server import MarketServer
from streaming.simulator.settings import SimulatorSettings
from streaming.simulator.source import MarketSource
from streaming.simulator.synthetic import SyntheticMarket, SyntheticSettings

START_MS = 1_700_000_040_000
RECEIVE_TIMEOUT_S = 30.0


class Venue:
    """The servers, a client session and the clocks (venue time and monotonic time may move apart)."""

    def __init__(self, source: MarketSource, folder: Path, settings: SimulatorSettings, **server: Any) -> None:
        self.now_ms = START_MS
        self.monotonic_s = 1_000.0
        self.folder = folder
        self.source = source
        self.ledger = LedgerWriter(folder, flush_interval_ms=0)
        self.server = MarketServer(
            source,
            settings,
            faults=FaultPlan(seed=1),
            ledger=self.ledger,
            clock_ns=lambda: self.now_ms * 1_000_000,
            monotonic_ns=lambda: int(self.monotonic_s * 1e9),
            **server,
        )
        self.rest = RestServer(source, settings, self.server.clock_ns)
        self.session = aiohttp.ClientSession()

    @property
    def ws_url(self) -> str:
        """Return the URL of the WebSocket server."""
        return f"ws://127.0.0.1:{self.server.port}"

    async def connect(self, path: str, **options: Any) -> aiohttp.ClientWebSocketResponse:
        """Connect a client; the server knows it when this returns."""
        known = self.server.connections_total
        client: aiohttp.ClientWebSocketResponse = await self.session.ws_connect(self.ws_url + path, **options)
        await until(lambda: self.server.connections_total > known)
        return client

    async def get(self, route: str, **params: Any) -> tuple[int, Any, Mapping[str, str]]:
        """Ask the REST server; return status, JSON body and headers."""
        url = f"http://127.0.0.1:{self.rest.port}/api/v3/{route}"
        async with self.session.get(url, params={name: str(value) for name, value in params.items()}) as response:
            text = await response.read()
            return response.status, msgspec.json.decode(text) if text else None, response.headers

    def fault(self, text: str) -> None:
        """Let something go wrong."""
        self.server.faults.add(parse_fault(text), self.server.monotonic_ns())

    def tick(self, milliseconds: int = 100) -> None:
        """Move both clocks and let the server do what is due."""
        self.now_ms += milliseconds
        self.monotonic_s += milliseconds / 1000
        self.server.tick()

    def rows(self, **equal: Any) -> list[dict[str, Any]]:
        """Return the ledger's rows with these values."""
        self.ledger.flush()
        rows: list[dict[str, Any]] = read_ledger(self.folder).to_pylist()
        return [row for row in rows if all(row[name] == value for name, value in equal.items())]


@asynccontextmanager
async def venue(
    folder: Path,
    *,
    source: MarketSource | None = None,
    start_streams: int = 0,
    ends_with_market: bool = False,
    **settings: Any,
) -> AsyncIterator[Venue]:
    """Run a venue with two busy instruments, or with `source`."""
    market = source or SyntheticMarket(
        default_instruments(2), SyntheticSettings(start_ms=START_MS, trades_per_s=40, first_id=1_000)
    )
    made = Venue(
        market,
        folder,
        SimulatorSettings(_env_file=None, **{f"simulator_{name}": value for name, value in settings.items()}),  # type: ignore[call-arg]
        start_streams=start_streams,
        ends_with_market=ends_with_market,
    )
    try:
        await made.server.start()
        await made.rest.start()
        yield made
    finally:
        await made.session.close()
        await made.rest.close()
        await made.server.close()


async def until(condition: Callable[[], Any]) -> None:
    """Let the event loop run until the condition holds."""
    async with asyncio.timeout(RECEIVE_TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - the condition is about state that has no event
            await asyncio.sleep(0)


async def receive(client: aiohttp.ClientWebSocketResponse, count: int) -> list[str]:
    """Return the next `count` texts."""
    return [await client.receive_str(timeout=RECEIVE_TIMEOUT_S) for _ in range(count)]


async def drain(client: aiohttp.ClientWebSocketResponse) -> list[str]:
    """Return every text until the connection ends."""
    async with asyncio.timeout(RECEIVE_TIMEOUT_S):
        return [message.data async for message in client]


async def ask(client: aiohttp.ClientWebSocketResponse, request: object) -> Any:
    """Send a request and return the answer, with whatever came before it left out."""
    await client.send_str(request if isinstance(request, str) else msgspec.json.encode(request).decode())
    while True:
        answer = msgspec.json.decode((await receive(client, 1))[0])
        if "id" in answer and ("result" in answer or "error" in answer):
            return answer


def ids_by_fate(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return the first ids of rows by their fate, in the ledger's order."""
    found: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        found[row["fate"]].append(row["first_id"])
    return dict(found)


def trade_ids(texts: list[str]) -> list[int]:
    """Return the trade ids of raw or combined trade messages."""
    found = [msgspec.json.decode(text) for text in texts]
    return [(item.get("data") or item)["t"] for item in found]


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run an asynchronous test."""
    asyncio.run(test)
