"""`streamforge load`: capture what a venue sends; `streamforge load history`: what files say of the past."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.table import Table

from cli.common import DryRunOption, Output, OutputOption, command, emit
from cli.history import history
from streamforge import faults
from streamforge.collector import calm_collector
from streamforge.contracts import load_contracts
from streamforge.errors import ConfigurationError
from streamforge.settings import build_settings
from streaming.loaders.base import LoaderSettings
from streaming.loaders.binance import CHANNELS, REST_URL, VENUE, WEBSOCKET_URL, Binance
from streaming.loaders.loader import load as run_loader
from streaming.loaders.loader import plan
from streaming.loaders.plan import LoadRequest

_ALL = "all"
_SCHEMES = {"--ws-url": ("ws://", "wss://"), "--rest-url": ("http://", "https://")}


app = typer.Typer(add_completion=False, rich_markup_mode="rich")
app.command("history")(history)


@app.callback(invoke_without_command=True)
@command
def load(
    context: typer.Context,
    *,
    venue: Annotated[str, typer.Option(help="Label of the venue: BINANCE, or SIM for the simulated market.")] = VENUE,
    ws_url: Annotated[str, typer.Option(help="Base URL of the venue's WebSocket streams.")] = WEBSOCKET_URL,
    rest_url: Annotated[str, typer.Option(help="Base URL of the venue's REST interface.")] = REST_URL,
    symbols: Annotated[
        str, typer.Option(help="Symbols as the venue writes them, with commas; or `all`, new listings included.")
    ] = "BTCUSDT,ETHUSDT",
    channels: Annotated[str, typer.Option(help="Channels, with commas.")] = ",".join(CHANNELS),
    slot: Annotated[str, typer.Option(help="Replica name, stable over restarts.")] = "0",
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of metrics and readiness; 0: a free one.")
    ] = 0,
    duration_s: Annotated[float | None, typer.Option(min=0, help="Stop after so many seconds.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop after at least so many frames.")] = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Capture what a venue sends into the raw topics, byte for byte, until stopped; or load history from files.

    SIGTERM and Ctrl-C stop it cleanly: what was read is acknowledged, or a gap says that it is not.

    Example: streamforge load --symbols BTCUSDT,ETHUSDT --channels trade --dry-run
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
        return 0
    request = LoadRequest(
        venue=Binance(venue_label(venue)),
        websocket_url=_url("--ws-url", ws_url),
        rest_url=_url("--rest-url", rest_url),
        symbols=None if symbols.strip().lower() == _ALL else _names(symbols.upper()),
        channels=_names(channels),
        slot=slot,
        metrics_port=metrics_port,
        duration_s=duration_s,
        max_frames=max_frames,
    )
    settings = build_settings(LoaderSettings)
    if dry_run:
        described = _described(request, settings)
        emit(described, output, lambda: _table("Would subscribe", described))
        return 0
    faults.arm(settings.kill_at)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    calm_collector()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        report = runner.run(run_loader(settings, contracts, request))
    result = report.counters | {"unsaid": report.unsaid, "wall_s": round(report.wall_s, 3)}
    emit(result, output, lambda: _table("Loaded", result))
    return 0


def _refuse_options_before(context: typer.Context) -> None:
    """Refuse options that stand before a subcommand: they are this command's, and it would not hear them."""
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        msg = f"{names}: put options behind `streamforge load {context.invoked_subcommand}`"
        raise ConfigurationError(msg)


def _described(request: LoadRequest, settings: LoaderSettings) -> dict[str, Any]:
    streams = asyncio.run(plan(request))
    per_channel = Counter(stream.channel.name for stream in streams)
    return {
        "dry_run": True,
        "url": request.venue.websocket_url(request.websocket_url),
        "connections": -(-len(streams) // settings.loader_streams_per_connection),
        "channels": dict(per_channel),
        "streams": {stream.name.decode(): stream.instrument for stream in streams},
    }


def venue_label(text: str) -> str:
    """Return the label of a venue.

    Raises:
        ConfigurationError: it is none.
    """
    if not text.isascii() or not text.isalnum() or text != text.upper():
        msg = f"--venue must be capital letters and digits, such as BINANCE or SIM; found {text!r}"
        raise ConfigurationError(msg)
    return text


def _url(option: str, text: str) -> str:
    if not text.startswith(_SCHEMES[option]):
        msg = f"{option} must begin with {' or '.join(_SCHEMES[option])}; found {text!r}"
        raise ConfigurationError(msg)
    try:
        parts = urlsplit(text)
        is_right = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, brackets that do not close
        is_right = False
    if not is_right:
        msg = f"{option} must be a URL with a host, and a port of 1 to 65535 where it has one; found {text!r}"
        raise ConfigurationError(msg)
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's factory where uvloop is installed; it is an option and not a dependency."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory


def _table(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        text = "\n".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, dict) else f"{value}"
        table.add_row(name.replace("_", " "), text)
    return table
