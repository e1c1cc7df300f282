"""Spark sessions: one Spark application for a process, a session of its own for each platform.

PySpark is imported inside functions: Dagster loads its definitions without it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

from streamforge.errors import ProcessError
from streamforge.lakehouse.catalog import open_catalog
from streamforge.settings import Settings
from streamforge.spark.configuration import catalog_conf, spark_conf, spark_environment

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_SUBMITTED = "pyspark-shell"
"""Last argument of the scripts that start Java for PySpark, and of Java itself."""


def spark_session(settings: Settings) -> SparkSession:
    """Return a session on the catalog of the settings; starts Spark where this process has none yet.

    What belongs to the application (master, memory) is as the first settings of the process said. The
    application ends with the process, or when a session is stopped.

    Raises:
        ConfigurationError: PySpark is not installed, or the catalog cannot be opened.
        PermanentSourceError: the jars are not here and cannot be fetched.
        ProcessError: Java does not start.
    """
    from pyspark.sql import SparkSession  # noqa: PLC0415  # heavy

    if settings.catalog_type == "sql":
        open_catalog(settings)  # Spark would make the file of an absent catalog another way
    application = SparkSession.builder
    for key, value in spark_conf(settings).items():
        application = application.config(key, value)
    with _variables(spark_environment(settings)), _interruptible():
        try:
            session = application.getOrCreate().newSession()
        except spark_failures() as error:
            said = failure_text(error)
            msg = f"Spark ({settings.spark_master}) does not start: {said}. `streamforge doctor` checks its parts"
            raise ProcessError(msg) from error
    for key, value in catalog_conf(settings).items():
        session.conf.set(key, value)
    return session


def spark_failures() -> tuple[type[Exception], ...]:
    """Return what a call of Spark may raise: an error that PySpark knows, or any other of Java."""
    from py4j.protocol import Py4JError  # noqa: PLC0415  # heavy, as PySpark is
    from pyspark.errors import PySparkException  # noqa: PLC0415

    return PySparkException, Py4JError


def failure_text(error: Exception) -> str:
    """Return the first line of what Spark says of its failure, without Java's stack trace."""
    lines = str(getattr(error, "java_exception", error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let an interrupt end this process and its Java, as it ends the other processes of ours.

    PySpark forgets the Java that it is starting when it is interrupted, and that one never ends. Once it has started
    Java it takes the signal for itself, and its handler calls Java in the middle of another call: what comes out is an
    error of that call, which looks as if one statement had failed.
    """
    from pyspark import SparkContext  # noqa: PLC0415  # heavy

    handler = signal.getsignal(signal.SIGINT)
    known = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        if SparkContext._gateway is None:  # noqa: SLF001 - there is no other word for: Java did not start
            for child in set(psutil.Process().children(recursive=True)) - known:
                with suppress(psutil.NoSuchProcess):
                    if _SUBMITTED in child.cmdline():
                        child.kill()


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
