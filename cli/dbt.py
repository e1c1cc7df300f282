"""`streamforge dbt`: dbt on the platform's Spark, catalog and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.common import command
from streamforge.marts.run import run_dbt
from streamforge.settings import load_settings

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command("dbt", context_settings={"ignore_unknown_options": True})
@command
def dbt(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[DBT ARGUMENTS]...", help="dbt's own command line.")
    ] = None,
    *,
    target_path: Annotated[Path | None, typer.Option(help="Folder of dbt's artifacts. Default: below home.")] = None,
) -> int:
    """Run dbt on Spark and Iceberg, with project, profile and catalog of the platform.

    Without arguments dbt lists its commands. The marts land in the namespace <namespace>_marts.

    Examples: streamforge dbt build; streamforge dbt build --select market_bars --full-refresh;
    streamforge dbt docs generate
    """
    return 0 if run_dbt(load_settings(), arguments or [], target=target_path) else 1
