"""`streamforge load history`: candle files into `venue-bars`, by the raw backfill topic and beside live data."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cli.common import DryRunOption, Output, OutputOption, command, emit, progress_bar

if TYPE_CHECKING:
    from streamforge.contracts import Contracts
    from streamforge.lakehouse.barrier import Barrier
    from streamforge.offsets import OffsetRange
    from streamforge.settings import Settings
    from streaming.loaders.history import HistoryPlan

_SHOWN_FILES = 10


class HistoryFormat(StrEnum):
    """What candle files look like; `streamforge.market.candles.FORMATS` says more of each."""

    CANDLES_1H = "candles_1h"
    CANDLES_1M = "candles_1m"


@command
def history(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders whose files of the format are taken.")],
    *,
    kind: Annotated[
        HistoryFormat,
        typer.Option(
            "--format", help="candles_1h: gzipped CSV of an hour a row. candles_1m: Feather of a minute a row."
        ),
    ],
    venue: Annotated[
        str | None,
        typer.Option(help="Venue whose candles they are. Default: BINANCE (candles_1h), BINANCEUSDM (candles_1m)."),
    ] = None,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0, help="Seconds to wait until the rows are in the table; 0: do not wait.")
    ] = 120.0,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Load candle files into the table `venue_bars`; live data and `bars` are not touched.

    The rows go to the raw backfill topic as they are; the history parser makes bars of them, the writer lands
    them. Loading a file again doubles nothing. What cannot be a bar is a dead letter with its reason.

    Example: streamforge load history candles_1h/ --format candles_1h
    """
    from cli.load import venue_label
    from streamforge.contracts import load_contracts
    from streamforge.market.candles import FORMATS
    from streamforge.settings import load_settings
    from streaming.loaders.history import load_history, plan_history

    settings = load_settings()
    plan = plan_history(paths, FORMATS[kind], None if venue is None else venue_label(venue))
    result = _planned(plan, dry_run=dry_run)
    if dry_run:
        emit(result, output, lambda: _table("Would load", result))
        return 0
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    with progress_bar(output) as report:
        ranges = load_history(settings, contracts, plan, progress=lambda done, total, name: report(name, done, total))
        if wait_s:
            _barrier(settings, contracts, ranges).wait(
                wait_s,
                on_look=lambda state: report(
                    "rows reach the table", len(state.conditions) - len(state.missing), len(state.conditions)
                ),
            )
    result |= {"landed": bool(wait_s)}
    emit(result, output, lambda: _table("Loaded", result))
    return 0


def _planned(plan: HistoryPlan, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "format": plan.format.name,
        "venue": plan.venue,
        "interval": plan.format.interval,
        "rows": plan.rows,
        "files": {str(item.path): {"instrument": item.instrument, "rows": item.rows} for item in plan.files},
        "files_left_alone": plan.others,
    }


def _barrier(settings: Settings, contracts: Contracts, ranges: list[OffsetRange]) -> Barrier:
    """Return what waits until the history parser has read the ranges and the table has what it made of them."""
    from streamforge.lakehouse.line import barrier_of
    from streaming.processors.history import KIND, VENUE_BARS

    return barrier_of(settings, contracts, VENUE_BARS, ranges, group_kind=KIND)


def _table(title: str, values: Mapping[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        text = f"{value:,}" if type(value) is int else str(value)
        if isinstance(value, Mapping):
            lines = [f"{item['instrument']}: {item['rows']:,} rows of {path}" for path, item in value.items()]
            more = [f"and {len(lines) - _SHOWN_FILES} more"] if len(lines) > _SHOWN_FILES else []
            text = "\n".join([*lines[:_SHOWN_FILES], *more])
        table.add_row(name.replace("_", " "), text)
    return table
