"""`streamforge trace`: where rows came from, byte for byte, and when they passed each hop."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.common import Output, OutputOption, command, emit, plain
from streamforge.contracts import load_contracts
from streamforge.lakehouse.trace import LIMIT_ROWS, CommitFound, FoundRecord, Traced, TracedRow
from streamforge.lakehouse.trace import trace as trace_rows
from streamforge.settings import load_settings
from streamforge.times import iso_text


@command
def trace(
    *,
    table: Annotated[str, typer.Option("--table", "-t", help="Table or contract id, for instance trades.")],
    where: Annotated[str, typer.Option("--where", "-w", help="Which rows: an expression of DuckDB's SQL.")],
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="Most rows to trace.")] = LIMIT_ROWS,
    output: OutputOption = Output.TEXT,
) -> int:
    """Show the way of rows: record, raw bytes, commit, versions, and the time at each hop.

    Raw bytes come from Kafka, or from the raw table where retention has removed them. The commit is looked up among
    the table's snapshots, or in the table commits where it has expired. Exit code 1 where no row is meant.

    Example: streamforge trace --table trades --where "symbol = 'BTCUSDT' and trade_id = 5"
    """
    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    traced = trace_rows(settings, contracts, table, where, limit_rows=limit)
    result = {"table": table, "where": where, "is_cut": traced.is_cut, "rows": [_as_dict(each) for each in traced.rows]}
    emit(result, output, lambda: _render(table, traced, limit))
    return 0 if traced.rows else 1


def _as_dict(traced: TracedRow) -> dict[str, Any]:
    return traced.as_dict() | {"row": {name: plain(value) for name, value in traced.row.items()}}


def _render(name: str, traced: Traced, limit: int) -> Any:
    if not traced.rows:
        return Text(f"{name}: no row is meant")
    parts: list[Any] = []
    for each in traced.rows:
        parts += [_render_row(each), Text("")]
    if traced.is_cut:
        parts.append(Text(f"there are more rows: only the first {limit} are traced (--limit)"))
    return Group(*parts)


def _render_row(traced: TracedRow) -> Table:
    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    values = (f"{name}={plain(value)}" for name, value in traced.row.items() if value is not None)
    grid.add_row("row", Text(", ".join(values)))
    grid.add_row("record", Text(_place(traced.record) if traced.record else "none: a replay made this row"))
    if traced.raw is not None:
        grid.add_row("raw record", Text(_place(traced.raw)))
    shown = traced.raw or traced.record
    if shown is not None:
        grid.add_row("headers", Text(", ".join(f"{k}={v}" for k, v in (shown.headers or {}).items()) or "none"))
        grid.add_row(f"bytes ({shown.encoding})" if shown.encoding else "bytes", Text(shown.text or shown.missing))
    grid.add_row("commit", Text(_commit(traced.commit)))
    grid.add_row("versions", Text(", ".join(f"{name} {version}" for name, version in traced.versions.items())))
    for hop in traced.hops:
        took = "" if hop.after_ms is None else f"  {hop.after_ms:+,.3f} ms"
        grid.add_row(hop.name, Text("not known" if hop.ts_ns is None else f"{iso_text(hop.ts_ns)}{took}"))
    return grid


def _place(record: FoundRecord) -> str:
    place = record.place
    where = f"{place.topic or place.topic_id}-{place.partition} offset {place.offset} index {place.index}"
    found = f"from {record.found_in}" if record.found_in else record.missing
    return f"{where}, epoch {place.epoch} (topic id {place.topic_id}); {found}"


def _commit(made: CommitFound) -> str:
    if not made.found_in or made.ts_committed_ns is None:
        return f"{made.commit_id}: neither the table's snapshots nor the table commits know it"
    by = made.who or "not recorded"
    kept = "" if made.found_in == "snapshot" else ", expired"
    return (
        f"{made.commit_id}: table snapshot {made.snapshot_id}{kept}, {made.kind} of {made.added_rows} rows by {by} "
        f"at {iso_text(made.ts_committed_ns)}"
    )
