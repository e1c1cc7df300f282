"""The launcher: how long a restart waits, and what becomes of the process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from streamforge.platform.launch import backoff_s, launch_command, pid_file, starts_file
from streamforge.processes import LOOPBACK, ProcessRecord, choose_free_port
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("starts_ago_s", "expected_s"),
    [([], 0.0), ([119.0], 1.0), ([60.0, 30.0], 2.0), ([50.0, 40.0, 30.0], 4.0), ([1.0] * 40, 30.0), ([121.0] * 9, 0.0)],
)
def test_backoff_doubles_with_recent_starts_up_to_a_bound(starts_ago_s: list[float], expected_s: float) -> None:
    now_s = 1_000_000.0
    assert backoff_s([now_s - ago_s for ago_s in starts_ago_s], now_s) == expected_s


def test_launched_command_keeps_pid_arguments_and_exit_code(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(3)"
    command = launch_command([sys.executable, "-c", code, "--", "a b"], name="x", state=tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=60)
    assert out == f"{process.pid} ['--', 'a b']\n"
    assert process.returncode == 3
    record = ProcessRecord.read(pid_file(tmp_path, "x"))
    assert record is not None
    assert record.pid == process.pid
    assert len(msgspec.json.decode(starts_file(tmp_path, "x").read_bytes(), type=list[float])) == 1


def test_launched_command_waits_until_what_it_needs_listens(tmp_path: Path) -> None:
    port = choose_free_port()
    code = f"import socket; socket.create_connection(({LOOPBACK!r}, {port})); print('it listens')"
    command = launch_command([sys.executable, "-c", code], name="x", state=tmp_path, after=[port])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_until(starts_file(tmp_path, "x").exists, what="its turn has come")
        with socket.create_server((LOOPBACK, port)):
            out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("it listens\n", 0)
