"""The WebSocket server: moves the market, sends each message to who listens, and writes the ledger.

Everything runs on one asyncio thread. In one tick, without giving up the thread, the market is moved, each
message is given its fate and its ledger row, and the frames are handed to the transports. So a row says
what happened: nothing can come between it and its send.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from urllib.parse import parse_qs, unquote, urlsplit

import structlog
from picows import WSCloseCode, WSUpgradeRequest, WSUpgradeResponse, WSUpgradeResponseWithListener, ws_create_server

from streamforge.errors import ConfigurationError
from streamforge.ledger import Fate, LedgerWriter
from streaming.simulator.connection import Connection, text_frame
from streaming.simulator.faults import Fault, FaultKind, FaultPlan
from streaming.simulator.instruments import new_listing
from streaming.simulator.protocol import combined
from streaming.simulator.settings import SimulatorSettings
from streaming.simulator.source import MarketSource, Message

_LOG = structlog.get_logger("streamforge.simulator")
_NS_PER_S = 1_000_000_000
_NS_PER_MS = 1_000_000
_DEFAULT_STALL_S = 5.0
_CLOSE_GRACE_S = 5.0


class MarketServer:
    """Serve one market to any number of WebSocket clients.

    Args:
        source: the market.
        settings: the venue's limits and times.
        faults: what goes wrong on purpose.
        ledger: where it is written down; none keeps no ledger.
        start_streams: the market stands still until so many different streams are listened to.
        max_messages: stop after so many messages, counted as handed to connections.
        ends_with_market: stop when the market will never send again and every client has taken everything.
        clock_ns: venue time and ledger times.
        monotonic_ns: ages, pings, stalls and rates.
    """

    def __init__(
        self,
        source: MarketSource,
        settings: SimulatorSettings,
        *,
        faults: FaultPlan | None = None,
        ledger: LedgerWriter | None = None,
        start_streams: int = 0,
        max_messages: int | None = None,
        ends_with_market: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.source = source
        self.settings = settings
        self.faults = faults or FaultPlan()
        self.clock_ns = clock_ns
        self.monotonic_ns = monotonic_ns
        self.messages_sent = 0
        self.connections_total = 0
        self.port = 0
        self.paused = False
        self._ledger = ledger
        self._max_messages = max_messages
        self._ends_with_market = ends_with_market
        self._start_streams = start_streams
        self._connections: dict[Connection, None] = {}
        self._subscribers: dict[str, list[Connection]] = {}
        self._started_ms = clock_ns() // _NS_PER_MS
        self._server: asyncio.Server | None = None
        self._stopping = asyncio.Event()

    # -- life -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to listen; `port` is known afterwards.

        Raises:
            ConfigurationError: the port is taken.
        """
        host, port = self.settings.simulator_host, self.settings.simulator_ws_port
        try:
            self._server = await ws_create_server(self._accept, host, port, max_frame_size=1 << 20)
        except OSError as error:
            msg = f"cannot listen on {host}:{port}: {error.strerror}. Choose another --ws-port, or 0 for a free one"
            raise ConfigurationError(msg) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def run(self) -> None:
        """Move the market and send until `stop` is called or the bound on messages is reached."""
        tick_s = self.settings.simulator_tick_ms / 1000
        while not self._stopping.is_set():
            hurries = self.tick()
            if hurries:
                await asyncio.sleep(0)
                continue
            try:
                await asyncio.wait_for(self._stopping.wait(), tick_s)
            except TimeoutError:
                continue

    def stop(self) -> None:
        """End `run` after the present tick."""
        self._stopping.set()

    async def close(self) -> None:
        """Stop listening, end every connection in good order and close the ledger.

        A client that does not take what waits for it within 5 s is cut off.
        """
        if self._server is not None:
            self._server.close()
        closing = list(self._connections)
        for connection in closing:
            connection.close("server shutdown", WSCloseCode.GOING_AWAY)
        try:
            async with asyncio.timeout(_CLOSE_GRACE_S):
                await asyncio.gather(*(connection.wait_closed() for connection in closing))
        except TimeoutError:
            for connection in closing:
                connection.cut()
        if self._server is not None:
            await self._server.wait_closed()
        if self._ledger is not None:
            self._ledger.close()

    def tick(self) -> bool:
        """Do everything that is due now; return whether there is more to do at once."""
        now_ns = self.monotonic_ns()
        self._tend_connections(now_ns)
        for fault in self.faults.begin_due(now_ns):
            self._apply(fault)
        if self.paused or len(self._subscribers) < self._start_streams or self._must_wait():
            return False
        self._start_streams = 0
        self._send(self.source.advance(self.clock_ns() // _NS_PER_MS, self._subscribers))
        if self._ends_with_market and self.source.exhausted and not any(c.buffered_bytes for c in self._connections):
            self.stop()
        return self.source.behind

    # -- for connections ------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        """Take a new connection in."""
        self.connections_total += 1
        connection.name = f"{self._started_ms}-{self.connections_total}"
        self._connections[connection] = None
        if self._ledger is not None:
            connection.ledger_code = self._ledger.connection_code(connection.name)
            self._ledger.append_connection(connection.ledger_code, Fate.CONNECTED, "", self.clock_ns())
        _LOG.info("connected", connection=connection.name)

    def disconnected(self, connection: Connection, reason: str) -> None:
        """Let a connection go."""
        for stream in list(connection.streams):
            self.unsubscribe(connection, stream)
        self._connections.pop(connection, None)
        if self._ledger is not None:
            if connection.held is not None:
                self._ledger.append(*connection.held[1], self.clock_ns(), Fate.DROPPED)  # type: ignore[call-arg]
            self._ledger.append_connection(connection.ledger_code, Fate.DISCONNECTED, reason, self.clock_ns())
        connection.held = None
        _LOG.info("disconnected", connection=connection.name, reason=reason)

    def subscribe(self, connection: Connection, stream: str) -> None:
        """Send `stream` to `connection` from now on; a stream that nobody sends is accepted, as by the venue."""
        if stream not in connection.streams:
            connection.streams[stream] = None
            self._subscribers.setdefault(stream, []).append(connection)

    def unsubscribe(self, connection: Connection, stream: str) -> None:
        """Send `stream` to `connection` no longer."""
        if stream in connection.streams:
            del connection.streams[stream]
            listeners = self._subscribers[stream]
            listeners.remove(connection)
            if not listeners:
                del self._subscribers[stream]

    # -- inside ---------------------------------------------------------------------------------------------

    def _accept(self, request: WSUpgradeRequest) -> Connection | WSUpgradeResponseWithListener | None:
        url = urlsplit(request.path.decode("ascii", "replace"))
        path = unquote(url.path)
        if path == "/stream":
            wanted = [name for part in parse_qs(url.query).get("streams", []) for name in part.split("/")]
        elif path == "/ws" or path.startswith("/ws/"):
            wanted = path.removeprefix("/ws").strip("/").split("/")
        else:
            return None
        streams = [name for name in wanted if name]
        if len(streams) > self.settings.simulator_max_streams:
            response = WSUpgradeResponse.create_error_response(400, b"Too many streams")
            return WSUpgradeResponseWithListener(response, None)
        return Connection(self, streams, combined=path == "/stream")

    def _tend_connections(self, now_ns: int) -> None:
        settings = self.settings
        for connection in list(self._connections):
            if connection.buffered_bytes > settings.simulator_max_buffer_bytes:
                connection.abort("slow client")
                continue
            if connection.stalled_until_ns <= now_ns:
                connection.stalled_until_ns = 0
            connection.keep_alive(
                now_ns,
                ping_interval_s=settings.simulator_ping_interval_s,
                pong_timeout_s=settings.simulator_pong_timeout_s,
                max_age_s=settings.simulator_max_age_s,
            )

    def _must_wait(self) -> bool:
        """Return whether a market that could run ahead of its clients should wait for one of them."""
        if not self.source.behind:
            return False
        limit = self.settings.simulator_resume_buffer_bytes
        return any(connection.buffered_bytes > limit for connection in self._connections)

    def _send(self, messages: Iterable[Message]) -> None:
        now_ns = self.clock_ns()
        harmed = self.faults.touches_messages or any(item.stalled_until_ns or item.held for item in self._connections)
        ledger = self._ledger
        sent = 0
        for message in messages:
            frames = _Frames(message)
            code = ledger.stream_code(message.symbol, message.channel) if ledger is not None else 0
            row = (code, message.first_id, message.last_id, message.ts_event_ns)
            for connection in self._subscribers.get(message.stream, ()):
                if harmed:
                    sent += self._send_harmed(connection, message, frames.of(connection), row, now_ns)
                    continue
                sent += 1
                connection.outbox.append(frames.of(connection))
                if ledger is not None:
                    ledger.append(connection.ledger_code, *row, now_ns, Fate.SENT)
            if self._max_messages is not None and self.messages_sent + sent >= self._max_messages:
                self.stop()
                break
        self.messages_sent += sent
        if ledger is not None:
            ledger.flush_due(now_ns)
        for connection in self._connections:
            connection.write()

    def _send_harmed(
        self, connection: Connection, message: Message, frame: bytes, row: tuple[int, ...], now_ns: int
    ) -> int:
        """Send one message to one connection, or not, as the faults say; return how many frames went out."""
        row = (connection.ledger_code, *row)
        if self.monotonic_ns() < connection.stalled_until_ns:
            self._note(row, now_ns, Fate.STALLED)
            return 0
        fate = self.faults.fate(message.symbol, message.channel)
        if fate is Fate.DROPPED:
            self._note(row, now_ns, Fate.DROPPED)
            return 0
        if fate is Fate.REORDERED and connection.held is None:
            connection.held = (frame, row)
            return 0
        if fate is Fate.MALFORMED:
            payload = (combined(message.stream, message.data) if connection.combined else message.data).encode()
            connection.outbox.append(text_frame(payload[: len(payload) // 2]))
            self._note(row, now_ns, Fate.MALFORMED)
        else:
            connection.outbox.append(frame)
            self._note(row, now_ns, Fate.SENT)
        sent = 1
        if fate is Fate.DOUBLED:
            connection.outbox.append(frame)
            self._note(row, now_ns, Fate.DOUBLED)
            sent += 1
        if connection.held is not None:
            held_frame, held_row = connection.held
            connection.held = None
            connection.outbox.append(held_frame)
            self._note(held_row, now_ns, Fate.REORDERED)
            sent += 1
        return sent

    def _note(self, row: tuple[int, ...], now_ns: int, fate: Fate) -> None:
        if self._ledger is not None:
            self._ledger.append(*row, now_ns, fate)  # type: ignore[call-arg]

    def _apply(self, fault: Fault) -> None:
        _LOG.info("fault", kind=fault.kind.value, symbol=fault.symbol, factor=fault.factor)
        hit = list(self._connections)[: fault.count]
        if fault.kind is FaultKind.DISCONNECT:
            for connection in hit:
                connection.abort("fault")
        elif fault.kind is FaultKind.STALL:
            stall_s = _DEFAULT_STALL_S if fault.duration_s is None else fault.duration_s
            until_ns = self.monotonic_ns() + int(stall_s * _NS_PER_S)
            for connection in hit:
                connection.stalled_until_ns = until_ns
        elif fault.kind is FaultKind.RATE:
            self.source.set_rate_factor(fault.factor)
        elif fault.kind is FaultKind.LISTING and fault.symbol is not None:
            try:
                self.source.list_instrument(new_listing(fault.symbol))
            except ConfigurationError as error:
                _LOG.warning("fault refused", kind=fault.kind.value, reason=str(error))
        elif fault.kind is FaultKind.CLEAR:
            self.source.set_rate_factor(1.0)
            for connection in self._connections:
                connection.stalled_until_ns = 0


class _Frames:
    """The frames of one message, made when the first connection needs them and shared by all."""

    __slots__ = ("_combined", "_message", "_raw")

    def __init__(self, message: Message) -> None:
        self._message = message
        self._raw: bytes | None = None
        self._combined: bytes | None = None

    def of(self, connection: Connection) -> bytes:
        """Return the frame for a connection of raw or combined streams."""
        message = self._message
        if connection.combined:
            if self._combined is None:
                self._combined = text_frame((message.combined or combined(message.stream, message.data)).encode())
            return self._combined
        if self._raw is None:
            self._raw = text_frame(message.data.encode())
        return self._raw
