"""The whole line under load: in many kinds of trouble, its writer away; nothing is lost, doubled or out of order."""

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
from tests.chaos.report import FINDINGS
from tests.waiting import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.timeout(900)]

FAULTS = 50
# Those after which a process is back in seconds on a busy machine; the long run has all (benchmarks/chaos.md).
SOON_OVER = (
    "kill",
    "kill_at_step",
    "freeze",
    "pause_resume",
    "clock_jump",
    "slow_disk",
    "commit_refused",
    "answer_lost",
    "false_conflict",
    "foreign_commit",
    "expire_snapshots",
    "catalog_locked",
)
MESSAGES_WITHOUT_WRITER = 8_000


def test_line_in_many_kinds_of_trouble_loses_doubles_and_disorders_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--faults", str(FAULTS), "--seed", "11", "--output", "json"]
    command += ["--kinds", ",".join(SOON_OVER)]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(done.stdout)
    assert found["ok"], found
    assert [found[name] for name in FINDINGS] == [0] * len(FINDINGS)
    assert found["rows"] > 0
    assert sum(found["faults"].values()) + sum(found["not_reached"].values()) == FAULTS
    # Each kind comes at least once; whether a step is passed in time is the machine's affair.
    assert {*found["faults"], *found["not_reached"]} == set(SOON_OVER)
    assert sum(found["not_reached"].values()) <= FAULTS // 10


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
