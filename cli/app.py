"""Assemble the `streamforge` command from one module a group."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import broker, contracts, simulate, topics
from streamforge import __version__

app = typer.Typer(
    name="streamforge",
    help="A streaming lakehouse for crypto markets: Kafka to Iceberg exactly once.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(broker.app, name="broker")
app.add_typer(topics.app, name="topics")
app.command()(simulate.simulate)


def _print_version(*, value: bool) -> None:
    if value:
        typer.echo(f"streamforge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A streaming lakehouse for crypto markets: Kafka to Iceberg exactly once.

    Start with `streamforge demo`, or `streamforge up` and, in another terminal, `streamforge status`.
    Settings are STREAMFORGE_ variables or a .env file. Exit codes: 0 done, 1 failed, 2 wrong usage or
    settings, 3 fenced by another owner.
    """


app.add_typer(contracts.app, name="contracts")


def main() -> None:
    """Run the command line."""
    app()
