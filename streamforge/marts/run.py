"""Run dbt: in this process, on its Spark or on one that ends with the run, or in a process of its own.

dbt takes whatever session this process has, so ours is started first, with the function that the models need.
One run at a time writes the marts of a home; another one waits for its turn.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from streamforge.errors import ConfigurationError, ProcessError
from streamforge.marts.project import marts_namespace, project_dir, work_dir
from streamforge.marts.spark_functions import register_functions
from streamforge.platform.plan import environment_of
from streamforge.settings import Settings
from streamforge.spark.session import spark_session

WITHOUT_SPARK = frozenset({"parse", "list", "ls", "clean", "deps"})
TURN_S = 1800.0
"""How long a run waits for the one before it."""
_STOP_S = 30.0
_QUIET = {"DBT_SEND_ANONYMOUS_USAGE_STATS": "false", "DBT_USE_COLORS": "false"}


class NodeResult(msgspec.Struct, frozen=True):
    """What dbt says of one model or test after a run.

    Args:
        status: success or error of a model; pass, warn, fail or error of a test; skipped of either.
        failures: rows that break a test.
        execution_time: seconds.
    """

    unique_id: str
    status: str
    execution_time: float
    message: str | None = None
    failures: int | None = None


class RunResults(msgspec.Struct, frozen=True):
    """What dbt writes into `run_results.json`, as far as we read it."""

    results: list[NodeResult]


def run_dbt(settings: Settings, arguments: Sequence[str], *, target: Path | None = None) -> bool:
    """Run a dbt command in this process; return whether all that it did went well.

    Args:
        settings: of the platform.
        arguments: dbt's own command line, for instance `["build", "--full-refresh"]`.
        target: folder for dbt's artifacts; below `home` where none is given.

    Raises:
        ConfigurationError: dbt does not know the arguments, or a part is not installed.
        ProcessError: dbt or Spark broke, or another run did not end in time.
    """
    folder = work_dir(settings)
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments or arguments[0] in WITHOUT_SPARK:
        return _invoke(settings, arguments, target or folder / "target")
    try:
        with FileLock(folder / "run.lock", timeout=TURN_S), _spark(settings):
            return _invoke(settings, arguments, target or folder / "target")
    except Timeout as error:
        msg = f"another dbt run holds {folder / 'run.lock'} for more than {TURN_S:.0f} s: stop it, or run again later"
        raise ProcessError(msg) from error


def run_dbt_process(settings: Settings, arguments: Sequence[str], hear: Callable[[str], object]) -> list[NodeResult]:
    """Run a dbt command in a process of its own and return what became of each node; Spark ends with it.

    Whoever is interrupted meanwhile takes the process along.

    Args:
        settings: of the platform.
        arguments: dbt's own command line.
        hear: is given each line of output.

    Raises:
        ProcessError: dbt ended without results; the message has its last lines.
    """
    work_dir(settings).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir(settings), prefix="run-") as target:
        command = [sys.executable, "-m", "cli", "dbt", "--target-path", target, "--", *arguments]
        lines: list[str] = []
        with _child(command, os.environ | environment_of(settings) | _QUIET) as process:
            for line in process.stdout or ():
                lines.append(line.rstrip())
                hear(lines[-1])
        try:
            return msgspec.json.decode((Path(target) / "run_results.json").read_bytes(), type=RunResults).results
        except (OSError, msgspec.MsgspecError) as error:
            said = "\n".join(lines[-20:])
            msg = f"dbt {' '.join(arguments)} ended with exit code {process.returncode} and without results:\n{said}"
            raise ProcessError(msg) from error


def parse_manifest(settings: Settings) -> dict[str, Any]:
    """Let dbt parse the project, without Spark and network, and return its manifest.

    Raises:
        ConfigurationError: the project has an error; dbt says which.
    """
    work_dir(settings).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir(settings), prefix="parse-") as target:
        if not run_dbt(settings, ["parse", "--no-partial-parse", "--quiet"], target=Path(target)):
            msg = f"dbt cannot parse {project_dir()}: see its messages above"
            raise ConfigurationError(msg)
        manifest: dict[str, Any] = msgspec.json.decode((Path(target) / "manifest.json").read_bytes())
        return manifest


def _invoke(settings: Settings, arguments: Sequence[str], target: Path) -> bool:
    try:
        from dbt.cli.main import dbtRunner  # noqa: PLC0415  # heavy, and in a group of its own
    except ImportError as error:
        msg = "dbt is not installed: it comes with the dependency group `spark` (`uv sync --group spark`)"
        raise ConfigurationError(msg) from error
    from dbt.cli.exceptions import DbtUsageException  # noqa: PLC0415

    os.environ.update(_QUIET)
    variables = {"namespace": settings.namespace, "marts_namespace": marts_namespace(settings)}
    folder = str(project_dir())
    options = ["--project-dir", folder, "--profiles-dir", folder, "--target-path", str(target)]
    options += ["--log-path", str(target), "--vars", msgspec.json.encode(variables).decode()]
    result = dbtRunner().invoke([*arguments, *(options if arguments else ["--help"])])
    if isinstance(result.exception, DbtUsageException):
        msg = f"dbt {' '.join(arguments)}: {result.exception}. `streamforge dbt` lists the commands"
        raise ConfigurationError(msg) from result.exception
    if result.exception is not None:
        msg = f"dbt {' '.join(arguments)} broke: {result.exception}"
        raise ProcessError(msg) from result.exception
    return bool(result.success)


@contextmanager
def _spark(settings: Settings) -> Iterator[None]:
    """Start the session that dbt will find, and stop Spark afterwards where this process had none before."""
    from pyspark.sql import SparkSession  # noqa: PLC0415  # heavy

    logging.getLogger("py4j").setLevel(logging.WARNING)  # it tells of every connection that it closes
    is_ours = SparkSession.getActiveSession() is None
    spark_session(settings)
    session = SparkSession.builder.getOrCreate()
    try:
        register_functions(session)
        yield
    finally:
        if is_ours:
            session.stop()


@contextmanager
def _child(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(  # noqa: S603 - our own command line
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
