"""The whole line under load: its consumers killed at random, its writer away; nothing is lost or doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamforge.demo.session import captured
from tests.chaos.line import AWAY_TIMEOUT_S, RunningLine, run_line
from tests.waiting import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.timeout(900)]

KILLS = 6
MESSAGES_WITHOUT_WRITER = 8_000


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


def test_writer_that_stands_still_holds_nothing_up_and_catches_up_afterwards(tmp_path: Path) -> None:
    def mistreat(running: RunningLine) -> None:
        pid = running.pid("writer")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            before = running.line.look()
            wait_until(
                lambda: captured(running.line.look()) >= captured(before) + MESSAGES_WITHOUT_WRITER,
                timeout_s=AWAY_TIMEOUT_S,
                what="the loader captures on",
            )
            now = running.line.look()
            assert now.rows == before.rows
            assert now.log_end["trades"] > before.log_end["trades"]
        finally:
            os.kill(pid, signal.SIGCONT)

    outcome = run_line(tmp_path, seed=5, mistreat=mistreat)
    found = outcome.as_dict()
    assert found["ok"], found
    assert outcome.sent.messages >= MESSAGES_WITHOUT_WRITER
    assert outcome.ledger.sent == outcome.ledger.in_raw
