"""`streamforge replay`: re-run source ranges and replace exactly the rows that came from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cli.common import DryRunOption, Output, OutputOption, command, emit, error_console
from streamforge import faults
from streamforge.contracts import load_contracts
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.raw_table import parts_from_table
from streamforge.lakehouse.remake import lineage_of
from streamforge.lakehouse.replay import WAIT_S, preview, replay
from streamforge.lakehouse.replay_plan import parse_offsets
from streamforge.lakehouse.replay_ranges import (
    parse_time,
    ranges_by_event_time,
    ranges_by_produce_time,
    ranges_of_log,
)
from streamforge.lakehouse.replay_target import Progress as Hear
from streamforge.lakehouse.replay_target import Target, open_target, topic_settings
from streamforge.offsets import OffsetRange
from streamforge.settings import load_settings
from streamforge.spark.replay import EngineChoice, choose_engine

_SHOWN_RANGES = 8


Find = Callable[[Target], Sequence[OffsetRange]]


class TimeKind(StrEnum):
    """Which time `--from-time` and `--to-time` mean."""

    EVENT = "event"
    PRODUCE = "produce"


@dataclass(frozen=True, slots=True)
class _Window:
    start: datetime
    end: datetime
    kind: TimeKind


@command
def replay_command(
    table: Annotated[str, typer.Argument(help="Table to replay, for instance trades.")],
    *,
    offsets: Annotated[
        list[str] | None,
        typer.Option("--offsets", metavar="PARTITION:START-END", help="Source offsets, END excluded; can be repeated."),
    ] = None,
    from_time: Annotated[str | None, typer.Option(help="Start of a time window, ISO 8601 with offset.")] = None,
    to_time: Annotated[str | None, typer.Option(help="End of the window, excluded.")] = None,
    time: Annotated[
        TimeKind, typer.Option(help="event: the table's own time; produce: when Kafka was given the record.")
    ] = TimeKind.EVENT,
    everything: Annotated[bool, typer.Option("--all", help="Everything that Kafka holds of the source topic.")] = False,
    wait_s: Annotated[
        float, typer.Option(min=0, help="Longest wait until the live path has landed the range, seconds.")
    ] = WAIT_S,
    engine: Annotated[
        EngineChoice, typer.Option(help="Where rows are made again; auto: in Spark from 5 million offsets on.")
    ] = EngineChoice.AUTO,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Make the rows of a source range again and replace exactly those, beside the live writer.

    Offsets are of the topic that the rows are made from: `raw-trades` for the table trades, which is parsed
    again; the table's own topic for raw_trades, raw_depth, bars and market_gaps, which is landed again.
    Bars are not computed anew from trades. What Kafka's retention has dropped of `raw-trades` is read from
    the table raw_trades; the plan says which source each range comes from.

    It waits until the live path has landed the range, then makes one table snapshot. Where every row is
    already equal it makes none, so a second replay changes nothing. Spark makes the same rows as this process
    does, one topic-partition a task; it pays for many records.

    Example: streamforge replay trades --offsets 3:1000-2000 --dry-run
    """
    settings = load_settings()
    faults.arm(settings.kill_at)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    lineage = lineage_of(contracts, table)
    asked = parse_offsets(offsets or (), topic_settings(lineage.source.topic).name)
    find = _wish(asked, _window(from_time, to_time, time), everything=everything)
    target = open_target(settings, contracts, table)
    ranges = find(target)
    if not ranges:
        msg = f"nothing to replay: no record of {target.source.topic} is meant"
        raise ConfigurationError(msg)
    chosen = choose_engine(engine, settings, ranges, from_table=parts_from_table(target, ranges))
    with progress_bars(shown=output is Output.TEXT) as hear:
        if dry_run:
            plan, barrier = preview(settings, contracts, table, ranges, engine=chosen, progress=hear)
            result = {**plan.as_dict(), "barrier": barrier.as_dict(), "dry_run": True}
        else:
            report = replay(settings, contracts, table, ranges, engine=chosen, wait_s=wait_s, progress=hear)
            result = {**report.as_dict(), "dry_run": False}
    emit(result, output, lambda: render_replay(result))
    return 0


