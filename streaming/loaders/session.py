"""One WebSocket connection: subscribe, count and route its frames, notice when it goes silent.

The WebSocket client is picows: frames come by a callback, without a task switch or a queue in between, which
is what lets one process take 50,000 frames/s (docs/adr). It answers pings and notices a dead peer by itself.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence

import structlog
from picows import WSAutoPingStrategy, WSCloseCode, WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from streamforge.errors import RetryableSourceError
from streaming.loaders.base import LoaderSettings, Stream, Venue
from streaming.loaders.sink import RawSink, Route

_MESSAGES_PER_S = 5
_ANSWER_PREFIXES = (b'{"result"', b'{"id"', b'{"error"')
_PING_WHEN_IDLE_S = 20.0
_MAX_FRAME_BYTES = 8 * 2**20
_DATA = (WSMsgType.TEXT, WSMsgType.BINARY)
_log = structlog.get_logger(__name__)


class Connection(WSListener):
    """What comes in on one connection.

    Args:
        venue: tells the streams of frames.
        sink: takes the frames.
        routes: routes by the stream names that the venue uses; may grow while connected.
    """

    def __init__(self, venue: Venue, sink: RawSink, routes: dict[bytes, Route]) -> None:
        super().__init__()
        self.connection_id = uuid.uuid4().hex
        self.frames = 0
        self.last_frame_s = time.monotonic()
        self.open_messages: set[int] = set()
        self._id_header = self.connection_id.encode()
        self._venue = venue
        self._stream_name = venue.stream_name
        self._sink = sink
        self._routes = routes
        self._parts: list[bytes] = []

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Take in one WebSocket frame; called by picows."""
        kind = frame.msg_type
        if kind in _DATA:
            if frame.fin:
                self._message(frame.get_payload_as_bytes())
            else:
                self._parts = [frame.get_payload_as_bytes()]
        elif kind is WSMsgType.CONTINUATION:
            self._parts.append(frame.get_payload_as_bytes())
            if frame.fin:
                self._message(b"".join(self._parts))
                self._parts = []
        elif kind is WSMsgType.CLOSE:
            _log.info("venue_closes", connection_id=self.connection_id, code=str(frame.get_close_code()))
            transport.send_close(frame.get_close_code())
            transport.disconnect()

    def _message(self, value: bytes) -> None:
        name = self._stream_name(value)
        route = self._routes.get(name) if name is not None else None
        if route is None:
            if self.open_messages and self._is_answer(value):
                return
            route = self._sink.unknown
            self._sink.counters.unknown_frames += 1
        self.last_frame_s = time.monotonic()
        self._sink.received(route, value, self._id_header, self.frames)
        self.frames += 1

    def _is_answer(self, value: bytes) -> bool:
        answer = self._venue.answer(value) if value.startswith(_ANSWER_PREFIXES) else None
        if answer is None or answer.message_id not in self.open_messages:
            return False
        self.open_messages.discard(answer.message_id)
        if answer.refusal is not None:
            self._sink.counters.refused_subscriptions += 1
            _log.error("subscription_refused", connection_id=self.connection_id, reason=answer.refusal)
        return True


class Session:
    """The streams of one connection, whichever connection that is at the moment.

    Args:
        settings: pace and patience.
        venue: the venue's protocol.
        sink: takes the frames.
        url: what to connect to.
    """

    def __init__(self, settings: LoaderSettings, venue: Venue, sink: RawSink, url: str) -> None:
        self.streams: list[Stream] = []
        self.connects = 0
        self._settings = settings
        self._venue = venue
        self._sink = sink
        self._url = url
        self._routes: dict[bytes, Route] = {}
        self._transport: WSTransport | None = None
        self._listener: Connection | None = None
        self._subscribed = 0
        self._subscribing = asyncio.Lock()
        self._next_message_id = 1

    @property
    def is_connected(self) -> bool:
        """Return whether the connection is open and every stream is subscribed."""
        return self._is_open and self._subscribed == len(self.streams) and not self._subscribing.locked()

    @property
    def room(self) -> int:
        """Return how many more streams it may carry."""
        return self._settings.loader_streams_per_connection - len(self.streams)

    async def add(self, streams: Iterable[Stream]) -> None:
        """Take further streams; they are subscribed at once where the connection is open."""
        for stream in streams:
            self.streams.append(stream)
            self._routes[stream.name] = self._sink.route(stream)
        if self._is_open:
            await self._subscribe()

    async def run_once(self) -> None:
        """Connect, subscribe and take frames until the connection ends.

        Raises:
            RetryableSourceError: it ended, or could not be made.
        """
        try:
            transport, listener = await ws_connect(
                lambda: Connection(self._venue, self._sink, self._routes),
                self._url,
                enable_auto_ping=True,
                auto_ping_idle_timeout=_PING_WHEN_IDLE_S,
                auto_ping_reply_timeout=_PING_WHEN_IDLE_S,
                auto_ping_strategy=WSAutoPingStrategy.PING_WHEN_IDLE,
                max_frame_size=_MAX_FRAME_BYTES,
            )
        except (OSError, WSError) as error:
            msg = f"cannot connect to {self._url}: {type(error).__name__} {error}"
            raise RetryableSourceError(msg) from error
        if not isinstance(listener, Connection):
            msg = f"{self._url} closed the connection during the handshake"
            raise RetryableSourceError(msg)
        self.connects += 1
        self._transport, self._listener = transport, listener
        self._sink.interrupted(self._routes.values())
        self._subscribed = 0
        _log.info("connected", connection_id=listener.connection_id, url=self._url, streams=len(self.streams))
        try:
            await self._subscribe()
            reason = await self._until_it_ends(transport, listener)
            # Here and not only with the next connection: the loader may be stopped before there is one.
            self._sink.interrupted(self._routes.values())
        finally:
            self.close()
        msg = f"connection {listener.connection_id} to {self._url} ended after {listener.frames} frames: {reason}"
        raise RetryableSourceError(msg)

    def close(self) -> None:
        """Leave the connection; the venue sends nothing more of it."""
        transport, self._transport = self._transport, None
        if transport is not None and not transport.is_disconnected:
            transport.send_close(WSCloseCode.OK)
            transport.disconnect()

    @property
    def _is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_disconnected

    async def _subscribe(self) -> None:
        async with self._subscribing:
            streams: Sequence[Stream] = self.streams[self._subscribed :]
            self._subscribed = len(self.streams)
            messages = self._venue.subscribe_messages(streams, self._next_message_id) if streams else []
            for message in messages:
                if self._transport is None or self._listener is None or self._transport.is_disconnected:
                    return
                self._listener.open_messages.add(self._next_message_id)
                self._next_message_id += 1
                self._transport.send(WSMsgType.TEXT, message)
                await asyncio.sleep(1 / _MESSAGES_PER_S)

    async def _until_it_ends(self, transport: WSTransport, listener: Connection) -> str:
        patience_s = self._settings.loader_stale_after_s
        ended = asyncio.ensure_future(transport.wait_disconnected())
        try:
            while True:
                await asyncio.wait({ended}, timeout=patience_s / 4)
                if ended.done():
                    ended.result()
                    return "closed by the venue or the network"
                silent_s = time.monotonic() - listener.last_frame_s
                if listener.frames and silent_s > patience_s:
                    transport.disconnect(graceful=False)
                    return f"no frame for {silent_s:.1f} s"
        except (OSError, WSError) as error:
            return f"{type(error).__name__} {error}"
        finally:
            ended.cancel()
