"""`streamforge rebind` and `streamforge reconcile`: what to do when the writer refuses to start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.common import DryRunOption, Output, OutputOption, command, emit
from streamforge.contracts import load_contracts
from streamforge.lakehouse.pipeline_gaps import accept_passed_gaps
from streamforge.lakehouse.repair import (
    RECONCILE,
    KnownBy,
    PartitionRepair,
    Rebind,
    Reconcile,
    gap_text,
    repair_owner,
)
from streamforge.lakehouse.repair import rebind as rebind_table
from streamforge.lakehouse.repair import reconcile as reconcile_table
from streamforge.settings import load_settings

TableArgument = Annotated[str, typer.Argument(help="Table or contract id, for instance trades.")]


@command
def rebind(table: TableArgument, *, dry_run: DryRunOption = False, output: OutputOption = Output.TEXT) -> int:
    """Start a new source epoch for a table whose topic was recreated, or whose cluster was replaced.

    Old rows stay as they are, with their epoch; the writer lands the new topic from its log start. Records of the
    old topic that were not landed are gone with it. Where the topic is the one that the table knows, nothing changes.

    Example: streamforge rebind trades --dry-run
    """
    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    plan = rebind_table(settings, contracts, table, dry_run=dry_run)
    result: dict[str, Any] = {
        "table": table,
        "dry_run": dry_run,
        "changes": plan is not None,
        "rebind": None if plan is None else msgspec.to_builtins(plan, str_keys=True),
    }
    emit(result, output, lambda: _render_rebind(table, plan, dry_run=dry_run))
    return 0


@command
def reconcile(
    table: TableArgument,
    *,
    accept_retention_gap: Annotated[
        bool,
        typer.Option(
            "--accept-retention-gap",
            help="Give up what Kafka no longer has, and accept the table's open gaps that it has passed.",
        ),
    ] = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Set the positions of a table that a person moved back to what it holds, so that the writer lands the rest again.

    Shows for each topic-partition which offsets count as written and are missing. A live writer is fenced: start
    it again afterwards. Where Kafka no longer has the missing offsets nothing is changed, and the exit code is 1.

    Example: streamforge reconcile trades --dry-run
    """
    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    plan = reconcile_table(settings, contracts, table, accept_retention_gap=accept_retention_gap, dry_run=dry_run)
    refused = plan is not None and bool(plan.gaps) and not accept_retention_gap
    accepts = accept_retention_gap and not dry_run
    by = repair_owner(settings, RECONCILE)
    accepted = [str(gap) for gap in accept_passed_gaps(settings, contracts, table, accepted_by=by)] if accepts else []
    result: dict[str, Any] = {
        "table": table,
        "dry_run": dry_run,
        "changes": plan is not None and not refused,
        "found": None if plan is None else plan.found,
        "refused": gap_text(plan) if plan is not None and refused else None,
        "partitions": [] if plan is None else [item.as_dict() for item in plan.partitions],
        "rows_without_source": 0 if plan is None else plan.rows_without_source,
        "accepted_gaps": accepted,
    }
    notes = [Text(f"accepted: {each}") for each in accepted]
    emit(result, output, lambda: Group(_render_reconcile(table, plan, dry_run=dry_run, refused=refused), *notes))
    return 1 if refused else 0


def _render_rebind(name: str, plan: Rebind | None, *, dry_run: bool) -> Any:
    if plan is None:
        return Text(f"{name}: the topic is the one that the table knows, or the first one: nothing to do")
    grid = Table(show_header=False, box=None)
    grid.add_row(f"source epoch {plan.old_epoch}", f"topic id {plan.stored.topic_id}, cluster {plan.stored.cluster_id}")
    grid.add_row("ends at", _offsets(plan.left))
    grid.add_row(f"source epoch {plan.epoch}", f"topic id {plan.found.topic_id}, cluster {plan.found.cluster_id}")
    grid.add_row("begins at", _offsets(plan.log_starts))
    never = sum(plan.log_starts.values())
    notes = [Text(f"{never} offsets before it were removed from the new topic and are never landed")] if never else []
    did = "would begin" if dry_run else "has begun; start the writer"
    return Group(
        Text(f"{plan.table}: source epoch {plan.epoch} of {plan.found.topic} {did}", style="bold"), grid, *notes
    )


def _render_reconcile(name: str, plan: Reconcile | None, *, dry_run: bool, refused: bool) -> Any:
    if plan is None:
        return Text(f"{name}: main is at or behind our last commit: nothing to do")
    parts: list[Any] = [Text(f"{plan.table}: {plan.found}"), _missing(plan.partitions)]
    if plan.rows_without_source and any(item.known_by is KnownBy.ROWS for item in plan.partitions):
        parts.append(
            Text(
                f"{plan.rows_without_source} rows were made by replays and carry no source offset; if `streamforge "
                "verify` finds unexpected or doubled rows afterwards, replay their raw range"
            )
        )
    if refused:
        return Group(*parts, Text(gap_text(plan), style="red"))
    did = "would be set" if dry_run else "are set"
    then = "" if dry_run else "; start the writer, it lands the missing offsets again"
    return Group(*parts, Text(f"positions {did} to what main holds{then}", style="bold"))


def _missing(partitions: Sequence[PartitionRepair]) -> Group:
    table = Table(box=None)
    table.add_column("topic-partition", no_wrap=True)
    for name in ("epoch", "next_offset", "missing", "known by", "log start", "restart"):
        table.add_column(name)
    moved = [item for item in partitions if item.held != item.next_offset]
    for item in moved:
        table.add_row(
            f"{item.topic}-{item.source.partition}",
            str(item.source.epoch),
            str(item.next_offset),
            "nothing" if item.missing is None else "[{},{})".format(*item.missing),
            str(item.known_by),
            "gone" if item.log_start is None else str(item.log_start),
            str(item.restart),
        )
    return Group(table, Text(f"{len(partitions) - len(moved)} other topic-partitions stay where they are"))


def _offsets(by_partition: Mapping[int, int]) -> str:
    return ", ".join(f"{partition}: {offset}" for partition, offset in sorted(by_partition.items()))