def _wish(offsets: Sequence[OffsetRange], window: _Window | None, *, everything: bool) -> Find:
    """Return what finds the ranges; checked before anything is opened."""
    if bool(offsets) + (window is not None) + everything != 1:
        msg = "say what to replay, one of: --offsets (repeatable), --from-time with --to-time, --all"
        raise ConfigurationError(msg)
    if window is not None:
        find = ranges_by_event_time if window.kind is TimeKind.EVENT else ranges_by_produce_time
        return partial(find, start=window.start, end=window.end)
    return ranges_of_log if everything else lambda _: tuple(offsets)


def _window(from_time: str | None, to_time: str | None, kind: TimeKind) -> _Window | None:
    if from_time is None and to_time is None:
        return None
    if from_time is None or to_time is None:
        msg = "a time window needs both --from-time and --to-time"
        raise ConfigurationError(msg)
    window = _Window(parse_time(from_time), parse_time(to_time), kind)
    if window.start >= window.end:
        msg = f"the window from {from_time} to {to_time} holds nothing: --from-time must be before --to-time"
        raise ConfigurationError(msg)
    return window


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[Hear]:
    """Show a bar for each stage on standard error; nothing where it is no terminal."""
    bars = Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=error_console,
        transient=True,
        disable=not (shown and error_console.is_terminal),
    )
    tasks: dict[str, TaskID] = {}

    def hear(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage)
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield hear


def render_replay(result: dict[str, Any]) -> Group:
    """Return the report of a replay or of its plan as people read it."""
    grid = Table(show_header=False, box=None)
    places = {"table": "from the raw table", "kafka": "from Kafka"}
    shown = [
        f"{item} [{a}, {b}) {said}"
        for place, said in places.items()
        for item, pairs in result["sources"][place].items()
        for a, b in pairs
    ]
    more = [f"and {len(shown) - _SHOWN_RANGES} more"] if len(shown) > _SHOWN_RANGES else []
    grid.add_row("source", Text("\n".join([*shown[:_SHOWN_RANGES], *more])))
    grid.add_row("rows now", f"{result['rows_now']:,}")
    grid.add_row("rows after", f"{result['rows_after']:,}")
    changes = ("equal", "changed", "added", "gone")
    grid.add_row("of them", ", ".join(f"{result[f'rows_{name}']:,} {name}" for name in changes))
    if result["dropped"]:
        grid.add_row("no row", ", ".join(f"{count:,} {reason}" for reason, count in result["dropped"].items()))
    kept = f"{result['rows_kept_in_files']:,} rows of other ranges lie in them and stay as they are"
    grid.add_row("files", f"{result['files_touched']:,} touched; {kept}")
    if result["warning"] and (result["dry_run"] or result["committed"]):
        grid.add_row("mind", Text(result["warning"], style="yellow"))
    grid.add_row("barrier", Text(_barrier_text(result["barrier"])))
    return Group(Text(_headline(result), style="bold"), grid)


def _barrier_text(barrier: dict[str, Any]) -> str:
    if barrier["reached"]:
        return "reached: the live path has landed the ranges"
    behind = [item for item in barrier["conditions"] if item["behind"]]
    lines = [f"{i['who']}: {i['topic_partition']} at {i['reached']:,} of {i['needed']:,}" for i in behind]
    return "\n".join(["NOT reached, rows under way are missing in this plan:", *lines])


def _headline(result: dict[str, Any]) -> str:
    name = result["table"]
    if result["dry_run"]:
        return f"{name}: a replay would " + ("replace rows" if result["changes"] else "change nothing")
    if not result["committed"]:
        return f"{name}: every row is already equal, nothing was changed"
    return (
        f"{name}: replaced in table snapshot {result['committed_snapshot_id']} "
        f"(commit {result['commit_id']}, {result['files_added']} new files, {result['wall_s']:.1f} s, "
        f"engine {result['engine']})"
    )
