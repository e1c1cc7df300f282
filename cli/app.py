"""Assemble the `streamforge` command from one module a group."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="streamforge",
    help="A streaming lakehouse for crypto markets: Kafka to Iceberg exactly once.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app()
