"""`streamforge backfill`: run past windows of event time again from the tables."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.common import DryRunOption, Output, OutputOption, command, emit
from cli.replay import progress_bars
from streamforge import faults
from streamforge.contracts import load_contracts
from streamforge.lakehouse.bars_backfill import Window, backfill_bars, plan_bars
from streamforge.lakehouse.replay_ranges import parse_time
from streamforge.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="Run past windows of event time again from the tables.")


@app.callback()
def root() -> None:
    """Run past windows of event time again from the tables."""


@app.command("bars")
@command
def bars(
    *,
    from_time: Annotated[str, typer.Option("--from", help="Start, a full minute, ISO 8601 with offset.")],
    to_time: Annotated[str, typer.Option("--to", help="End, excluded.")],
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Build bars again from the table trades and land those that the table bars lacks or has wrong.

    They become revisions of a higher replay epoch, in one table snapshot, beside the live writer. Where every
    bar is equal there is none. Bars that a late trade may still correct are left to the stream.

    Example: streamforge backfill bars --from 2026-11-24T06:00Z --to 2026-11-24T12:00Z --dry-run
    """
    settings = load_settings()
    faults.arm(settings.kill_at)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    window = Window.of(parse_time(from_time), parse_time(to_time))
    with progress_bars(shown=output is Output.TEXT) as hear:
        if dry_run:
            result = plan_bars(settings, contracts, window, progress=hear).as_dict() | {"dry_run": True}
        else:
            result = backfill_bars(settings, contracts, window, progress=hear).as_dict() | {"dry_run": False}
    emit(result, output, lambda: _render(result))
    return 0


def _render(result: dict[str, Any]) -> Group:
    grid = Table(show_header=False, box=None)
    grid.add_row("window", f"{result['window_start']} to {result['window_end']}")
    names = ("built", "equal", "missing", "different", "still_open", "without_trades")
    grid.add_row("bars", ", ".join(f"{result[f'bars_{name}']:,} {name.replace('_', ' ')}" for name in names))
    grid.add_row("content", f"built {result['content_hash_built']}, now {result['content_hash_now']}")
    if result["trades_refused"]:
        grid.add_row("refused", f"{result['trades_refused']:,} trades with which a sum would not fit")
    return Group(Text(_headline(result), style="bold"), grid)


def _headline(result: dict[str, Any]) -> str:
    if result["dry_run"]:
        return "bars: a backfill would " + ("land bars" if result["changes"] else "change nothing")
    if not result["committed"]:
        return "bars: every bar is already equal, nothing was changed"
    return (
        f"bars: landed as replay epoch {result['replay_epoch']} in table snapshot {result['committed_snapshot_id']} "
        f"(commit {result['commit_id']}, {result['wall_s']:.1f} s)"
    )
