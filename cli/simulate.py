"""`streamforge simulate`: serve a simulated market over Binance's spot protocol."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from cli.common import DryRunOption, Output, OutputOption, command, emit, error_console

if TYPE_CHECKING:
    from streaming.simulator.process import Control, SimulatorPlan, SimulatorResult
    from streaming.simulator.server import MarketServer
    from streaming.simulator.settings import SimulatorSettings
    from streaming.simulator.source import MarketSource


class Source(StrEnum):
    """Where the market comes from."""

    SYNTHETIC = "synthetic"
    RECORDINGS = "recordings"


@command
def simulate(
    *,
    source: Annotated[Source, typer.Option(help="An invented market, or the recordings replayed.")] = Source.SYNTHETIC,
    instruments: Annotated[int, typer.Option(min=1, help="Synthetic: number of instruments.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Synthetic: seed of the market and of the faults' chances.")] = 7,
    rate: Annotated[float, typer.Option(min=0, help="Synthetic: mean trades per second of each instrument.")] = 5.0,
    start_minutes_ago: Annotated[
        float,
        typer.Option(min=0, max=525_600, help="Synthetic: start the market so long ago and run it fast until now."),
    ] = 0.0,
    seasonality: Annotated[bool, typer.Option("--seasonality", help="Synthetic: activity follows the hour.")] = False,
    speed: Annotated[float, typer.Option(min=0, help="Recordings: seconds per second; 0: as fast as taken.")] = 1.0,
    recordings_dir: Annotated[
        Path | None, typer.Option(help="Folder that has ws_binance/ (or STREAMFORGE_RECORDINGS_DIR).")
    ] = None,
    ws_port: Annotated[int, typer.Option(min=0, max=65_535, help="WebSocket port; 0: a free one.")] = 0,
    rest_port: Annotated[int, typer.Option(min=0, max=65_535, help="REST port; 0: a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    address_file: Annotated[
        Path | None, typer.Option(help="Write {ws_url, rest_url} as JSON here once both servers listen.")
    ] = None,
    ledger: Annotated[Path | None, typer.Option(help="Folder for the ledger of everything sent.")] = None,
    start_streams: Annotated[
        int | None,
        typer.Option(min=0, help="Stand still until so many streams are listened to. Recordings: 1, synthetic: 0."),
    ] = None,
    max_messages: Annotated[int | None, typer.Option(min=1, help="Stop after so many messages.")] = None,
    exit_at_end: Annotated[bool, typer.Option("--exit-at-end", help="Recordings: stop once all were sent.")] = False,
    duration_s: Annotated[float | None, typer.Option(min=0, help="Stop after so many seconds.")] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="Something to go wrong, kind:name=value,... (drop:count=3,at_s=10). May be repeated."),
    ] = None,
    kafka: Annotated[
        bool | None,
        typer.Option(
            "--kafka/--no-kafka", help="Publish queue-events, obey queue-control. Default: if a broker is set."
        ),
    ] = None,
    slot: Annotated[str, typer.Option(help="Name of this simulator in events and commands.")] = "0",
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of metrics and readiness; 0: a free one.")
    ] = 0,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Serve a simulated market over Binance's spot protocol until it is stopped or a bound is reached.

    Example: streamforge simulate --rate 50 --ledger ledger --address-file address.json
    """
    from streamforge import logs
    from streaming.simulator.faults import parse_fault
    from streaming.simulator.process import SimulatorPlan

    settings = _settings(host, ws_port, rest_port, recordings_dir)
    logs.configure(settings)
    source = _available(source, settings)
    plan = SimulatorPlan(
        faults=[parse_fault(text) for text in fault or []],
        fault_seed=seed,
        ledger_dir=ledger,
        address_file=address_file,
        start_streams=start_streams if start_streams is not None else int(source is Source.RECORDINGS),
        max_messages=max_messages,
        ends_with_market=exit_at_end,
        duration_s=duration_s,
    )
    if source is Source.RECORDINGS:
        market = _recorded(settings, speed)
    else:
        market = _synthetic(instruments, seed, rate, start_minutes_ago, seasonality=seasonality)
    description = _description(source, market)
    if dry_run:
        emit({"dry_run": True, **description}, output, lambda: _table("would serve", description))
        return 0
    process = _Process(slot, metrics_port, kafka)
    summary = description | _served(market, settings, plan, process, output)
    emit(summary, output, lambda: _table("served", summary))
    return 0


