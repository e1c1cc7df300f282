"""Assemble the `streamforge` command from one module a group."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli.lazy import LazyCommand
from streamforge import __version__

COMMANDS = (
    LazyCommand("demo", "cli.demo:demo", "Run the whole line in two minutes, lose nothing, and prove it."),
    LazyCommand("up", "cli.platform:up", "Start the whole platform and keep it running until Ctrl-C."),
    LazyCommand("down", "cli.platform:down", "Stop whatever of the platform was left running."),
    LazyCommand("status", "cli.platform:status", "Show every process of the platform: state, restarts, lag."),
    LazyCommand("doctor", "cli.doctor:doctor", "Check this machine, broker, topics and catalog, and say what to do."),
    LazyCommand("broker", "cli.broker:app", "Start, stop and look at the embedded Kafka broker."),
    LazyCommand("topics", "cli.topics:app", "List, describe and create the topics that the contracts ask for."),
    LazyCommand("contracts", "cli.contracts:app", "Lint, compare, show and apply data contracts."),
    LazyCommand("verify", "cli.verify:verify", "Compare Kafka with the tables: lost, doubled, different."),
    LazyCommand("simulate", "cli.simulate:simulate", "Serve a simulated market over Binance's spot protocol."),
    LazyCommand("load", "cli.load:app", "Capture what a venue sends, byte for byte; or load history from files."),
    LazyCommand("run", "cli.run:run", "Run one consumer: parser, bars, history-parser, inference or writer."),
    LazyCommand("control", "cli.control:control", "Ping, pause, resume or stop processes; give the simulator faults."),
    LazyCommand("rebind", "cli.repair:rebind", "Go on with a topic that was recreated: a new source epoch."),
    LazyCommand("reconcile", "cli.repair:reconcile", "Mend the positions of a table that a person moved back."),
    LazyCommand("replay", "cli.replay:replay_command", "Make the rows of a source range again and replace them."),
    LazyCommand("rebuild", "cli.rebuild:rebuild_command", "Make a table anew from all that its source still holds."),
    LazyCommand(
        "backfill", "cli.backfill:app", "Build bars of a past window again from the trades and mend the table."
    ),
    LazyCommand("dlq", "cli.dlq:app", "List, show, redrive and discard dead letters."),
    LazyCommand("trace", "cli.trace:trace", "Show where rows came from, byte for byte, and when they passed each hop."),
    LazyCommand("sql", "cli.sql:sql", "Ask the tables with SQL, offline."),
    LazyCommand("dbt", "cli.dbt:app", "Run dbt on the tables: the marts, their tests and docs."),
)


class _Root(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {str(command.name): command for command in COMMANDS}


app = typer.Typer(
    name="streamforge",
    cls=_Root,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


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

    Start with `streamforge up` and, in another terminal, `streamforge status`. Settings are STREAMFORGE_
    variables or a .env file. Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 fenced by another owner,
    130 stopped by a signal before it was done.
    """


def main() -> None:
    """Run the command line."""
    app()
