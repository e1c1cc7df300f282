"""How many frames a second one loader takes from a WebSocket to acknowledged Kafka records.

    uv run python -m benchmarks.loader_rate [--rate 50000] [--duration-s 20] [--symbols 8]

Three processes: a server that writes prepared frames to the socket (its cost is near zero: whole chunks of
ready WebSocket frames), the loader as a user starts it, and a broker of its own in a temporary folder. `--rate 0`
sends as fast as the loader reads. Counted is what the broker acknowledged (acks=all, idempotent), read
from the loader's own metrics; at the end it is compared with the end offsets of the topic.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import msgspec
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

from benchmarks.common import CostSampler, emit
from streamforge import broker
from streamforge.contracts import load_contracts
from streamforge.log_reader import log_ends
from streamforge.logs import configure as configure_logs
from streamforge.offsets import TopicPartition
from streamforge.processes import choose_free_port
from streamforge.settings import Settings, load_settings
from streamforge.topics import create_topics

_CHUNK_FRAMES = 500
_MOST_UNSENT_BYTES = 4 * 2**20
_SETTLE_S = 3.0
_TIMEOUT_S = 120.0
_TEXT_HEADER = struct.Struct("!BBH")
"""A final text frame, unmasked, of 126 to 65,535 bytes."""


def main() -> None:
    """Start everything, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=50_000, help="frames a second; 0: as fast as they are read")
    parser.add_argument("--duration-s", type=float, default=20.0)
    parser.add_argument("--symbols", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(home=Path(folder))
        configure_logs(settings)
        broker.start(settings)
        try:
            create_topics(settings, load_contracts(settings.contracts_dir))
            emit("loader_rate", vars(arguments), _measure(settings, arguments))
        finally:
            broker.stop(settings)


def _measure(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    ours, theirs = multiprocessing.Pipe()
    symbols = [f"S{number:02}USDT" for number in range(arguments.symbols)]
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, symbols, arguments.rate))
    server.start()
    port = ours.recv()
    metrics_port = choose_free_port()
    loader = _start_loader(settings, port, metrics_port)
    try:
        return _watch(settings, loader, metrics_port, arguments.duration_s, server.pid or 0)
    finally:
        loader.kill()
        loader.wait()
        server.terminate()
        server.join()


