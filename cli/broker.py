"""`streamforge broker`: the embedded Kafka broker of this platform's home."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.common import DryRunOption, Output, OutputOption, command, emit, error_console

if TYPE_CHECKING:
    from streamforge.broker import BrokerStatus

app = typer.Typer(help="Start, stop and look at the embedded Kafka broker.", no_args_is_help=True)

_GOOD_STATES = ("running", "external", "stopped")


@app.command()
@command
def start(
    *,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for the broker's first answer.")] = 120.0,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Start the broker in the background and wait until it answers; a running one is left alone.

    The first start fetches Kafka from Maven (about 20 s) and formats the data folder; ports are chosen
    then and remembered. Needs no Java on this machine.

    Example: streamforge broker start
    """
    from streamforge import broker
    from streamforge.settings import load_settings

    settings = load_settings()
    if dry_run:
        found = broker.status(settings)
        starts = found.state not in (broker.BrokerState.RUNNING, broker.BrokerState.EXTERNAL)
        _show(found, output, would="start" if starts else "do nothing")
        return 0
    with error_console.status("starting the broker"):
        found = broker.start(settings, timeout_s=timeout_s)
    _show(found, output)
    return 0


@app.command()
@command
def stop(
    *,
    deadline_s: Annotated[float, typer.Option(min=0.0, help="Seconds for a clean end before it is killed.")] = 30.0,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Stop the broker cleanly; its data stays. Harmless when none runs.

    Example: streamforge broker stop --deadline-s 10
    """
    from streamforge import broker
    from streamforge.settings import load_settings

    settings = load_settings()
    if dry_run:
        found = broker.status(settings)
        _show(found, output, would="do nothing" if found.pid is None else "stop")
        return 0
    with error_console.status("stopping the broker"):
        found = broker.stop(settings, deadline_s=deadline_s)
    _show(found, output)
    return 0


@app.command()
@command
def status(*, output: OutputOption = Output.TEXT) -> int:
    """Say whether the broker runs and answers, and where; exit code 1 when it should and does not.

    Example: streamforge broker status --output json
    """
    from streamforge import broker
    from streamforge.settings import load_settings

    found = broker.status(load_settings())
    _show(found, output)
    return 0 if found.state in _GOOD_STATES else 1


@app.command()
@command
def run() -> int:
    """Run the broker in the foreground, for a supervisor: this process becomes Java, signals reach it.

    Example: streamforge broker run
    """
    from streamforge import broker
    from streamforge.settings import load_settings

    broker.run(load_settings())


def as_dict(found: BrokerStatus) -> dict[str, Any]:
    """Return a broker's status as plain values for a JSON report."""
    return {
        "state": str(found.state),
        "address": found.address,
        "pid": found.pid,
        "uptime_s": found.uptime_s,
        "cluster_id": found.cluster_id,
        "log_file": None if found.log_file is None else str(found.log_file),
        "notes": list(found.notes),
        "log_tail": list(found.log_tail),
        "advice": advice(found),
    }


def advice(found: BrokerStatus) -> str:
    """Return what to do about a broker in this state; empty when nothing needs to be done."""
    return {
        "died": "It ended without being asked to. See the log, then run `streamforge broker start`: its data is kept",
        "unresponsive": "It lives but does not answer. Wait, or run `streamforge broker stop` and start it again",
        "unreachable": "Check STREAMFORGE_BOOTSTRAP_SERVERS, the security settings and the network",
        "stopped": "Run `streamforge broker start`",
    }.get(str(found.state), "")


def _show(found: BrokerStatus, output: Output, *, would: str | None = None) -> None:
    result = as_dict(found) | ({} if would is None else {"dry_run": True, "would": would})
    emit(result, output, lambda: _render(result))


def _render(result: Mapping[str, Any]) -> Group:
    table = Table(show_header=False, box=None)
    color = "green" if result["state"] in _GOOD_STATES else "red"
    table.add_row("state", Text(result["state"], style=f"bold {color}"))
    for name in ("would", "address", "pid", "uptime_s", "cluster_id", "log_file"):
        if result.get(name) is not None:
            table.add_row(name, Text(str(result[name])))
    lines = [Text(note, style="yellow") for note in result["notes"]]
    if result["log_tail"]:
        lines.append(Text("last lines of its log:"))
        lines += [Text("  " + line, style="dim") for line in result["log_tail"]]
    if result["advice"]:
        lines.append(Text(result["advice"]))
    return Group(table, *lines)
