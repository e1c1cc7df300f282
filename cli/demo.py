"""`streamforge demo`: the whole line in two minutes, and a report of what became of every message."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cli.common import DryRunOption, Output, OutputOption, command, emit, error_console

if TYPE_CHECKING:
    from streamforge.demo.phases import Phase
    from streamforge.demo.report import DemoReport, ModelFigures
    from streamforge.lakehouse.table_freshness import Quantiles

_INTERRUPTED = 130
_WHAT = {
    "start": "starting Kafka, writer, bars, parser, market, loader",
    "models": "a history is loaded and a model trained through Dagster",
    "market": "the market runs and everything is captured",
    "landing": "market and loader stop, the tables catch up",
    "replay": "a range of trades is made again",
    "dagster": "the jobs that Dagster runs beside all this end",
    "recordings": "recorded messages are replayed",
    "verify": "every record is compared with its row",
    "stop": "stopping everything",
}


@command
def demo(
    *,
    events: Annotated[int, typer.Option(min=1, help="Messages to capture at least.")] = 100_000,
    rate: Annotated[
        float | None,
        typer.Option(min=1, help="Trades per second. Default: so that the events are there when a minute is over."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulated market.")] = 7,
    start_minutes_ago: Annotated[
        float,
        typer.Option(
            min=0, max=525_600, help="Let the market begin so long ago and run fast until now: bars come at once."
        ),
    ] = 0.0,
    recordings: Annotated[
        Path | None,
        typer.Option(help="Folder with recorded data (has ws_binance/): replayed as venue BINANCE afterwards."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the platform running after a good end.")] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Train a graph model through Dagster and forecast with it (group `ml`).")
    ] = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Run the whole line on a fresh home, lose nothing, prove it, and stop everything again.

    Starts the embedded Kafka, a simulated market, loader, parser, bars and writer; captures until enough has
    come and a minute is over; observes, checks and replays a range through Dagster; compares every record with its
    row; writes demo-report.json.
    Exit code 0 when nothing was lost, doubled or changed, 1 otherwise. Ctrl-C leaves nothing behind.

    Example: streamforge demo --events 50000
    """
    from cli.verify import raw_channels
    from streamforge import faults
    from streamforge.demo.home import REPORT_FILE, demo_home
    from streamforge.demo.run import DemoOptions, run_demo
    from streamforge.platform.signals import StopRequested
    from streamforge.processes import write_atomically
    from streamforge.settings import build_settings, load_settings
    from streaming.writer import WriterSettings

    common = load_settings()
    home = demo_home(common)
    if dry_run:
        plan = {"dry_run": True, "home": str(home), "events": events, "trades_per_s": rate, "keep": keep}
        emit(plan, output, lambda: f"would empty {home} and run the demo there with {events:,} events")
        return 0
    # The positions behind the last commit markers land soon after the market has stopped, not half a minute later.
    settings = build_settings(WriterSettings, home=home, recordings_dir=None, writer_idle_interval_s=1.0)
    options = DemoOptions(
        events=events,
        trades_per_s=rate,
        seed=seed,
        start_minutes_ago=start_minutes_ago,
        recordings_dir=recordings,
        keep=keep,
        models=models,
    )
    faults.arm(settings.kill_at)
    with _Screen() as screen:
        try:
            report = run_demo(settings, options, raw_channels(), screen)
        except StopRequested as request:
            screen.tell(f"stopped by {request}")
            report = None
    if report is None:
        error_console.print("The demo was stopped before its end; nothing is left running.", style="yellow")
        return _INTERRUPTED
    file = common.home_path / REPORT_FILE
    result = report.as_dict() | {"report": str(file), "kept_running": keep and report.ok}
    write_atomically(file, json.dumps(result, indent=2) + "\n")
    emit(result, output, lambda: _render(report, file, kept=keep and report.ok))
    return 0 if report.ok else 1


