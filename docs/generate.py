"""Write docs/configuration.md from the settings classes: `uv run python docs/generate.py`.

A test runs `configuration_page` and compares, so the page cannot fall behind the code.
"""  # noqa: INP001 - a script in a folder of pages

from __future__ import annotations

import importlib
import pkgutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from streamforge.settings import Settings

PAGE = Path(__file__).resolve().parent / "configuration.md"
_ROOMS = ("streamforge", "streaming", "assets", "orchestration", "cli")
_TYPES = {str: "text", int: "number", float: "number", bool: "true or false", Path: "path", SecretStr: "secret"}
_REPOSITORY = PAGE.parent.parent
_HEAD = """# Configuration

Every setting is an environment variable, or a line in a `.env` file where you start the command. A setting that is
not set has the default below; a wrong one ends the command with exit code 2 and a sentence that names it.

This page is written by `uv run python docs/generate.py`; a test compares it with the code.
"""


def settings_classes() -> list[type[Settings]]:
    """Return the common settings and those of each kind of process, by importing every room."""
    for room in _ROOMS:
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return [Settings, *sorted(_subclasses(Settings), key=lambda kind: kind.__name__)]


def own_fields(kind: type[Settings]) -> dict[str, FieldInfo]:
    """Return the fields that `kind` adds to the class it extends."""
    inherited = {name for base in kind.__mro__[1:] for name in getattr(base, "model_fields", {})}
    return {name: item for name, item in kind.model_fields.items() if name not in inherited}


def configuration_page() -> str:
    """Return the whole page."""
    parts = [_HEAD]
    for kind in settings_classes():
        title = "Every process" if kind is Settings else f"The {kind.__name__.removesuffix('Settings').lower()}"
        parts.append(f"## {title}\n\n| variable | type | default | what it is |\n| --- | --- | --- | --- |")
        parts += [_row(name, item) for name, item in own_fields(kind).items()]
        parts.append("")
    return "\n".join(parts)


def _row(name: str, item: FieldInfo) -> str:
    cells = (f"`STREAMFORGE_{name.upper()}`", _type(item.annotation), _default(item), item.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "JSON list"
    if typing.get_origin(annotation) is dict:
        return "JSON object"
    if isinstance(annotation, types.UnionType):
        return " or ".join(_type(part) for part in typing.get_args(annotation) if part is not type(None))
    return _TYPES[annotation]


def _default(item: FieldInfo) -> str:
    value = item.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, Path) and value.is_absolute():
        return f"`{value.relative_to(_REPOSITORY)}` of this repository"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value not in ("", (), {}) else "empty"


def _subclasses(kind: type[Settings]) -> Iterator[type[Settings]]:
    for child in kind.__subclasses__():
        if child.__module__.partition(".")[0] in _ROOMS:
            yield child
        yield from _subclasses(child)


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
