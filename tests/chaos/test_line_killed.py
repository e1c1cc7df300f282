"""The whole line under load, its consumers killed at random, and nothing lost or doubled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 6


@pytest.mark.chaos
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_line_with_consumers_killed_at_random_loses_and_doubles_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--kills", str(KILLS), "--seed", "11", "--output", "json"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(done.stdout)
    assert (found["ok"], found["lost"], found["doubled"]) == (True, 0, 0), done.stderr
    assert sum(found["kills"].values()) == KILLS
    trades = next(item for item in found["comparisons"] if item["table"] == "trades" and item["against"] == "raw")
    assert trades["records"] > 0
    assert found["ledger"]["sent"] == found["ledger"]["in_raw"] > 0
