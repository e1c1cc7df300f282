"""`streamforge simulate` as a process: its options, its ends, its ledger after a SIGKILL, and Kafka's commands."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from typer.testing import CliRunner

from cli.app import app
from streamforge.events import CommandKind, ProcessState
from streamforge.ledger import read_ledger
from streamforge.settings import Settings
from streamforge.supervision import read_events, read_process_states, send_command, wait_for_answer
from tests.conftest import MakeTopics
from tests.integration.simulated_venue import RECEIVE_TIMEOUT_S, drain, receive, run, trade_ids
from tests.waiting import wait_until

Start = Callable[..., "Simulator"]

# Tests poll much faster than the venue allows.
_NO_LIMIT = {"STREAMFORGE_SIMULATOR_WEIGHT_LIMIT": "1000000"}


class Simulator:
    """A running `streamforge simulate`."""

    def __init__(self, folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.ledger = folder / "ledger"
        self._address = folder / "address.json"
        self._address.unlink(missing_ok=True)  # of the one before
        command = [sys.executable, "-m", "cli", "simulate", "--output", "json", "--instruments", "2", "--rate", "100"]
        command += ["--ledger", str(self.ledger), "--address-file", str(self._address), *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            env={**os.environ, **_NO_LIMIT, "STREAMFORGE_HOME": str(folder / "home"), **environment},
        )

    def url(self, name: str) -> str:
        """Return `ws_url` or `rest_url` once the servers listen."""
        wait_until(lambda: self._address.exists() or self.process.poll() is not None, what="the address file")
        return str(json.loads(self._address.read_text())[name])

    def result(self) -> dict[str, Any]:
        """Return the JSON that the process printed at its end."""
        output, _ = self.process.communicate(timeout=60)
        found: dict[str, Any] = json.loads(output)
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a simulator; what it started is gone after the test."""
    started: list[Simulator] = []

    def make(*arguments: str, environment: Mapping[str, str] | None = None) -> Simulator:
        started.append(Simulator(tmp_path, arguments, environment or {}))
        return started[-1]

    yield make
    for simulator in started:
        simulator.process.kill()
        simulator.process.wait()
        assert simulator.process.stdout is not None
        simulator.process.stdout.close()


