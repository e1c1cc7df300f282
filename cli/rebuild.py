"""`streamforge rebuild`: make a table anew from everything that its source still holds."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.common import DryRunOption, Output, OutputOption, command, emit
from cli.replay import progress_bars, render_replay
from streamforge import faults
from streamforge.contracts import load_contracts
from streamforge.lakehouse.rebuild import preview_rebuild, rebuild
from streamforge.lakehouse.replay import WAIT_S
from streamforge.settings import load_settings


@command
def rebuild_command(
    table: Annotated[str, typer.Argument(help="Table to make anew, for instance trades.")],
    *,
    wait_s: Annotated[
        float, typer.Option(min=0, help="Longest wait until the live path has landed everything, seconds.")
    ] = WAIT_S,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Make a table anew from all that Kafka and the raw table hold, beside the live writer, in one table snapshot.

    New files first, then one overwrite on main: readers see the old table or the new one. Its uuid, properties and the
    writer's positions stay. Rows whose source records nobody has any more stay as they are. Where every row is already
    equal, nothing is changed. Memory is that of the largest topic-partition, about 60 bytes a row.

    Example: streamforge rebuild trades --dry-run
    """
    settings = load_settings()
    faults.arm(settings.kill_at)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    with progress_bars(shown=output is Output.TEXT) as hear:
        if dry_run:
            plan, barrier = preview_rebuild(settings, contracts, table, progress=hear)
            result = {**plan.as_dict(), "barrier": barrier.as_dict(), "dry_run": True}
        else:
            report = rebuild(settings, contracts, table, wait_s=wait_s, progress=hear)
            result = {**report.as_dict(), "dry_run": False}
    emit(result, output, lambda: render_replay(result))
    return 0
