"""Where recorded market data lies, for tests that want it; those tests are skipped where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent
_SET = os.environ.get("STREAMFORGE_RECORDINGS_DIR")

RECORDINGS_DIR = Path(_SET) if _SET else _REPOSITORY.parent / "shared" / "data"
"""The folder that has `ws_binance/`; read before the tests' settings are shielded from the environment."""

needs_recordings = pytest.mark.skipif(
    not (RECORDINGS_DIR / "ws_binance").is_dir(),
    reason=f"no recorded market data in {RECORDINGS_DIR} (STREAMFORGE_RECORDINGS_DIR)",
)
