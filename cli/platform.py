"""`streamforge up`, `down` and `status`: the platform as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.broker import as_dict as broker_as_dict
from cli.common import DryRunOption, Output, OutputOption, command, emit, error_console

if TYPE_CHECKING:
    from streamforge.platform.plan import PlatformPlan
    from streamforge.platform.report import PlatformReport

_STOPPED_WHILE_STARTING = 130
_URLS = {
    "metrics": "http://127.0.0.1:{port}/metrics",
    "websocket": "ws://127.0.0.1:{port}",
    "rest": "http://127.0.0.1:{port}/api/v3",
    "ui": "http://127.0.0.1:{port}",
}
_WELL = {"RUNNING": "green", "STARTING": "yellow"}


@command
def up(
    *,
    detach: Annotated[bool, typer.Option("--detach", help="Return when all is up; stop it with `down`.")] = False,
    simulator: Annotated[
        bool, typer.Option("--simulator/--no-simulator", help="Simulated market, or the real venue.")
    ] = True,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Start broker, topics, market, loader, parser, bars, writer and Dagster, and keep them running until Ctrl-C.

    A process that dies is restarted with backoff, unless it ended with exit code 0, 2 or 3. On Ctrl-C,
    SIGTERM or a failure everything that was started is stopped, the broker last.
    STREAMFORGE_DAGSTER=false leaves Dagster out.

    Example: streamforge up --detach, then streamforge status, then streamforge down
    """
    from streamforge.platform.lifecycle import plan_platform
    from streamforge.platform.lifecycle import up as start_platform
    from streamforge.platform.signals import StopRequested
    from streamforge.settings import load_settings

    settings = load_settings()
    if dry_run:
        plan = plan_platform(settings, simulator=simulator, dagster=settings.dagster)
        emit(_plan_dict(plan), output, lambda: _render_plan(plan, "would run"))
        return 0
    try:
        start_platform(
            settings,
            simulator=simulator,
            detach=detach,
            tell=_tell,
            ready=lambda plan: emit(_plan_dict(plan), output, lambda: _render_ready(plan, detach=detach)),
        )
    except StopRequested as request:
        _tell(f"stopped by {request} while starting")
        return _STOPPED_WHILE_STARTING
    return 0


@command
def down(*, dry_run: DryRunOption = False, output: OutputOption = Output.TEXT) -> int:
    """Stop everything of this platform's home that still runs, the broker last; harmless when nothing does.

    Processes are found by the pid and creation time that they wrote down, never by name.

    Example: streamforge down
    """
    from streamforge.platform import lifecycle
    from streamforge.settings import load_settings

    settings = load_settings()
    if dry_run:
        running = lifecycle.what_runs(settings)
        result = {"would_stop": running, "dry_run": True}
        emit(result, output, lambda: f"would stop: {', '.join(running) or 'nothing runs'}")
        return 0
    stopped = lifecycle.down(settings, _tell)
    emit({"stopped": stopped, "dry_run": False}, output, lambda: f"stopped: {', '.join(stopped) or 'nothing ran'}")
    return 0


@command
def status(*, output: OutputOption = Output.TEXT) -> int:
    """Show each process: state, pid, uptime, restarts, how it last ended, position and lag.

    Exit code 0 when everything that was started runs, 1 otherwise.

    Example: streamforge status --output json
    """
    from streamforge.platform.report import report
    from streamforge.settings import load_settings

    found = report(load_settings())
    result = {
        "supervisor_pid": found.supervisor_pid,
        "is_well": found.is_well,
        "broker": broker_as_dict(found.broker),
        "ui_url": found.ui_url,
        "processes": found.processes_as_dicts(),
        "notes": list(found.notes),
    }
    emit(result, output, lambda: _render_status(found))
    return 0 if found.is_well else 1


def _tell(text: str) -> None:
    error_console.print(text, markup=False, highlight=False, soft_wrap=True)


def _plan_dict(plan: PlatformPlan) -> dict[str, Any]:
    return {
        "home": plan.home,
        "ui_url": plan.ui_url,
        "processes": [
            {"name": item.name, "command": item.command, "ports": item.ports, "log_file": item.log_file}
            for item in plan.processes
        ],
        "notes": plan.notes,
    }


def _render_plan(plan: PlatformPlan, title: str) -> Table:
    table = Table("process", "ports", "log", "command", title=title, box=box.SIMPLE)
    for item in plan.processes:
        ports = ", ".join(f"{name} {port}" for name, port in item.ports.items())
        table.add_row(item.name, ports, Text(item.log_file, overflow="fold"), Text(" ".join(item.command[1:])))
    return table


def _render_ready(plan: PlatformPlan, *, detach: bool) -> Group:
    table = Table("process", "where", "log", title="the platform is up", box=box.SIMPLE)
    for item in plan.processes:
        where = [_URLS.get(name, "{name} {port}").format(name=name, port=port) for name, port in item.ports.items()]
        table.add_row(item.name, "\n".join(where), Text(item.log_file, overflow="fold"))
    last = "Stop it with `streamforge down`" if detach else "Stop it with Ctrl-C"
    ui = [Text(f"Dagster: {plan.ui_url}", style="bold")] if plan.ui_url else []
    return Group(table, *ui, Text(f"`streamforge status` shows positions and lag. {last}."))


def _render_status(found: PlatformReport) -> Group:
    table = Table("process", "state", "pid", "up", "restarts", "last end", "next offsets", "lag", box=box.SIMPLE)
    for item in found.processes:
        state = item.state.lower()
        if item.is_up and item.own_state not in (None, state):
            state += f" ({item.own_state})"
        table.add_row(
            Text(item.name, no_wrap=True),
            Text(state, style=_WELL.get(item.state, "red")),
            str(item.pid or ""),
            "" if item.uptime_s is None else f"{item.uptime_s:.0f} s",
            str(item.restarts),
            item.last_end or "",
            f"{sum(item.positions.values()):,}" if item.positions else "",
            f"{sum(item.lag.values()):,}" if item.lag else "",
        )
    head = f"broker {found.broker.state} at {found.broker.address}"
    head += f", supervisor pid {found.supervisor_pid}" if found.supervisor_pid else ", no supervisor runs"
    ui = [Text(f"Dagster: {found.ui_url}")] if found.ui_url else []
    return Group(Text(head), *ui, table, *(Text(note, style="yellow") for note in found.notes))
