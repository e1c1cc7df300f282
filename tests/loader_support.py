"""A small venue that speaks Binance's protocol, and the loader as a real process: what loader tests share."""

# ruff: noqa: D102, PYI034, ASYNC110 - overrides need no words; the thread's own loop waits for its clients to go

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
from confluent_kafka import Message
from picows import (
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
    ws_create_server,
)

from streamforge.contracts import Contracts
from streamforge.events import Command, CommandKind, ProcessEvent
from streamforge.kafka import admin_client, describe_topics
from streamforge.log_reader import log_ends, log_starts, read_range
from streamforge.market.gaps import GapSpan
from streamforge.market.records import MarketGap
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import send_command
from streaming.loaders.base import LOADER_KIND, LoaderSettings
from streaming.loaders.binance import Binance
from streaming.loaders.loader import LoadReport, load
from streaming.loaders.plan import LoadRequest
from streaming.loaders.sink import topic_name
from tests.forked import Forked, streamforge
from tests.waiting import wait_until

LOADER_CONTRACTS = ("raw-trades", "raw-depth", "market-gaps", "queue-events", "queue-control")
QUICK = {"report_interval_s": 0.2, "backoff_initial_s": 0.05, "backoff_max_s": 1.0}


def trade_frame(trade_id: int, *, symbol: str = "BTCUSDT", pad_bytes: int = 0) -> bytes:
    """Return a combined-stream frame of one trade; the padding is random, so that it does not compress."""
    pad = f',"pad":"{os.urandom(pad_bytes // 2).hex()}"' if pad_bytes else ""
    return (
        f'{{"stream":"{symbol.lower()}@trade","data":{{"e":"trade","E":1723161255208,"s":"{symbol}","t":{trade_id},'
        f'"p":"61837.63000000","q":"0.00100000","T":1723161255207,"m":true,"M":true{pad}}}}}'
    ).encode()


def depth_frame(first: int, last: int, *, symbol: str = "BTCUSDT") -> bytes:
    """Return a combined-stream frame of one depth update."""
    return (
        f'{{"stream":"{symbol.lower()}@depth@100ms","data":{{"e":"depthUpdate","E":1723161255208,"s":"{symbol}",'
        f'"U":{first},"u":{last},"b":[["61737.63000000","0.00000000"]],"a":[]}}}}'
    ).encode()


class _Client(WSListener):
    def __init__(self, venue: SmallVenue) -> None:
        super().__init__()
        self.venue = venue
        self.subscribed: list[str] = []

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport
        self.venue.clients.append(self)
        self.venue.connections += 1

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type is WSMsgType.TEXT:
            request = msgspec.json.decode(frame.get_payload_as_bytes())
            transport.send(WSMsgType.TEXT, msgspec.json.encode({"result": None, "id": request["id"]}))
            self.subscribed += request["params"]
        elif frame.msg_type is WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.venue.clients.remove(self)


class Urls(Protocol):
    """Where a venue listens."""

    @property
    def ws_url(self) -> str:
        """Return the base URL of its WebSocket streams."""

    @property
    def rest_url(self) -> str:
        """Return the base URL of its REST interface."""


