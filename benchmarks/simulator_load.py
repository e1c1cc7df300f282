"""How many messages a second one simulator process sends, with its ledger, to one client that reads and counts.

    uv run python -m benchmarks.simulator_load [--rate 2500] [--channels trade,depth@100ms] [--source recordings]

Synthetic: the rate (trades a second of each instrument) is set above what the process can make, so the market
falls behind its clock and what arrives is the ceiling. Recordings: replayed at speed 0. The client counts
frames and does not decode them. At the end its count can be compared with the ledger's.

`messages_per_s` needs a calm machine with two free cores, one for the simulator and one for the client;
`messages_per_cpu_s` (messages for each second of the simulator's CPU time) says what one whole core would do.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks.common import emit
from streamforge.ledger import read_ledger

_START_TIMEOUT_S = 60.0
_WARM_UP_S = 2.0
_SILENCE_S = 3.0


class Counter(WSListener):  # type: ignore[misc, unused-ignore]
    """Count text frames and their bytes."""

    def __init__(self) -> None:
        self.messages = 0
        self.payload_bytes = 0

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:  # noqa: ARG002 - picows' signature
        """Count one frame."""
        if frame.msg_type == WSMsgType.TEXT:
            self.messages += 1
            self.payload_bytes += frame.payload_size


def main() -> None:
    """Start a simulator, read from it for a while, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=["synthetic", "recordings"], default="synthetic")
    parser.add_argument("--recordings-dir", default="../shared/data")
    parser.add_argument("--instruments", type=int, default=8)
    parser.add_argument("--rate", type=float, default=20_000.0)
    parser.add_argument("--channels", default="trade,depth@100ms,bookTicker")
    parser.add_argument("--duration-s", type=float, default=15.0)
    parser.add_argument("--no-ledger", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        emit("simulator_load", vars(arguments), asyncio.run(_measure(arguments, Path(folder))))


async def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    process = _start(arguments, folder)
    try:
        address = _address(process, folder / "address.json")
        async with httpx.AsyncClient() as client:
            info = (await client.get(address["rest_url"] + "/api/v3/exchangeInfo")).json()
        symbols = [item["symbol"].lower() for item in info["symbols"]]
        names = "/".join(f"{symbol}@{channel}" for symbol in symbols for channel in arguments.channels.split(","))
        counter = Counter()
        transport, _ = await ws_connect(lambda: counter, f"{address['ws_url']}/stream?streams={names}")
        measured = await _read(counter, process.pid, arguments.duration_s)
        process.send_signal(signal.SIGTERM)
        await transport.wait_disconnected()
        summary = msgspec.json.decode(process.communicate(timeout=_START_TIMEOUT_S)[0])
    finally:
        process.kill()
        process.wait()
    measured["received_in_total"] = counter.messages
    measured["sent_in_total"] = summary["messages_sent"]
    if not arguments.no_ledger:
        fates = read_ledger(folder / "ledger")["fate"].to_pylist()
        measured["ledger_rows_sent"] = fates.count("sent")
    return measured


def _start(arguments: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cli", "simulate", "--no-kafka", "--output", "json"]
    command += ["--address-file", str(folder / "address.json"), "--source", arguments.source]
    command += ["--instruments", str(arguments.instruments), "--rate", str(arguments.rate), "--start-streams", "1"]
    if arguments.source == "recordings":
        command += ["--recordings-dir", arguments.recordings_dir, "--speed", "0"]
    if not arguments.no_ledger:
        command += ["--ledger", str(folder / "ledger")]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def _address(process: subprocess.Popen[bytes], path: Path) -> dict[str, str]:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            sys.exit("the simulator did not start")
        time.sleep(0.1)
    return msgspec.json.decode(path.read_bytes(), type=dict[str, str])


async def _read(counter: Counter, pid: int, duration_s: float) -> dict[str, Any]:
    """Count for `duration_s` after a warm-up, or until nothing comes any more."""
    simulator, client = psutil.Process(pid), psutil.Process()
    await asyncio.sleep(_WARM_UP_S)
    start = _state(counter, simulator, client)
    end = start
    while end["at_s"] - start["at_s"] < duration_s:
        await asyncio.sleep(0.5)
        now = _state(counter, simulator, client)
        if now["messages"] != end["messages"]:
            end = now
        elif now["at_s"] - end["at_s"] > _SILENCE_S:
            break
    if end is start:
        sys.exit("nothing arrived: is the machine too busy?")
    wall_s = end["at_s"] - start["at_s"]
    cpu_s = end["simulator_cpu_s"] - start["simulator_cpu_s"]
    return {
        "messages_per_cpu_s": round((end["messages"] - start["messages"]) / cpu_s),
        "messages_per_s": round((end["messages"] - start["messages"]) / wall_s),
        "mib_per_s": round((end["bytes"] - start["bytes"]) / wall_s / 2**20, 1),
        "wall_s": round(wall_s, 2),
        "simulator_cores": round((end["simulator_cpu_s"] - start["simulator_cpu_s"]) / wall_s, 2),
        "client_cores": round((end["client_cpu_s"] - start["client_cpu_s"]) / wall_s, 2),
        "simulator_rss_mib": round(simulator.memory_info().rss / 2**20),
    }


def _state(counter: Counter, simulator: psutil.Process, client: psutil.Process) -> dict[str, float]:
    return {
        "at_s": time.monotonic(),
        "messages": counter.messages,
        "bytes": counter.payload_bytes,
        "simulator_cpu_s": sum(simulator.cpu_times()[:2]),
        "client_cpu_s": sum(client.cpu_times()[:2]),
    }


if __name__ == "__main__":
    main()
