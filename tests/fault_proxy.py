"""A proxy in front of an HTTP server that does to requests what networks and servers do to them.

It passes on what it gets, the `Host` header included, so that signatures hold. A fault strikes the requests that it
names, a number of times; what it struck is counted.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ALWAYS = 1_000_000
_TIMEOUT_S = 30.0


class Fault(StrEnum):
    """What is done to a request."""

    UNAVAILABLE = "503 instead of the request"
    DROPPED = "connection closed instead of the request"
    TRUNCATED = "half of the body passed on, then both connections closed"
    SILENT = "no answer, and the request is not passed on"
    ANSWER_LOST = "request passed on, connection closed instead of its answer"
    FAILED_AFTER = "request passed on, 500 instead of its answer"
    GATEWAY_AFTER = "request passed on, 502 instead of its answer"
    UNAVAILABLE_AFTER = "request passed on, 503 instead of its answer"
    CONFLICT_AFTER = "request passed on, 409 instead of its answer"


_STATUS = {
    Fault.UNAVAILABLE: 503,
    Fault.FAILED_AFTER: 500,
    Fault.GATEWAY_AFTER: 502,
    Fault.UNAVAILABLE_AFTER: 503,
    Fault.CONFLICT_AFTER: 409,
}
_INSTEAD = {Fault.UNAVAILABLE, Fault.DROPPED, Fault.SILENT}


@dataclass
class Strike:
    """A fault, the requests that it strikes, and how often it did."""

    fault: Fault
    method: str
    path: str
    times: int
    struck: int = field(default=0)


class FaultProxy:
    """A proxy on a free port; it passes everything on until it is told otherwise."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.requests: list[tuple[str, str]] = []
        self.stopping = threading.Event()
        self._strikes: list[Strike] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._address = ("127.0.0.1", 0)
        self.accept()

    @property
    def url(self) -> str:
        """Return the URL to use instead of the server's."""
        return f"http://127.0.0.1:{self._address[1]}"

    def strike(self, fault: Fault, method: str, path: str = "", *, times: int = 1) -> Strike:
        """Do `fault` to the next `times` requests of a method whose path has `path` in it."""
        strike = Strike(fault, method, path, times)
        with self._lock:
            self._strikes.append(strike)
        return strike

    def clear(self) -> None:
        """Pass everything on again."""
        with self._lock:
            self._strikes.clear()

    def count(self, method: str, path: str) -> int:
        """Return how many requests of a method have come whose path has `path` in it."""
        with self._lock:
            return sum(each == method and path in where for each, where in self.requests)

    def refuse(self) -> None:
        """Close every connection and refuse new ones."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._server = None

    def accept(self) -> None:
        """Listen, on the same port as before."""
        self._server = _Server(self._address, self)
        self._address = ("127.0.0.1", int(self._server.server_address[1]))
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Close everything."""
        self.stopping.set()
        self.refuse()

    def take(self, method: str, path: str) -> Fault | None:
        """Note a request; return what is to be done to it."""
        with self._lock:
            self.requests.append((method, path))
            for strike in self._strikes:
                if strike.struck < strike.times and strike.method == method and strike.path in path:
                    strike.struck += 1
                    return strike.fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: connections end here in every way."""

    def hang_up(self) -> None:
        """Close what is open."""
        for each in list(self._open):
            self.shutdown_request(each)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""

    def _pass_on(self) -> None:
        proxy = self.server.proxy
        fault = proxy.take(self.command, self.path)
        body = self._body()
        if fault in _INSTEAD:
            self._answer(fault)
            return
        upstream = HTTPConnection(proxy.target, timeout=_TIMEOUT_S)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body[: len(body) // 2] if fault is Fault.TRUNCATED else body)
            if fault is Fault.TRUNCATED:
                self._hang_up()
                return
            answer = upstream.getresponse()
            content = answer.read()
            if fault is not None:
                self._answer(fault)
                return
            self.send_response_only(answer.status, answer.reason)
            self._send(answer.getheaders(), content)
        finally:
            upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        raw = b""
        while True:
            line = self.rfile.readline()
            size = int(line.partition(b";")[0], 16)
            raw += line + self.rfile.read(size) + self.rfile.readline()
            if size == 0:
                return raw

    def _answer(self, fault: Fault) -> None:
        if fault is Fault.SILENT:
            self.server.proxy.stopping.wait(_TIMEOUT_S)
        if fault not in _STATUS:
            self._hang_up()
            return
        self.send_response_only(_STATUS[fault])
        self._send([("Content-Type", "text/plain")], b"a fault of a test")

    def _send(self, headers: list[tuple[str, str]], content: bytes) -> None:
        for name, value in headers:
            if name.lower() not in {"transfer-encoding", "content-length", "connection"}:
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
