"""Process records and ports: nothing of another program is ever taken for ours."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from streamforge.processes import (
    LOOPBACK,
    ProcessRecord,
    choose_free_port,
    end_process,
    is_port_free,
    last_lines,
    remembered_ports,
)


def test_record_written_and_read_names_the_live_process(tmp_path: Path) -> None:
    path = tmp_path / "own.pid"
    ProcessRecord.of(os.getpid()).write(path)
    record = ProcessRecord.read(path)
    assert record is not None
    assert record.process() == psutil.Process()


def test_record_of_reused_pid_names_nothing() -> None:
    created_s = psutil.Process().create_time()
    assert ProcessRecord(os.getpid(), created_s - 60.0).process() is None


def test_record_of_ended_child_names_nothing_even_as_zombie() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        record = ProcessRecord.of(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert record.process() is None


def test_record_unreadable_is_none(tmp_path: Path) -> None:
    path = tmp_path / "broken.pid"
    assert ProcessRecord.read(path) is None
    path.write_text("12", encoding="utf-8")
    assert ProcessRecord.read(path) is None


def test_end_process_that_ignores_sigterm_is_killed() -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert end_process(psutil.Process(child.pid), deadline_s=0.1) is False
        assert not psutil.pid_exists(child.pid)


def test_remembered_ports_are_kept_while_free(tmp_path: Path) -> None:
    path = tmp_path / "ports.json"
    first = remembered_ports(path, ["a", "b"])
    assert first.numbers["a"] != first.numbers["b"]
    again = remembered_ports(path, ["b", "c"])
    assert again.numbers["b"] == first.numbers["b"]
    assert again.moved == {}
    assert remembered_ports(path, ["a"]).numbers["a"] == first.numbers["a"]


def test_remembered_port_taken_by_another_program_moves_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "ports.json"
    old = remembered_ports(path, ["a"]).numbers["a"]
    with socket.create_server((LOOPBACK, old)):
        moved = remembered_ports(path, ["a"])
    assert moved.numbers["a"] != old
    assert moved.moved == {"a": old}
    assert str(old) in moved.notes()[0]
    assert remembered_ports(path, ["a"]).numbers == moved.numbers


def test_choose_free_port_is_free_and_not_taken() -> None:
    port = choose_free_port()
    assert is_port_free(port)
    with socket.create_server((LOOPBACK, port)):
        assert not is_port_free(port)


def test_last_lines_of_long_file_are_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(50_000)), encoding="utf-8")
    assert last_lines(path, 2) == ("line 49998", "line 49999")
    assert last_lines(tmp_path / "absent") == ()