async def connect(simulator: Simulator, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
    return await session.ws_connect(simulator.url("ws_url") + "/stream?streams=btcusdt@trade/ethusdt@trade")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_closes_in_good_order_and_the_ledger_is_what_was_received(start: Start, number: signal.Signals) -> None:
    simulator = start("--no-kafka")

    async def test() -> list[str]:
        async with aiohttp.ClientSession() as session:
            client = await connect(simulator, session)
            texts = await receive(client, 300)
            simulator.process.send_signal(number)
            texts += await drain(client)
            assert client.close_code == aiohttp.WSCloseCode.GOING_AWAY
            return texts

    received: list[str] = []
    run(_kept(test(), received))
    result = simulator.result()
    assert simulator.process.returncode == 0
    rows = read_ledger(simulator.ledger).to_pylist()
    sent = [row["first_id"] for row in rows if row["fate"] == "sent"]
    assert trade_ids(received) == sent
    assert result["messages_sent"] == len(sent)
    assert rows[-1]["detail"] == "server shutdown"
    assert result["spillovers"][0]["leader"] == "BTCUSDT"


async def _kept(test: Any, texts: list[str]) -> None:
    texts += await test


def test_sigkill_with_flush_zero_the_ledger_holds_everything_received(start: Start) -> None:
    simulator = start("--no-kafka", environment={"STREAMFORGE_SIMULATOR_LEDGER_FLUSH_MS": "0"})
    received: list[str] = []

    async def test() -> list[str]:
        async with aiohttp.ClientSession() as session:
            client = await connect(simulator, session)
            texts = await receive(client, 300)
            simulator.process.kill()
            return texts + await drain(client)

    run(_kept(test(), received))
    rows = read_ledger(simulator.ledger).to_pylist()
    sent = [row["first_id"] for row in rows if row["fate"] == "sent"]
    assert sent[: len(received)] == trade_ids(received)


def test_max_messages_stops_by_itself(start: Start) -> None:
    simulator = start("--no-kafka", "--max-messages", "250")
    received: list[str] = []

    async def test() -> list[str]:
        async with aiohttp.ClientSession() as session:
            return await drain(await connect(simulator, session))

    run(_kept(test(), received))
    assert simulator.result()["messages_sent"] == len(received) == 250
    assert simulator.process.returncode == 0


def test_start_minutes_ago_runs_fast_until_now(start: Start) -> None:
    simulator = start("--no-kafka", "--start-minutes-ago", "3", "--rate", "2")
    url = simulator.url("rest_url")

    def behind_ms() -> float:
        trades = httpx.get(f"{url}/api/v3/trades", params={"symbol": "BTCUSDT", "limit": 1}).json()
        now_ms: int = httpx.get(f"{url}/api/v3/time").json()["serverTime"]
        return now_ms - trades[0]["time"] if trades else float("inf")

    wait_until(lambda: 0 <= behind_ms() < 10_000, timeout_s=RECEIVE_TIMEOUT_S * 2, what="the market reaches now")
    klines = httpx.get(f"{url}/api/v3/klines", params={"symbol": "BTCUSDT", "interval": "1m"}).json()
    assert len(klines) >= 3


def test_commands_over_kafka_are_obeyed_and_events_published(
    start: Start, platform: Settings, make_topics: MakeTopics
) -> None:
    contracts = make_topics("queue-events", "queue-control")
    environment = {
        "STREAMFORGE_BOOTSTRAP_SERVERS": str(platform.bootstrap_servers),
        "STREAMFORGE_TOPIC_PREFIX": platform.topic_prefix,
    }
    simulator = start(environment=environment)
    url = simulator.url("rest_url")
    [started] = wait_until(lambda: read_process_states(platform, contracts), what="the started event").values()
    served = f"http://127.0.0.1:{started.metrics_port}"

    def tell(command: CommandKind, **arguments: str) -> Any:
        sent = send_command(
            platform, contracts, target="simulator", command=command, issued_by="test", arguments=arguments
        )
        return wait_for_answer(platform, contracts, sent, timeout_s=RECEIVE_TIMEOUT_S)

    assert tell(CommandKind.PING).state is ProcessState.RUNNING
    assert httpx.get(f"{served}/ready").status_code == 200
    assert "streamforge_simulator_messages_sent_total 0.0" in httpx.get(f"{served}/metrics").text
    assert tell(CommandKind.FAULT, fault="nonsense").detail.startswith("refused: ")
    assert tell(CommandKind.FAULT, fault="listing", symbol="NEWUSDT").detail == ""
    wait_until(lambda: "NEWUSDT" in httpx.get(f"{url}/api/v3/exchangeInfo").text, what="the listing")
    assert tell(CommandKind.PAUSE).state is ProcessState.PAUSED
    assert tell(CommandKind.RESUME).state is ProcessState.RUNNING
    tell(CommandKind.STOP)
    assert simulator.process.wait(timeout=60) == 0
    states = read_process_states(platform, contracts)
    assert [(event.kind, event.event, event.state) for event in states.values()] == [
        ("simulator", "finished", "stopped")
    ]


def test_progress_is_published_and_a_paused_market_stands_still_after_a_restart(
    start: Start, platform: Settings, make_topics: MakeTopics
) -> None:
    contracts = make_topics("queue-events", "queue-control")
    environment = {
        "STREAMFORGE_BOOTSTRAP_SERVERS": str(platform.bootstrap_servers),
        "STREAMFORGE_TOPIC_PREFIX": platform.topic_prefix,
    }

    def said(**wanted: object) -> Any:
        return next(
            (
                event
                for event in read_events(platform, contracts, within_s=3_600)
                if all(getattr(event, name) == value for name, value in wanted.items())
            ),
            None,
        )

    async def listen(simulator: Simulator, condition: Callable[[], Any], what: str) -> None:
        async with aiohttp.ClientSession() as session:
            client = await connect(simulator, session)
            await asyncio.to_thread(wait_until, condition, what=what)
            await client.close()

    first = start(environment=environment)
    run(listen(first, lambda: said(event="progress"), "progress of a market that is listened to"))
    progress = said(event="progress")
    assert progress.counters["messages_sent_total"] > 0
    assert progress.detail.endswith(" messages/s")
    send_command(platform, contracts, target="simulator", command=CommandKind.PAUSE, issued_by="test")
    first.process.terminate()
    first.result()

    second = start(environment=environment)
    run(listen(second, lambda: said(event="heartbeat", pid=second.process.pid), "a heartbeat of the next one"))
    second.process.terminate()
    assert second.result()["messages_sent"] == 0, "a paused market has sent"
    last = said(event="heartbeat", pid=second.process.pid)
    assert last.state is ProcessState.PAUSED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fault", "explode"], "expected kind or kind:name=value"),
        (["--source", "recordings", "--recordings-dir", "/nonexistent"], "no recordings in /nonexistent"),
        (["--address-file", "/proc/nonexistent/a"], "Choose another --address-file"),
        (["--ledger", "/proc/nonexistent"], "Choose another --ledger folder"),
        (["--ws-port", "{taken}"], "Choose another --ws-port"),
        (["--rest-port", "{taken}"], "Choose another --rest-port"),
        (["--kafka"], "no Kafka"),
        (["--instruments", "0"], "--instruments"),
        (["--rate", "many"], "--rate"),
    ],
)
def test_simulate_bad_input_is_a_clear_error_and_exit_code_2(
    tmp_path: Path, taken_port: int, arguments: list[str], words: str
) -> None:
    options = [item.format(taken=taken_port) for item in arguments]
    kafka = [] if "--kafka" in options else ["--no-kafka"]
    environment = {"STREAMFORGE_HOME": str(tmp_path)}
    result = CliRunner().invoke(app, ["simulate", "--duration-s", "0", *kafka, *options], env=environment)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", "").split())
    assert "Traceback" not in result.output


def test_simulate_recordings_unset_uses_the_synthetic_market_and_says_so(tmp_path: Path) -> None:
    options = ["simulate", "--source", "recordings", "--dry-run", "--output", "json", "--no-kafka"]
    result = CliRunner().invoke(app, options, env={"STREAMFORGE_HOME": str(tmp_path)})
    assert result.exit_code == 0
    assert "the synthetic market is used" in " ".join(result.stderr.split())
    assert json.loads(result.stdout)["source"] == "synthetic"


def test_simulate_dry_run_starts_nothing(tmp_path: Path) -> None:
    options = ["simulate", "--dry-run", "--output", "json", "--no-kafka", "--ledger", str(tmp_path / "ledger")]
    result = CliRunner().invoke(app, options)
    described = json.loads(result.stdout)
    assert described["dry_run"] is True
    assert len(described["instruments"]) == 8
    assert not (tmp_path / "ledger").exists()
    text = CliRunner().invoke(app, ["simulate", "--dry-run", "--no-kafka"])
    assert "BTCUSDT -> ETHUSDT" in text.stdout


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Return a port that something else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]
