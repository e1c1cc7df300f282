"""What every command shares: output as text or JSON, and errors that end in an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 fenced by another owner, 130 stopped by a signal.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from streamforge.dead_letters import readable
from streamforge.errors import ConfigurationError, StreamForgeError
from streamforge.logs import configure as configure_logs
from streamforge.settings import load_settings

P = ParamSpec("P")

_log = logging.getLogger(__name__)
console = Console()
error_console = Console(stderr=True)


class Output(StrEnum):
    """How a command prints its result."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="text for people, json for scripts (one object on standard output).")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and change nothing.")]


@contextmanager
def progress_bar(output: Output) -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar on standard error, moved by (what, done, total); nothing for scripts and where it is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = output is Output.TEXT and error_console.is_terminal
    with Progress(*columns, console=error_console, transient=True, disable=not shown) as bar:
        task = bar.add_task("reading", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield report


def emit(result: Mapping[str, Any], output: Output, render: Callable[[], Any]) -> None:
    """Print `result`: as one JSON object, or whatever `render` returns (a rich renderable) for people."""
    if output is Output.JSON:
        sys.stdout.write(json.dumps(result, default=str) + "\n")
        sys.stdout.flush()
        return
    console.print(render())


def plain(value: Any) -> Any:
    """Return a value of a row as JSON can hold it: decimals as plain text, bytes as text or base64."""
    if isinstance(value, Decimal):
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return readable(value)[0] if isinstance(value, bytes) else value


def command(function: Callable[P, int | None]) -> Callable[P, None]:
    """Wrap a command: its return value is the exit code, a `StreamForgeError` becomes one with its message.

    With `--output json` an error is a JSON object `{"error": type, "message": text}` on standard output too.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            configure_logs(load_settings())
            code = function(*args, **kwargs) or 0
        except StreamForgeError as error:
            _say(type(error).__name__, str(error), kwargs.get("output"))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            error_console.print("stopped by Ctrl-C")
            raise typer.Exit(130) from error
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:  # the border to people, who are shown a sentence
            raise typer.Exit(_say_unexpected(error, kwargs.get("output"))) from error
        if code:
            raise typer.Exit(code)

    return wrapped


def _say(name: str, message: str, output: object) -> None:
    if output is Output.JSON:
        sys.stdout.write(json.dumps({"error": name, "message": message}) + "\n")
    error_console.print(f"[bold red]error[/bold red] {name}: ", end="")
    error_console.print(message, markup=False, highlight=False, soft_wrap=True)


def _say_unexpected(error: Exception, output: object) -> int:
    """Say an error that is none of ours, and return the exit code; its traceback goes to the log, not to people."""
    from confluent_kafka import KafkaError, KafkaException

    if isinstance(error, KafkaException) and error.args[0].code() == KafkaError._INVALID_ARG:  # noqa: SLF001
        said = error.args[0].str()
        text = f"Kafka's client refuses the settings: {said}. Check STREAMFORGE_SECURITY_PROTOCOL and what goes with it"
        _say(ConfigurationError.__name__, text, output)
        return ConfigurationError.exit_code
    is_seen_by_people = error_console.is_terminal
    _log.log(logging.DEBUG if is_seen_by_people else logging.ERROR, "unexpected error", exc_info=error)
    hint = "STREAMFORGE_LOG_LEVEL=debug shows where it comes from; where it is not your disk or network, report it"
    _say(type(error).__name__, f"{error}. {hint}", output)
    return 1