def _settings(host: str, ws_port: int, rest_port: int, recordings_dir: Path | None) -> SimulatorSettings:
    from streamforge.settings import build_settings
    from streaming.simulator.settings import SimulatorSettings

    folder = {} if recordings_dir is None else {"recordings_dir": recordings_dir}
    ports = {"simulator_ws_port": ws_port, "simulator_rest_port": rest_port}
    return build_settings(SimulatorSettings, simulator_host=host, **ports, **folder)


def _available(source: Source, settings: SimulatorSettings) -> Source:
    """Return `source`, or the synthetic one, with a notice, where no recordings are set."""
    if source is Source.SYNTHETIC or settings.recordings_dir is not None:
        return source
    error_console.print(
        "no recordings folder is set (STREAMFORGE_RECORDINGS_DIR or --recordings-dir): the synthetic market is used"
    )
    return Source.SYNTHETIC


class _Process(NamedTuple):
    """How this process appears among others."""

    slot: str
    metrics_port: int
    kafka: bool | None


def _served(
    market: MarketSource, settings: SimulatorSettings, plan: SimulatorPlan, process: _Process, output: Output
) -> dict[str, Any]:
    """Serve to the end and return what there is to say about it."""
    import asyncio

    from streamforge.collector import calm_collector
    from streamforge.metrics import MetricsServer, ProcessMetrics
    from streaming.simulator.metrics import KIND
    from streaming.simulator.process import run_simulator

    calm_collector()
    metrics = ProcessMetrics(KIND, process.slot)
    with closing(MetricsServer(metrics, port=process.metrics_port, host=settings.metrics_host)) as server:
        serving = run_simulator(
            market,
            settings,
            plan,
            control=_control(settings, process, metrics_port=server.port),
            metrics=metrics,
            announce=_announced(output, server.port),
            progress=_progress(output),
        )
        return _summary(asyncio.run(serving))


def _recorded(settings: SimulatorSettings, speed: float) -> MarketSource:
    from streaming.simulator.recordings import RecordedMarket

    return RecordedMarket(settings.recordings_dir or Path(), speed=speed)


def _synthetic(
    instruments: int, seed: int, rate: float, start_minutes_ago: float, *, seasonality: bool
) -> MarketSource:
    import time

    from streaming.simulator.instruments import default_instruments
    from streaming.simulator.synthetic import SyntheticMarket, SyntheticSettings

    start_ms = time.time_ns() // 1_000_000 - int(start_minutes_ago * 60_000)
    settings = SyntheticSettings(start_ms=start_ms, seed=seed, trades_per_s=rate, seasonality=seasonality)
    return SyntheticMarket(default_instruments(instruments), settings)


def _control(settings: SimulatorSettings, process: _Process, *, metrics_port: int) -> Control | None:
    """Return the Kafka side: when it is wanted, or nothing is said and a broker is set."""
    from streamforge.errors import ConfigurationError
    from streamforge.kafka import bootstrap_servers

    if process.kafka is False:
        return None
    try:
        bootstrap_servers(settings)
    except ConfigurationError:
        if process.kafka:
            raise
        return None
    from streaming.simulator.control import KafkaControl

    return KafkaControl(settings, process.slot, metrics_port=metrics_port)


def _description(source: Source, market: MarketSource) -> dict[str, Any]:
    return {
        "source": source.value,
        "instruments": [spec.symbol for spec in market.instruments()],
        "channels": list(market.channels()),
        "spillovers": [edge._asdict() for edge in market.graph],
    }


def _summary(result: SimulatorResult) -> dict[str, Any]:
    return asdict(result) | {"messages_per_s": round(result.messages_per_s, 1), "wall_s": round(result.wall_s, 3)}


def _announced(output: Output, metrics_port: int) -> Callable[[str, str], None]:
    def announce(ws_url: str, rest_url: str) -> None:
        if output is Output.TEXT:
            text = f"WebSocket {ws_url}   REST {rest_url}   metrics on port {metrics_port}   (Ctrl-C stops)"
            error_console.print(text, highlight=False)

    return announce


def _progress(output: Output) -> Callable[[MarketServer], None] | None:
    """Return a printer of one line in place for people; none where nobody looks."""
    if output is not Output.TEXT or not error_console.is_terminal:
        return None
    last = 0

    def show(server: MarketServer) -> None:
        nonlocal last
        rate, last = server.messages_sent - last, server.messages_sent
        error_console.print(f"{server.messages_sent:>12,} messages   {rate:>8,}/s", end="\r", highlight=False)

    return show


def _table(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        if name == "spillovers":
            text = "\n".join(f"{e['leader']} -> {e['follower']} after {e['lag_s']} s, {e['weight']}" for e in value)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(name, text)
    return table
