"""One simulator process: its market, both servers and its ledger, from start to a clean end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from streamforge.errors import ConfigurationError, StreamForgeError
from streamforge.ledger import LedgerWriter
from streamforge.metrics import ProcessMetrics
from streaming.simulator.faults import Fault, FaultPlan
from streaming.simulator.metrics import KIND, MarketCollector
from streaming.simulator.rest import RestServer
from streaming.simulator.server import MarketServer
from streaming.simulator.settings import SimulatorSettings
from streaming.simulator.source import MarketSource

_NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class SimulatorPlan:
    """What one run of the simulator is asked to do.

    Args:
        faults: asked for at the start.
        fault_seed: of the faults' chances.
        ledger_dir: folder of the ledger; none keeps no ledger.
        address_file: where the servers' URLs are written as JSON; none writes them nowhere.
        start_streams: the market stands still until so many streams are listened to.
        max_messages: stop after so many messages.
        ends_with_market: stop when recordings are at their end.
        duration_s: stop after so many seconds.
    """

    faults: Sequence[Fault] = ()
    fault_seed: int = 0
    ledger_dir: Path | None = None
    address_file: Path | None = None
    start_streams: int = 0
    max_messages: int | None = None
    ends_with_market: bool = False
    duration_s: float | None = None


class Control(Protocol):
    """Something that tells a running simulator what to do."""

    async def run(self, server: MarketServer) -> None:
        """Obey until cancelled; `server` is paused until this says otherwise."""

    def close(self, error: StreamForgeError | None) -> None:
        """Say how it ended and let go of clients."""


@dataclass(frozen=True, slots=True)
class SimulatorResult:
    """What one run did."""

    ws_url: str
    rest_url: str
    messages_sent: int
    connections: int
    wall_s: float
    ledger_file: str | None

    @property
    def messages_per_s(self) -> float:
        """Return the mean rate over the whole run."""
        return self.messages_sent / self.wall_s if self.wall_s else 0.0


async def run_simulator(
    source: MarketSource,
    settings: SimulatorSettings,
    plan: SimulatorPlan,
    *,
    control: Control | None = None,
    metrics: ProcessMetrics | None = None,
    announce: Callable[[str, str], None] | None = None,
    progress: Callable[[MarketServer], None] | None = None,
) -> SimulatorResult:
    """Serve `source` until a bound of the plan, SIGTERM or SIGINT; then close in good order.

    Args:
        source: the market.
        settings: addresses and the venue's limits.
        plan: what to do.
        control: obeyed while it runs.
        metrics: gets the simulator's figures, and is ready while both servers listen.
        announce: called with the WebSocket and the REST URL once both servers listen.
        progress: called about once a second.

    Raises:
        ConfigurationError: a port is taken, or a file cannot be written.
    """
    started_ns = time.monotonic_ns()
    ledger = None
    if plan.ledger_dir is not None:
        ledger = LedgerWriter(plan.ledger_dir, flush_interval_ms=settings.simulator_ledger_flush_ms)
    server = MarketServer(
        source,
        settings,
        faults=FaultPlan(plan.fault_seed),
        ledger=ledger,
        start_streams=plan.start_streams,
        max_messages=plan.max_messages,
        ends_with_market=plan.ends_with_market,
    )
    for fault in plan.faults:
        server.faults.add(fault, server.monotonic_ns())
    rest = RestServer(source, settings, server.clock_ns)
    server.paused = control is not None
    metrics = metrics or ProcessMetrics(KIND, "")
    metrics.registry.register(MarketCollector(server))
    failure: StreamForgeError | None = None
    try:
        await server.start()
        await rest.start()
        host = settings.simulator_host
        ws_url, rest_url = f"ws://{host}:{server.port}", f"http://{host}:{rest.port}"
        _write_address(plan.address_file, ws_url, rest_url)
        metrics.set_ready(True)
        if announce is not None:
            announce(ws_url, rest_url)
        await _serve(server, plan, control, progress)
    except StreamForgeError as error:
        failure = error
        raise
    finally:
        metrics.set_ready(False)
        await rest.close()
        await server.close()
        if control is not None:
            control.close(failure)
    wall_s = (time.monotonic_ns() - started_ns) / _NS_PER_S
    ledger_file = str(ledger.path) if ledger is not None else None
    return SimulatorResult(ws_url, rest_url, server.messages_sent, server.connections_total, wall_s, ledger_file)


async def _serve(
    server: MarketServer,
    plan: SimulatorPlan,
    control: Control | None,
    progress: Callable[[MarketServer], None] | None,
) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    helpers = []
    if plan.duration_s is not None:
        loop.call_later(plan.duration_s, server.stop)
    if control is not None:
        helpers.append(asyncio.create_task(control.run(server)))
    if progress is not None:
        helpers.append(asyncio.create_task(_report(server, progress)))
    for helper in helpers:
        # A helper ends by itself only when it fails: the simulator must not go on without it.
        helper.add_done_callback(lambda _: server.stop())
    try:
        await server.run()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        for helper in helpers:
            helper.cancel()
        ends = await asyncio.gather(*helpers, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


async def _report(server: MarketServer, progress: Callable[[MarketServer], None]) -> None:
    while True:
        await asyncio.sleep(1)
        progress(server)


def _write_address(path: Path | None, ws_url: str, rest_url: str) -> None:
    if path is None:
        return
    body: dict[str, Any] = {"ws_url": ws_url, "rest_url": rest_url}
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.encode(body))
        part.replace(path)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}. Choose another --address-file"
        raise ConfigurationError(msg) from error
