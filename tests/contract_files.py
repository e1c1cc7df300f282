"""Copies of the contract files, and edits of them."""

from __future__ import annotations

import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "contracts"

ADDED_FIELD = """      - name: venue_flag
        logicalType: string
        physicalType: string
        required: false
        description: What the venue says.
        customProperties:
          - {property: fieldId, value: 26}
slaProperties:"""
"""An optional field for `trades`, to be put in place of `slaProperties:`."""


def copy_contracts(target: Path) -> Path:
    """Copy the contract files to `target` and return it."""
    shutil.copytree(FOLDER, target)
    return target


def edit(path: Path, old: str, new: str) -> None:
    """Replace the first `old` in a file; fail when it is not there."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
