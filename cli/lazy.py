"""Commands that are imported when they are called, so that `streamforge --help` does not load Arrow and Kafka."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


class LazyCommand(TyperCommand):
    """A command or group known by name and one sentence until it is called.

    Args:
        name: its name on the command line.
        target: `module:attribute`; the attribute is a `typer.Typer` group or a command function.
        summary: the sentence that the list of commands shows.
    """

    def __init__(self, name: str, target: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self.target = target

    def load(self) -> TyperCommand | TyperGroup:
        """Import the command and return it."""
        module, _, attribute = self.target.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            return get_command(found)  # type: ignore[return-value]
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(self.name)(found)
        loaded: TyperCommand = get_command(single)  # type: ignore[assignment]
        return loaded

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Hand the call to the real command: the context that is returned is its own."""
        return self.load().make_context(info_name, args, parent, **extra)
