"""Dagster's part of a demo: its jobs, run one after the other by a process of their own.

The process imports Dagster and works while the market runs and while tables are compared, so that nobody waits for it.
It ends with its standard input, which the demo's own end closes, however that comes.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import msgspec

from streamforge.errors import ProcessError
from streamforge.platform.control_plane import dagster_environment, prepare_instance
from streamforge.platform.plan import environment_of
from streamforge.settings import Settings

FRESHNESS_CHECK = "instruments_are_fresh"
"""Of a market that runs: in a demo, which has stopped its market, it says how long ago that was."""

SUCCESS = "SUCCESS"
"""Dagster's word for a run that ended well."""

_MODULE = "orchestration.once"
_END_TIMEOUT_S = 15.0


class CheckFigure(msgspec.Struct, frozen=True):
    """How an asset check came out."""

    asset: str
    name: str
    passed: bool
    severity: str

    @property
    def is_problem(self) -> bool:
        """Return whether a demo may not end well with it."""
        return not self.passed and self.severity == "ERROR" and self.name != FRESHNESS_CHECK


class JobFigures(msgspec.Struct, frozen=True):
    """How a run ended: what it recorded, its checks, and why it failed."""

    job: str
    run_id: str
    status: str
    wall_s: float
    assets: list[str]
    checks: list[CheckFigure]
    metadata: dict[str, Any]
    failure: str

    def problems(self) -> list[str]:
        """Return a sentence for each thing that should not be."""
        found = [f"Dagster's job {self.job} ended with {self.status}: {self.failure}"] if self.status != SUCCESS else []
        return found + [f"check {each.name} of {each.asset} failed" for each in self.checks if each.is_problem]

    def as_dict(self) -> dict[str, Any]:
        """Return what the report holds of it."""
        return {
            "job": self.job,
            "run_id": self.run_id,
            "status": self.status,
            "wall_s": self.wall_s,
            "assets": len(self.assets),
            "checks_passed": sum(each.passed for each in self.checks),
            "checks_failed": [f"{each.asset}:{each.name}" for each in self.checks if not each.passed],
        }


class Jobs:
    """A process that runs Dagster's jobs on the instance of one home, in the order in which they are asked for.

    Args:
        settings: of the platform; its home gets the instance.
        log_file: where the process and its runs write their log.
    """

    def __init__(self, settings: Settings, log_file: Path) -> None:
        home = settings.home_path
        prepare_instance(home)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self.log_file = log_file
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # what has come is seen by `select`, not in a buffer of ours
                stderr=log,
                env=os.environ | environment_of(settings) | dagster_environment(home),
            )
        self._requests = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)
        self._asked: deque[str] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def waiting(self) -> Sequence[str]:
        """Return the jobs that were asked for and whose answer nobody has taken, in order."""
        return tuple(self._asked)

    def ask(self, job: str, *, config: dict[str, Any] | None = None, partition_key: str | None = None) -> None:
        """Ask for a run and do not wait for it.

        Raises:
            ProcessError: the process ended; names its log.
        """
        request = {"job": job, "config": config, "partition_key": partition_key}
        try:
            self._requests.write(msgspec.json.encode(request) + b"\n")
        except BrokenPipeError as error:
            raise self._no_answer(job) from error
        self._asked.append(job)

    def answer(self, timeout_s: float) -> JobFigures | None:
        """Take the answer of the job that was asked for first; None when it has not come within `timeout_s`.

        Raises:
            ProcessError: the process ended; names its log.
        """
        ready, _, _ = select.select([self._answers], [], [], timeout_s)
        if not ready:
            return None
        job = self._asked.popleft()
        line = self._answers.readline()
        if not line:
            raise self._no_answer(job)
        return msgspec.json.decode(line, type=JobFigures)

    def _no_answer(self, job: str) -> ProcessError:
        return ProcessError(f"Dagster's job {job} gave no answer, its process has ended; see {self.log_file}")

    def close(self) -> None:
        """End the process: its input ends, and it is killed where it does not end by that."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