class SmallVenue:
    """WebSocket and `/api/v3/exchangeInfo` on one loopback port, in a thread, told what to send by the test."""

    def __init__(self, symbols: Iterable[str] = ("BTCUSDT", "ETHUSDT")) -> None:
        self.symbols = list(symbols)
        self.clients: list[_Client] = []
        self.connections = 0
        self.refuse_rest: list[tuple[int, Mapping[str, str]]] = []
        self.rest_calls: list[float] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._call(ws_create_server(self._accept, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])

    def __enter__(self) -> SmallVenue:
        return self

    def __exit__(self, *_exc: object) -> None:
        async def end() -> None:
            self._server.close()
            for client in [*self.clients]:
                client.transport.disconnect(graceful=False)
            while self.clients:
                await asyncio.sleep(0)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def rest_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(self, *frames: bytes) -> None:
        """Send text frames to everyone who listens."""

        async def go() -> None:
            for client in self.clients:
                for frame in frames:
                    client.transport.send(WSMsgType.TEXT, frame)

        self._call(go())

    def send_in_parts(self, *parts: bytes) -> None:
        """Send one message in several WebSocket frames."""

        async def go() -> None:
            for client in self.clients:
                for number, part in enumerate(parts):
                    kind = WSMsgType.TEXT if number == 0 else WSMsgType.CONTINUATION
                    client.transport.send(kind, part, fin=number == len(parts) - 1)

        self._call(go())

    def drop(self) -> None:
        """Drop every connection without a word."""

        async def go() -> None:
            for client in [*self.clients]:
                client.transport.disconnect(graceful=False)

        self._call(go())

    def wait_subscribed(self, streams: int, *, connections: int = 1) -> None:
        """Wait until the `connections`-th connection listens to `streams` streams."""
        wait_until(
            lambda: (
                self.connections >= connections and sum(len(client.subscribed) for client in self.clients) >= streams
            ),
            what=f"{streams} streams subscribed on connection {connections}",
        )

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def _accept(self, request: WSUpgradeRequest) -> Any:
        if not request.path.startswith(b"/api/v3/exchangeInfo"):
            return _Client(self)
        self.rest_calls.append(time.monotonic())
        if self.refuse_rest:
            status, headers = self.refuse_rest.pop(0)
            response = WSUpgradeResponse.create_error_response(status, b"slow down", dict(headers))
        else:
            symbols = [
                {"symbol": name, "status": "TRADING", "baseAsset": name[:-4], "quoteAsset": name[-4:]}
                for name in self.symbols
            ]
            response = WSUpgradeResponse.create_ok_response(msgspec.json.encode({"symbols": symbols}))
        return WSUpgradeResponseWithListener(response, None)


@dataclass
class LoaderProcess:
    """`streamforge load` as a process of its own."""

    settings: Settings
    venue_urls: tuple[str, str]
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    process: Forked | None = None

    def __enter__(self) -> LoaderProcess:
        ws_url, rest_url = self.venue_urls
        command = ["load", "--venue", "SIM", "--ws-url", ws_url, "--rest-url", rest_url, "--output", "json"]
        self.settings.home_path.mkdir(parents=True, exist_ok=True)
        self.log = self.settings.home_path / f"loader-{time.time_ns()}.log"
        variables = loader_environment(self.settings) | dict(self.environment)
        self.process = streamforge([*command, *self.arguments], variables, log=self.log)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.running.end()

    @property
    def running(self) -> Forked:
        assert self.process is not None
        return self.process

    def stop(self, *, timeout_s: float = 40.0) -> str:
        """Send SIGTERM and return what it wrote; fail when it does not end with exit code 0."""
        self.running.send_signal(signal.SIGTERM)
        code = self.running.wait(timeout_s)
        assert code == 0, self.output()
        return self.output()

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self.running.kill()
        self.running.wait()

    def output(self) -> str:
        assert self.log is not None
        return self.log.read_text(encoding="utf-8", errors="replace")


class LoaderThread:
    """A loader in a thread of the test's process: quicker to start, the same but for signals."""

    def __init__(self, settings: Settings, contracts: Contracts, venue: Urls, **request: Any) -> None:
        self.settings = LoaderSettings(
            _env_file=None,  # type: ignore[call-arg]
            home=settings.home,
            topic_prefix=settings.topic_prefix,
            bootstrap_servers=settings.bootstrap_servers,
            **{f"loader_{name}": value for name, value in (QUICK | request.pop("tuning", {})).items()},
        )
        self.contracts = contracts
        self.request = LoadRequest(
            venue=Binance("SIM"),
            websocket_url=venue.ws_url,
            rest_url=venue.rest_url,
            **({"symbols": ("BTCUSDT",), "channels": ("trade", "depth@100ms")} | request),
        )
        self.outcome: Future[LoadReport] = Future()
        self._began_ns = time.time_ns()
        self._is_started = False

    def __enter__(self) -> LoaderThread:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self.outcome.done():
            self.tell(CommandKind.STOP)
        self.thread.join(60)

    def tell(self, command: CommandKind) -> Command:
        """Write a command to queue-control, once the loader has said that it is there (it obeys no older ones)."""
        if not self._is_started:
            wait_until(self._has_spoken, what="the loader says that it is there")
            self._is_started = True
        return send_command(self.settings, self.contracts, target=LOADER_KIND, command=command, issued_by="test")

    def _has_spoken(self) -> bool:
        events = read_events(self.settings, self.contracts)
        return self.outcome.done() or any(event.ts_ns >= self._began_ns for event in events)

    def stop(self) -> LoadReport:
        """Stop it by a command and return its report."""
        self.tell(CommandKind.STOP)
        return self.outcome.result(60)

    def _run(self) -> None:
        try:
            self.outcome.set_result(asyncio.run(load(self.settings, self.contracts, self.request, stop_signals=())))
        except BaseException as error:  # noqa: BLE001 - it is raised in the test's thread
            self.outcome.set_exception(error)


