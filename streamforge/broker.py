"""The embedded broker: Apache Kafka itself, one process, on the loopback interface.

Everything lies under `<home>/broker/`: `data/` (the log), `ports.json` (chosen on the first start and
remembered), `address` (what clients connect to), `broker.pid`. The log is `<home>/logs/broker.log`; what
the Java machine says outside it is in `<home>/logs/broker.out`.

A file lock makes two starts at once one start. The pid file names the process by pid and creation time,
so a reused pid is never taken for the broker and never signalled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

import psutil
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from filelock import FileLock, Timeout

from streamforge.errors import ConfigurationError, PermanentSourceError, RetryableSourceError
from streamforge.kafka import BROKER_ADDRESS_FILE, client_config
from streamforge.kafka_server import broker_command, format_command, log4j_properties, render_properties
from streamforge.kafka_server import server_properties as kafka_properties
from streamforge.processes import (
    LOOPBACK,
    Ports,
    ProcessRecord,
    end_process,
    is_listening,
    last_lines,
    remembered_ports,
    spawn_detached,
    write_atomically,
)
from streamforge.settings import Settings, make_folder

START_TIMEOUT_S = 120.0
STOP_DEADLINE_S = 30.0
_LOCK_TIMEOUT_S = 180.0
_ANSWER_TIMEOUT_S = 5.0
_POLL_S = 0.05
_PORT_RELEASE_S = 3.0
_START_ATTEMPTS = 3
_PORT_NAMES = ("broker", "controller")


class BrokerState(StrEnum):
    """What can be said of a broker."""

    RUNNING = "running"
    UNRESPONSIVE = "unresponsive"
    STOPPED = "stopped"
    DIED = "died"
    EXTERNAL = "external"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class BrokerStatus:
    """State of the broker that a `Settings` points to.

    Args:
        state: `died` means that it ended without being asked to; `external` and `unreachable` are said of
            a cluster that the settings name.
        address: what clients connect to; None before the first start.
        pid: process id while it lives.
        uptime_s: seconds since it was started.
        cluster_id: Kafka's own id of the cluster, as it answered.
        log_file: the broker's log; None for an external cluster.
        notes: what a person should know, such as ports that had to change.
        log_tail: last lines of its log, when it died or does not answer.
    """

    state: BrokerState
    address: str | None
    pid: int | None = None
    uptime_s: float | None = None
    cluster_id: str | None = None
    log_file: Path | None = None
    notes: tuple[str, ...] = ()
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Files:
    """Where the broker of one home keeps its files."""

    home: Path

    @property
    def folder(self) -> Path:
        return self.home / "broker"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def pid(self) -> Path:
        return self.folder / "broker.pid"

    @property
    def ports(self) -> Path:
        return self.folder / "ports.json"

    @property
    def address(self) -> Path:
        return self.home / BROKER_ADDRESS_FILE

    @property
    def log(self) -> Path:
        return self.home / "logs" / "broker.log"

    @property
    def out(self) -> Path:
        return self.home / "logs" / "broker.out"

    @property
    def log4j(self) -> Path:
        return self.folder / "log4j2.properties"

    def tail(self) -> tuple[str, ...]:
        """Return the last lines of the log and of what the Java machine said."""
        return (*last_lines(self.log), *last_lines(self.out))


def start(settings: Settings, *, timeout_s: float = START_TIMEOUT_S) -> BrokerStatus:
    """Start the embedded broker and wait until it answers; a broker that runs already is left alone.

    Raises:
        ConfigurationError: the settings name an external cluster.
        PermanentSourceError: it died during the start; the message holds the last lines of its log.
        RetryableSourceError: it lives but does not answer within `timeout_s`.
    """
    _refuse_external(settings)
    files = _Files(settings.home_path)
    with _lock(files):
        running = _process(files)
        if running is not None:
            return _wait_until_answers(files, running, timeout_s, notes=())
        notes: tuple[str, ...] = ()
        for attempt in range(1, _START_ATTEMPTS + 1):
            command, new_notes = _prepare(files)
            notes += new_notes
            process = spawn_detached(command, out=files.out)
            ProcessRecord.of(process.pid).write(files.pid)
            try:
                return _wait_until_answers(files, process, timeout_s, notes)
            except KeyboardInterrupt:
                end_process(process, deadline_s=STOP_DEADLINE_S)
                files.pid.unlink(missing_ok=True)
                raise
            except PermanentSourceError:
                # Between our look and Kafka's bind someone took the port: look again.
                is_port_lost = any("Address already in use" in line for line in files.tail())
                if not is_port_lost or attempt == _START_ATTEMPTS:
                    raise
    raise AssertionError


def run(settings: Settings) -> NoReturn:
    """Become the broker: this process turns into Java, keeping pid and parent, so that signals reach it.

    Raises:
        ConfigurationError: the settings name an external cluster.
        PermanentSourceError: a broker of this home runs already, or Kafka cannot be fetched.
    """
    _refuse_external(settings)
    files = _Files(settings.home_path)
    with _lock(files):
        running = _process(files)
        if running is not None:
            msg = (
                f"a broker of {files.home} runs already (pid {running.pid}); two on the same data would destroy it. "
                "Use that one, or end it with `streamforge broker stop`"
            )
            raise PermanentSourceError(msg)
        command, notes = _prepare(files)
        ProcessRecord.of(os.getpid()).write(files.pid)
    for note in notes:
        sys.stderr.write(note + "\n")
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606  # no shell is the point


def stop(settings: Settings, *, deadline_s: float = STOP_DEADLINE_S) -> BrokerStatus:
    """Stop the embedded broker cleanly, kill it after `deadline_s`; harmless when none runs.

    Raises:
        ConfigurationError: the settings name an external cluster.
    """
    _refuse_external(settings)
    files = _Files(settings.home_path)
    with _lock(files):
        process = _process(files)
        notes: tuple[str, ...] = ()
        if process is None:
            notes = ("no embedded broker was running",)
        elif not end_process(process, deadline_s=deadline_s):
            notes = (f"killed: it did not stop within {deadline_s:g} s of SIGTERM; the next start checks its log",)
        files.pid.unlink(missing_ok=True)
    return BrokerStatus(BrokerState.STOPPED, _address(files), log_file=files.log, notes=notes)


def status(settings: Settings, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> BrokerStatus:
    """Return the state of the broker that `settings` point to; asks it, at most for `timeout_s`."""
    if settings.bootstrap_servers:
        cluster_id = _cluster_id(client_config(settings), timeout_s)
        state = BrokerState.EXTERNAL if cluster_id else BrokerState.UNREACHABLE
        return BrokerStatus(state, settings.bootstrap_servers, cluster_id=cluster_id)
    files = _Files(settings.home_path)
    process = _process(files)
    if process is None:
        has_died = files.pid.exists()
        return BrokerStatus(
            BrokerState.DIED if has_died else BrokerState.STOPPED,
            _address(files),
            log_file=files.log,
            log_tail=files.tail() if has_died else (),
        )
    return _describe(files, process, timeout_s)


def ports_file(settings: Settings) -> Path:
    """Return the file that remembers the ports of the embedded broker."""
    return _Files(settings.home_path).ports


def _refuse_external(settings: Settings) -> None:
    if settings.bootstrap_servers:
        msg = (
            f"an external cluster is configured (STREAMFORGE_BOOTSTRAP_SERVERS={settings.bootstrap_servers}), so there "
            "is no embedded broker to start or stop. Unset the variable to use the embedded one"
        )
        raise ConfigurationError(msg)


@contextmanager
def _lock(files: _Files) -> Iterator[None]:
    make_folder(files.folder)
    lock = FileLock(files.folder / "lock", timeout=_LOCK_TIMEOUT_S)
    try:
        with lock:
            yield
    except Timeout as error:
        msg = (
            f"another command has been starting or stopping the broker of {files.home} for {_LOCK_TIMEOUT_S:g} s "
            f"(lock {lock.lock_file}). Wait for it or end it, then try again"
        )
        raise RetryableSourceError(msg) from error


def _process(files: _Files) -> psutil.Process | None:
    record = ProcessRecord.read(files.pid)
    return None if record is None else record.process()


def _prepare(files: _Files) -> tuple[list[str], tuple[str, ...]]:
    """Make everything ready for a start; return the command and notes on what had to change."""
    ports = remembered_ports(files.ports, _PORT_NAMES, release_s=_PORT_RELEASE_S if files.pid.exists() else 0.0)
    files.log.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(files.log4j, log4j_properties(files.log))
    if not files.data.is_dir():
        _format(files, ports)
    properties = files.folder / "server.properties"
    _write_properties(properties, files.data, ports)
    write_atomically(files.address, f"{LOOPBACK}:{ports.numbers['broker']}\n")
    notes = ports.notes()
    if "broker" in ports.moved:
        notes = (*notes, "restart the processes that use the old address")
    return broker_command(properties=properties, log4j=files.log4j), notes


def _write_properties(path: Path, data_dir: Path, ports: Ports) -> None:
    properties = kafka_properties(
        data_dir=data_dir, client_port=ports.numbers["broker"], controller_port=ports.numbers["controller"]
    )
    write_atomically(path, render_properties(properties))


def _format(files: _Files, ports: Ports) -> None:
    """Format a data folder beside the real one and move it there: a kill in between leaves no half of one."""
    fresh = files.folder / "data.new"
    shutil.rmtree(fresh, ignore_errors=True)
    properties = files.folder / "format.properties"
    _write_properties(properties, fresh, ports)
    result = subprocess.run(  # noqa: S603  # our own arguments
        format_command(properties=properties, log4j=files.log4j), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        msg = (
            f"the broker's data folder {files.data} cannot be formatted: StorageTool ended with exit code "
            f"{result.returncode}:\n{result.stdout}{result.stderr}\nCheck that the disk is writable and has space"
        )
        raise PermanentSourceError(msg)
    fresh.rename(files.data)


def _wait_until_answers(
    files: _Files, process: psutil.Process, timeout_s: float, notes: tuple[str, ...]
) -> BrokerStatus:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if _process(files) is None:
            raise PermanentSourceError(_died_message(files))
        found = _describe(files, process, _ANSWER_TIMEOUT_S, notes=notes) if is_listening(_address(files)) else None
        if found is not None and found.state is BrokerState.RUNNING:
            return found
        time.sleep(_POLL_S)
    tail = "\n  ".join(files.tail())
    msg = (
        f"the broker (pid {process.pid}, {_address(files)}) does not answer within {timeout_s:g} s; it keeps running. "
        f"Wait, or end it with `streamforge broker stop`. Last lines of {files.log}:\n  {tail}"
    )
    raise RetryableSourceError(msg)


def _died_message(files: _Files) -> str:
    tail = "\n  ".join(files.tail()) or "(nothing)"
    return (
        f"the broker of {files.home} died during its start. Last lines of {files.log} and {files.out}:\n  {tail}\n"
        "Remove the cause that they name and run `streamforge broker start` again"
    )


def _describe(files: _Files, process: psutil.Process, timeout_s: float, *, notes: tuple[str, ...] = ()) -> BrokerStatus:
    address = _address(files)
    cluster_id = _cluster_id({"bootstrap.servers": address}, timeout_s) if address and is_listening(address) else None
    return BrokerStatus(
        BrokerState.RUNNING if cluster_id else BrokerState.UNRESPONSIVE,
        address,
        pid=process.pid,
        uptime_s=round(time.time() - process.create_time(), 3),
        cluster_id=cluster_id,
        log_file=files.log,
        notes=notes,
        log_tail=() if cluster_id else files.tail(),
    )


def _address(files: _Files) -> str | None:
    try:
        return files.address.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _cluster_id(config: Mapping[str, Any], timeout_s: float) -> str | None:
    """Ask the cluster for its id; None when it does not answer in time, or does not let us in."""
    admin = AdminClient({**config, "log_level": 0, "reconnect.backoff.max.ms": 200})
    try:
        return str(admin.describe_cluster(request_timeout=timeout_s).result().cluster_id)
    except KafkaException:
        return None


__all__ = ["BrokerState", "BrokerStatus", "ports_file", "run", "start", "status", "stop"]