def _start_loader(settings: Settings, port: int, metrics_port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cli", "load", "--venue", "SIM", "--symbols", "all", "--channels", "trade"]
    command += ["--ws-url", f"ws://127.0.0.1:{port}", "--rest-url", f"http://127.0.0.1:{port}"]
    command += ["--metrics-port", str(metrics_port), "--output", "json"]
    environment = os.environ | {"STREAMFORGE_HOME": str(settings.home_path), "STREAMFORGE_LOG_LEVEL": "error"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def _watch(
    settings: Settings, loader: subprocess.Popen[bytes], metrics_port: int, duration_s: float, server_pid: int
) -> dict[str, Any]:
    url = f"http://127.0.0.1:{metrics_port}/metrics"
    _wait_for_frames(loader, url)
    time.sleep(_SETTLE_S)
    processes = [("loader", loader.pid), ("server", server_pid), ("broker", broker.status(settings).pid or 0)]
    sampler = CostSampler()
    start_s, start = time.monotonic(), _counters(url)
    most_buffered = 0.0
    while time.monotonic() - start_s < duration_s:
        sampler.sample(processes)
        time.sleep(0.5)
        most_buffered = max(most_buffered, _counters(url)["buffered_bytes"])
    wall_s, end = time.monotonic() - start_s, _counters(url)
    sampler.sample(processes)
    cpu_s = sampler.result()["loader"]["cpu_s_per_s"] * wall_s
    loader.send_signal(signal.SIGTERM)
    summary = json.loads(loader.communicate(timeout=_TIMEOUT_S)[0].splitlines()[-1])
    acked = end["acked_total"] - start["acked_total"]
    return {
        "frames_per_s": round((end["frames_total"] - start["frames_total"]) / wall_s),
        "acked_per_s": round(acked / wall_s),
        "loader_cpu_us_per_frame": round(cpu_s / max(acked, 1) * 1e6, 2),
        "most_buffered_mib": round(most_buffered / 2**20, 1),
        "dropped": summary["dropped"],
        "gaps": summary["gaps"],
        "frames_in_total": summary["frames"],
        "acked_in_total": summary["acked"],
        "records_in_topic": _records(settings),
        "processes": sampler.result(),
        "wall_s": round(wall_s, 1),
    }


def _records(settings: Settings) -> int:
    topic = load_contracts(settings.contracts_dir)["raw-trades"].topic
    if topic is None:
        return 0
    return sum(log_ends(settings, [TopicPartition(topic.name, number) for number in range(topic.partitions)]).values())


def _wait_for_frames(loader: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s and loader.poll() is None:
        try:
            if _counters(url)["acked_total"] > 0:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit("the loader did not start")


def _counters(url: str) -> dict[str, float]:
    found = re.findall(r"^streamforge_loader_(\w+) (\S+)$", httpx.get(url).text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def _serve(pipe: Connection, symbols: list[str], rate: int) -> None:
    """Serve until terminated; the port goes through `pipe`."""

    async def serve() -> None:
        body = msgspec.json.encode(
            {
                "symbols": [
                    {"symbol": name, "status": "TRADING", "baseAsset": name[:-4], "quoteAsset": "USDT"}
                    for name in symbols
                ]
            }
        )

        def accept(request: WSUpgradeRequest) -> Any:
            if request.path.startswith(b"/api/"):
                return WSUpgradeResponseWithListener(WSUpgradeResponse.create_ok_response(body), None)
            return _Feed(symbols, rate)

        server = await ws_create_server(accept, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


class _Feed(WSListener):  # type: ignore[misc, unused-ignore]
    """Answers the subscription and sends trades of all symbols in turn, ids without a hole."""

    def __init__(self, symbols: list[str], rate: int) -> None:
        self._symbols = symbols
        self._rate = rate
        self._sent = 0
        self._task: asyncio.Task[None] | None = None

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Take a subscription."""
        if frame.msg_type == WSMsgType.TEXT:
            request = msgspec.json.decode(frame.get_payload_as_bytes())
            transport.send(WSMsgType.TEXT, msgspec.json.encode({"result": None, "id": request["id"]}))
            self._task = self._task or asyncio.ensure_future(self._send(transport))

    async def _send(self, transport: WSTransport) -> None:
        socket = transport.underlying_transport
        start_s = time.monotonic()
        while not transport.is_disconnected:
            due = self._sent if self._rate == 0 else int((time.monotonic() - start_s) * self._rate)
            if socket.get_write_buffer_size() > _MOST_UNSENT_BYTES or due < self._sent:
                await asyncio.sleep(0.001)
                continue
            socket.write(self._chunk())
            await asyncio.sleep(0)

    def _chunk(self) -> bytes:
        """Return the next frames as the bytes of the WebSocket protocol."""
        now_ms = time.time_ns() // 1_000_000
        parts = []
        for number in range(self._sent, self._sent + _CHUNK_FRAMES):
            trade_id, place = divmod(number, len(self._symbols))
            symbol = self._symbols[place]
            payload = (
                f'{{"stream":"{symbol.lower()}@trade","data":{{"e":"trade","E":{now_ms},"s":"{symbol}",'
                f'"t":{trade_id + 1},"p":"61837.63000000","q":"0.00100000","T":{now_ms},"m":true,"M":true}}}}'
            ).encode()
            parts.append(_TEXT_HEADER.pack(0x81, 126, len(payload)) + payload)
        self._sent += _CHUNK_FRAMES
        return b"".join(parts)


if __name__ == "__main__":
    main()
