"""Named faults: nothing unless armed, the right signal at the right passage."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from streamforge import faults
from streamforge.errors import ConfigurationError
from tests.waiting import wait_until

CODE = """
import sys
from streamforge import faults
faults.arm(sys.argv[1])
for passage in range(3):
    faults.step("other")
    faults.step("here")
    print(passage, flush=True)
"""


def _start(kill_at: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CODE, kill_at], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("kill_at", "passed"), [("here", ""), ("here:2", "0\n"), ("here:3", "0\n1\n")])
def test_process_is_killed_at_the_passage(kill_at: str, passed: str) -> None:
    with _start(kill_at) as process:
        assert process.communicate()[0] == passed
    assert process.returncode == -signal.SIGKILL


def test_stopped_process_goes_on_after_sigcont() -> None:
    with _start("here:2!stop") as process:
        stopped = psutil.Process(process.pid)
        wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED, what="it stands still")
        process.send_signal(signal.SIGCONT)
        assert process.communicate()[0] == "0\n1\n2\n"
    assert process.returncode == 0


@pytest.mark.parametrize("kill_at", ["", "here:0", "here:-1", "here:x", "here!kill", ":1"])
def test_what_is_not_of_the_form_is_refused(kill_at: str) -> None:
    with pytest.raises(ConfigurationError, match="kill_at must be"):
        faults.arm(kill_at)
    faults.arm(None)
