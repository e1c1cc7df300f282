"""One client of the simulated venue's WebSocket: its streams, requests, pings and outgoing frames."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

from streaming.simulator.protocol import RequestError, WsRequest, parse_request, result_body

if TYPE_CHECKING:
    from streaming.simulator.server import MarketServer

_NS_PER_S = 1_000_000_000
_SMALL_FRAME = 126
_MEDIUM_FRAME = 1 << 16
_MAX_REQUEST_BYTES = 65_536
_PINGS_REMEMBERED = 8


def text_frame(payload: bytes) -> bytes:
    """Return `payload` as one unmasked, final WebSocket text frame (RFC 6455, section 5.2).

    Frames are made once for all connections and written many at a time; picows makes one frame and one
    system call for each message and connection.
    """
    size = len(payload)
    if size < _SMALL_FRAME:
        return bytes((0x81, size)) + payload
    if size < _MEDIUM_FRAME:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


class Connection(WSListener):  # type: ignore[misc, unused-ignore]
    """One connection; it asks its server for everything that is not its own.

    Args:
        server: knows the market, the subscriptions, the clock and the ledger.
        streams: streams asked for in the URL.
        combined: whether payloads are wrapped with their stream's name.
    """

    def __init__(self, server: MarketServer, streams: list[str], *, combined: bool) -> None:
        self._server = server
        self._requested = streams
        self.combined = combined
        self.name = ""
        self.ledger_code = -1
        self.streams: dict[str, None] = {}
        self.outbox: list[bytes] = []
        self.held: tuple[bytes, tuple[int, ...]] | None = None
        self.stalled_until_ns = 0
        self.open = False
        self._transport: WSTransport | None = None
        self._opened_ns = 0
        self._pinged_ns = 0
        self._ponged_ns = 0
        self._ping_payloads: deque[bytes] = deque(maxlen=_PINGS_REMEMBERED)
        self._incoming_ns: deque[int] = deque()
        self._fragments = b""

    # -- picows' callbacks ----------------------------------------------------------------------------------

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Begin to listen to the streams of the URL."""
        now_ns = self._server.monotonic_ns()
        self._transport = transport
        self._opened_ns = self._pinged_ns = self._ponged_ns = now_ns
        self.open = True
        self._server.connected(self)
        for stream in self._requested:
            self._server.subscribe(self, stream)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Answer a request, a close or a pong."""
        if not self.open:
            return
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            self.close("client closed")
            return
        if self._too_fast():
            self.close("too many requests", WSCloseCode.POLICY_VIOLATION)
        elif frame.msg_type == WSMsgType.PONG:
            if frame.get_payload_as_bytes() in self._ping_payloads:
                self._ponged_ns = self._server.monotonic_ns()
        elif frame.msg_type in (WSMsgType.TEXT, WSMsgType.CONTINUATION):
            self._fragments += frame.get_payload_as_bytes()
            if len(self._fragments) > _MAX_REQUEST_BYTES:
                self.close("request too long", WSCloseCode.MESSAGE_TOO_BIG)
            elif frame.fin:
                text, self._fragments = self._fragments, b""
                transport.send(WSMsgType.TEXT, self._answer(text))
        else:
            self.close("no text", WSCloseCode.UNSUPPORTED_DATA)

    def on_ws_disconnected(self, transport: WSTransport) -> None:  # noqa: ARG002 - picows' signature
        """Forget the streams."""
        self.abort("connection lost")

    def pause_writing(self) -> None:
        """Do nothing: the server looks at the buffer itself."""

    def resume_writing(self) -> None:
        """Do nothing: the server looks at the buffer itself."""

    # -- for the server -------------------------------------------------------------------------------------

    @property
    def buffered_bytes(self) -> int:
        """Return how many bytes wait for the client."""
        return self._transport.underlying_transport.get_write_buffer_size() if self._transport and self.open else 0

    def write(self) -> None:
        """Hand the outgoing frames to the transport."""
        if self.outbox and self._transport is not None:
            self._transport.underlying_transport.write(b"".join(self.outbox))
        self.outbox.clear()

    async def wait_closed(self) -> None:
        """Wait until the transport is gone."""
        if self._transport is not None:
            await self._transport.wait_disconnected()

    def cut(self) -> None:
        """Give up what a closing transport has not sent yet."""
        if self._transport is not None:
            self._transport.disconnect(graceful=False)

    def keep_alive(self, now_ns: int, *, ping_interval_s: float, pong_timeout_s: float, max_age_s: float) -> None:
        """Ping when it is time; end the connection when it is too old or has not answered."""
        if now_ns - self._opened_ns >= max_age_s * _NS_PER_S:
            self.close("24 hours", WSCloseCode.GOING_AWAY)
        elif self._pinged_ns > self._ponged_ns and now_ns - self._ponged_ns >= pong_timeout_s * _NS_PER_S:
            self.abort("no pong")
        elif now_ns - self._pinged_ns >= ping_interval_s * _NS_PER_S and self._transport is not None:
            self._pinged_ns = now_ns
            self._ping_payloads.append(str(self._server.clock_ns() // 1_000_000).encode())
            self._transport.send_ping(self._ping_payloads[-1])

    def close(self, reason: str, code: WSCloseCode = WSCloseCode.OK) -> None:
        """End the connection with a close frame, after what was handed over."""
        if self._transport is not None and self.open:
            self._transport.send_close(code, reason.encode())
            self._transport.disconnect()
        self._ended(reason)

    def abort(self, reason: str) -> None:
        """Cut the connection without a word; what the transport has not sent yet is lost."""
        if self._transport is not None and self.open:
            self._transport.disconnect(graceful=False)
        self._ended(reason)

    def _ended(self, reason: str) -> None:
        if self.open:
            self.open = False
            self._server.disconnected(self, reason)

    def _too_fast(self) -> bool:
        now_ns = self._server.monotonic_ns()
        incoming = self._incoming_ns
        incoming.append(now_ns)
        while incoming[0] <= now_ns - _NS_PER_S:
            incoming.popleft()
        return len(incoming) > self._server.settings.simulator_max_incoming_per_s

    # -- requests -------------------------------------------------------------------------------------------

    def _answer(self, text: bytes) -> bytes:
        try:
            request = parse_request(text)
            return result_body(self._obey(request), request.request_id)
        except RequestError as error:
            return error.body()

    def _obey(self, request: WsRequest) -> Any:
        if request.method == "LIST_SUBSCRIPTIONS":
            return list(self.streams)
        if request.method == "GET_PROPERTY":
            self._check_property(request, 1)
            return self.combined
        if request.method == "SET_PROPERTY":
            self._check_property(request, 2)
            if not isinstance(request.params[1], bool):
                raise RequestError(1, "Invalid value type: expected Boolean", request.request_id)
            self.combined = request.params[1]
            return None
        if request.method == "UNSUBSCRIBE":
            for stream in request.params:
                self._server.unsubscribe(self, stream)
            return None
        if len(self.streams.keys() | set(request.params)) > self._server.settings.simulator_max_streams:
            raise RequestError(2, "Invalid request: too many parameters", request.request_id)
        for stream in request.params:
            self._server.subscribe(self, stream)
        return None

    @staticmethod
    def _check_property(request: WsRequest, count: int) -> None:
        if len(request.params) > count:
            raise RequestError(2, "Invalid request: too many parameters", request.request_id)
        if len(request.params) < count or request.params[0] != "combined":
            raise RequestError(0, "Unknown property", request.request_id)
