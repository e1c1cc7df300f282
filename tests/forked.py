"""`streamforge` in processes of their own that start in tens of milliseconds: forked with everything imported.

Real processes: real signals reach them, their environment and output are their own. Only Python's start and the
imports, seconds of processor time each, are paid once for a worker of pytest.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import Signals

from cli.app import main

_PRELOADED = (
    "cli.load",
    "cli.replay",
    "cli.run",
    "streamforge.lakehouse.replay_run",
    "streaming.loaders.loader",
    "streaming.processors.bars",
    "streaming.processors.history",
    "streaming.processors.parser",
    "streaming.writer",
)
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload([__name__, *_PRELOADED])


class Forked:
    """A process that runs, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, target: Callable[..., None], arguments: Sequence[object], *, log: Path) -> None:
        self.log = log
        self._process = _forkserver.Process(target=target, args=tuple(arguments), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """Return the process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Return the exit code, minus the signal's number after a signal, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code as `returncode`."""
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Wait for the end and return the exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"pid {self.pid}, which said {self.said()}", timeout)
        return self.returncode

    def send_signal(self, number: Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL where it still runs."""
        self._process.kill()

    def end(self) -> None:
        """Make sure that it is gone."""
        if self.returncode is None:
            self.kill()
            self._process.join(30)

    def said(self) -> str:
        """Return the end of what it wrote to standard output and standard error."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-4_000:] if self.log.exists() else ""


def streamforge(arguments: Sequence[str], environment: Mapping[str, str], *, log: Path) -> Forked:
    """Start `streamforge ARGUMENTS` with this environment and no other; what it says is appended to `log`."""
    return Forked(_streamforge, (list(arguments), dict(environment), str(log)), log=log)


def become(environment: Mapping[str, str], log: str) -> None:
    """Make this process one with that environment, which writes to `log`; the first thing that a target does."""
    with Path(log).open("ab", buffering=0) as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)


def _streamforge(arguments: list[str], environment: dict[str, str], log: str) -> None:
    become(environment, log)
    sys.argv = ["streamforge", *arguments]
    main()
