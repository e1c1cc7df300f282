"""`streamforge sql`: ask the tables, offline."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.common import Output, OutputOption, command, emit, plain
from streamforge.contracts import load_contracts
from streamforge.lakehouse.query import Answer, QueryTable, ask, list_tables
from streamforge.settings import load_settings

DEFAULT_LIMIT_ROWS = 100


@command
def sql(
    query: Annotated[
        str | None, typer.Argument(help="One SQL statement, DuckDB's dialect. Without it: the tables there are.")
    ] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, help="Most rows to print.")] = DEFAULT_LIMIT_ROWS,
    output: OutputOption = Output.TEXT,
) -> None:
    """Ask the tables with SQL; DuckDB reads the files of their current table snapshots, without any network.

    Every table is named by its contract, with or without the namespace; bars_latest is the last revision of each
    bar. Prices and sizes are exact decimals, printed as text. COPY (SELECT ...) TO 'file.parquet' writes a file.
    Tables themselves cannot be changed from here.

    Example: streamforge sql "SELECT instrument, count(*) FROM trades GROUP BY ALL" --limit 20
    """
    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    if query is None:
        tables = list_tables(settings, contracts)
        emit({"tables": [_as_dict(item) for item in tables]}, output, lambda: _render_tables(tables))
        return
    answer = ask(settings, contracts, query, limit_rows=limit)
    rows = [dict(zip(answer.columns, map(plain, row), strict=True)) for row in answer.rows]
    result = {"columns": list(answer.columns), "rows": rows, "is_cut": answer.is_cut}
    emit(result, output, lambda: _render_answer(answer, limit))


def _as_dict(table: QueryTable) -> dict[str, Any]:
    return {
        "name": table.name,
        "view": table.view,
        "rows": table.rows,
        "purpose": table.purpose,
        "columns": dict(table.columns),
    }


def _render_tables(tables: list[QueryTable]) -> Any:
    if not tables:
        return Text("there are no tables yet: `streamforge up` makes them")
    shown = Table("table", "rows", "what it is")
    for item in tables:
        view = f"\nlatest revisions: {item.view}" if item.view else ""
        shown.add_row(item.name, "?" if item.rows is None else str(item.rows), item.purpose + view)
    return Group(shown, Text('columns: streamforge sql "DESCRIBE trades"'))


def _render_answer(answer: Answer, limit: int) -> Any:
    shown = Table()
    for name in answer.columns:
        shown.add_column(Text(name))
    for row in answer.rows:
        shown.add_row(*(Text("" if value is None else str(plain(value))) for value in row))
    if answer.is_cut:
        return Group(shown, Text(f"there are more rows: only the first {limit} are shown (--limit)"))
    return shown
