"""Every setting is documented and used."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Return the names of docs/generate.py."""
    return runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))


def test_configuration_page_is_what_the_settings_say(page: dict[str, Any]) -> None:
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == page["configuration_page"](), "run `uv run python docs/generate.py`"


def test_every_setting_has_a_description(page: dict[str, Any]) -> None:
    kinds = page["settings_classes"]()
    silent = [name for kind in kinds for name, item in page["own_fields"](kind).items() if not item.description]
    assert not silent


def test_every_setting_is_read_somewhere(page: dict[str, Any]) -> None:
    sources = [path for room in page["_ROOMS"] for path in (REPOSITORY / room).rglob("*.py")]
    read = {
        node.attr
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    named = {name for kind in page["settings_classes"]() for name in page["own_fields"](kind)}
    assert not named - read, "settings that nothing reads"