class _Screen:
    """Shows what is going on: bars on a terminal, one line a phase elsewhere; always on standard error."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[note]}", style="dim"),
            TimeElapsedColumn(),
            console=error_console,
            disable=not error_console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        self._progress.stop()

    def phase(self, phase: Phase) -> None:
        """Finish the bar of the last phase and begin another."""
        self._finish()
        if error_console.is_terminal:
            self._task = self._progress.add_task(f"{_WHAT[phase]:<52}", total=None, note="")
        else:
            error_console.print(f"{phase}: {_WHAT[phase]}", highlight=False, soft_wrap=True)

    def progress(self, done: int, total: int, note: str) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total or None, note=note)

    def tell(self, text: str) -> None:
        """Show a sentence beside the bar."""
        if self._task is None:
            error_console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._progress.update(self._task, note=text.splitlines()[0][:60])

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1, total=1, note="")
            self._progress.stop_task(self._task)


def _render(report: DemoReport, file: Path, *, kept: bool) -> Group:
    parts: list[Any] = [_headline(report), _tables(report)]
    if report.ledger is not None:
        found = report.ledger
        parts.append(
            Text(
                f"Ledger of the market: {found.sent:,} ids sent, {found.in_raw:,} captured, {found.in_gaps:,} in "
                f"published gaps, {found.lost:,} lost."
            )
        )
    if report.replay is not None:
        replay = report.replay
        said = "changed nothing" if replay.changed_nothing else "CHANGED THE TABLE"
        parts.append(
            Text(
                f"Replay of {', '.join(replay.ranges)}: {replay.rows:,} rows made again, {said} ({replay.hash_after})."
            )
        )
    if report.models is not None:
        parts.append(_model(report.models))
    if report.runs:
        parts.append(_runs(report))
    parts += [Text(f"Problem: {item}", style="bold red") for item in report.problems]
    parts.append(
        Text(
            "p50, p99: commit time of a row minus our receipt of its message; event: p99 of the same minus the "
            "venue's time. Of all rows that landed while the market ran, read from the tables.",
            style="dim",
        )
    )
    parts.append(_ways_on(report, file, kept=kept))
    return Group(*parts)


def _model(models: ModelFigures) -> Text:
    ordered = sorted(models.rmse.items(), key=lambda item: item[1])
    errors = ", ".join(f"{name} {value:.4f}" for name, value in ordered)
    role = "champion" if models.is_champion else "challenger, not promoted"
    return Text(
        f"Model {models.version} ({role}), trained through Dagster on {models.history_rows:,} candles; rmse of log "
        f"volatility: {errors}. {models.forecasts:,} forecasts of live bars landed."
    )


def _headline(report: DemoReport) -> Panel:
    grid = Table.grid(padding=(0, 3))
    for _ in range(4):
        grid.add_column(justify="right")
    fresh, event = report.freshness, report.event_freshness
    cells = [
        ("messages sent", f"{report.events_produced:,}"),
        ("rows landed", f"{report.rows_landed:,}"),
        ("messages/s", f"{report.events_per_s:,.0f}"),
        ("seconds in all", f"{report.wall_s:.1f}"),
        ("lost", f"{report.lost:,}"),
        ("doubled", f"{report.doubled:,}"),
        ("fresh p50, p99", _pair(fresh)),
        ("since the event", _pair(event)),
    ]
    for row in (cells[:4], cells[4:]):
        grid.add_row(*(Text(value, style="bold") for _, value in row))
        grid.add_row(*(Text(name, style="dim") for name, _ in row))
    title = "nothing lost, nothing doubled" if report.ok else "the demo found problems"
    return Panel(grid, title=title, border_style="green" if report.ok else "red", expand=False)


def _tables(report: DemoReport) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("table", no_wrap=True)
    for name in ("rows", "lost", "doubled", "commits", "p50 s", "p99 s", "event s"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in report.tables:
        received, event = item.received, item.event
        bad = "bold red" if item.lost or item.doubled else ""
        table.add_row(
            Text(item.table.rpartition(".")[2]),
            f"{item.rows:,}",
            Text(f"{item.lost:,}", style=bad),
            Text(f"{item.doubled:,}", style=bad),
            f"{item.commits:,}",
            _seconds(received.p50_s if received else None),
            _seconds(received.p99_s if received else None),
            _seconds(event.p99_s if event else None),
        )
    return table


def _runs(report: DemoReport) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("Dagster job", no_wrap=True)
    # Freshness warns in every demo: its market was stopped before anybody looked.
    for name in ("run", "seconds", "assets", "checks passed", "warned", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in report.runs:
        passed = sum(each.passed for each in item.checks)
        failed = sum(each.is_problem for each in item.checks)
        table.add_row(
            item.job,
            Text(item.status.lower(), style="" if item.status == "SUCCESS" else "bold red"),
            f"{item.wall_s:.1f}",
            f"{len(item.assets):,}",
            f"{passed:,}",
            f"{len(item.checks) - passed - failed:,}",
            Text(f"{failed:,}", style="bold red" if failed else ""),
        )
    return table


def _ways_on(report: DemoReport, file: Path, *, kept: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, place in (*report.files.items(), ("report", str(file))):
        table.add_row(name, Text(place))
    home = f"STREAMFORGE_HOME={report.files['home']}"
    if kept:
        table.add_row("still running", Text(f"{home} streamforge status   (and down)"))
    else:
        table.add_row("run it again", Text(f"{home} streamforge up   (Dagster's UI shows these runs)"))
    table.add_row("your own", Text("make up   (in .streamforge, until Ctrl-C)"))
    return table


def _pair(found: Quantiles | None) -> str:
    return "-" if found is None else f"{found.p50_s:.2f} s, {found.p99_s:.2f} s"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