def loader_environment(settings: Settings) -> dict[str, str]:
    """Return the environment of a loader on the platform of `settings`, quick to report and reconnect."""
    return os.environ | {
        "STREAMFORGE_HOME": str(settings.home_path),
        "STREAMFORGE_TOPIC_PREFIX": settings.topic_prefix,
        "STREAMFORGE_BOOTSTRAP_SERVERS": settings.bootstrap_servers or "",
        **{f"STREAMFORGE_LOADER_{name.upper()}": str(value) for name, value in QUICK.items()},
    }


def read_topic(settings: Settings, contracts: Contracts, contract_id: str) -> list[Message]:
    """Return every record of a topic; those of one topic-partition are in offset order."""
    name = topic_name(contracts, contract_id)
    found = describe_topics(admin_client(settings), [name])[name]
    partitions = [TopicPartition(name, number) for number in range(found.partitions)]
    batches = read_range(settings, log_starts(settings, partitions), log_ends(settings, partitions))
    return [message for batch in batches for message in batch]


def read_gaps(settings: Settings, contracts: Contracts) -> list[MarketGap]:
    """Return the ledger of gaps."""
    decode = msgspec.json.Decoder(MarketGap).decode
    return [decode(message.value() or b"") for message in read_topic(settings, contracts, "market-gaps")]


def read_events(settings: Settings, contracts: Contracts) -> list[ProcessEvent]:
    """Return what processes said."""
    decode = msgspec.json.Decoder(ProcessEvent).decode
    return [decode(message.value() or b"") for message in read_topic(settings, contracts, "queue-events")]


def header(message: Message, name: str) -> str:
    """Return one header as text."""
    value = dict(message.headers() or ())[name]
    assert isinstance(value, bytes)
    return value.decode()


def ids_in_raw(settings: Settings, contracts: Contracts, *, symbol: str = "BTCUSDT") -> set[int]:
    """Return the trade ids that raw has of a symbol."""
    start = f'{{"stream":"{symbol.lower()}@trade"'.encode()
    values = [message.value() for message in read_topic(settings, contracts, "raw-trades")]
    found = set()
    for value in values:
        assert isinstance(value, bytes)
        if value.startswith(start):
            found.add(msgspec.json.decode(value)["data"]["t"])
    return found


def outside_of_gaps(lacking: Iterable[int], gaps: Iterable[MarketGap]) -> list[int]:
    """Return the ids of `lacking` that lie inside no gap."""
    spans = [
        GapSpan(gap.kind, gap.ts_start_ns, gap.ts_end_ns, _number(gap.id_before), _number(gap.id_after)) for gap in gaps
    ]
    return [number for number in sorted(lacking) if not any(span.covers(number, number) for span in spans)]


def wait_for_records(settings: Settings, contracts: Contracts, contract_id: str, count: int) -> list[Message]:
    """Wait until a topic has `count` records and return them."""

    def enough() -> list[Message] | None:
        found = read_topic(settings, contracts, contract_id)
        return found if len(found) >= count else None

    return wait_until(enough, what=f"{count} records in {contract_id}")


def wait_for_gap(settings: Settings, contracts: Contracts, is_wanted: Callable[[MarketGap], bool]) -> MarketGap:
    """Wait until the ledger has a gap that `is_wanted` and return the first."""
    return wait_until(
        lambda: next((gap for gap in read_gaps(settings, contracts) if is_wanted(gap)), None), what="the gap wanted"
    )


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
