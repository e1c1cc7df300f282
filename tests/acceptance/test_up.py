"""`streamforge up --detach`, `status`, `down` with the real processes, as a newcomer would use them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamforge.platform.plan import consumer_kinds
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

_WITHIN_S = 240.0


class Platform:
    """The command line on one home."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | {"STREAMFORGE_HOME": str(home)}

    def call(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Call `streamforge`; return its exit code and its JSON."""
        command = [sys.executable, "-m", "cli", *arguments, "--output", "json"]
        result = subprocess.run(
            command, env=self._environment, cwd=self._folder, capture_output=True, text=True, check=False
        )
        assert result.stdout, result.stderr
        return result.returncode, json.loads(result.stdout)

    def status(self) -> dict[str, dict[str, Any]]:
        """Return the processes by name."""
        return {process["name"]: process for process in self.call("status")[1]["processes"]}


@pytest.fixture
def platform_cli(tmp_path: Path) -> Iterator[Platform]:
    found = Platform(tmp_path / "home", tmp_path)
    yield found
    found.call("down")


def test_up_runs_the_line_restarts_a_killed_writer_and_down_leaves_nothing(platform_cli: Platform) -> None:
    code, up = platform_cli.call("up", "--detach")
    assert code == 0, up
    names = {process["name"] for process in up["processes"]}
    dagster = {name for name in names if name.startswith("dagster-")}
    assert dagster >= {"dagster-lakehouse", "dagster-webserver", "dagster-daemon"}
    assert names - dagster == {"broker", "simulator", "loader", *consumer_kinds()}

    def landed() -> dict[str, Any] | None:
        writer = platform_cli.status()["writer"]
        is_landed = any(topic.startswith("trades-") and offset > 0 for topic, offset in writer["positions"].items())
        return writer if is_landed else None

    writer = wait_until(landed, timeout_s=_WITHIN_S, what="trades are in the table")
    os.kill(writer["pid"], signal.SIGKILL)

    def is_back() -> dict[str, Any] | None:
        found = platform_cli.status()["writer"]
        return found if found["restarts"] == 1 and found["state"] == "RUNNING" else None

    back = wait_until(is_back, timeout_s=_WITHIN_S, what="the writer was restarted")
    assert back["last_end"] == "SIGKILL"
    code, status = platform_cli.call("status")
    assert (code, status["is_well"]) == (0, True)
    pids = [status["supervisor_pid"], *(process["pid"] for process in status["processes"])]
    code, down = platform_cli.call("down")
    assert (code, set(down["stopped"])) == (0, names)
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    code, broker = platform_cli.call("broker", "status")
    assert (code, broker["state"]) == (0, "stopped")
