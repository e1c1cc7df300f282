"""Spark sessions: one Spark application for a process, a session of its own for each platform.

PySpark is imported inside functions: Dagster loads its definitions without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from streamforge.errors import ProcessError
from streamforge.lakehouse.catalog import open_catalog
from streamforge.settings import Settings
from streamforge.spark.configuration import catalog_conf, spark_conf, spark_environment

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def spark_session(settings: Settings) -> SparkSession:
    """Return a session on the catalog of the settings; starts Spark where this process has none yet.

    What belongs to the application (master, memory) is as the first settings of the process said. The
    application ends with the process, or when a session is stopped.

    Raises:
        ConfigurationError: PySpark is not installed, or the catalog cannot be opened.
        PermanentSourceError: the jars are not here and cannot be fetched.
        ProcessError: Java does not start.
    """
    from pyspark.errors import PySparkException  # noqa: PLC0415  # heavy
    from pyspark.sql import SparkSession  # noqa: PLC0415

    if settings.catalog_type == "sql":
        open_catalog(settings)  # Spark would make the file of an absent catalog another way
    application = SparkSession.builder
    for key, value in spark_conf(settings).items():
        application = application.config(key, value)
    with _variables(spark_environment(settings)):
        try:
            session = application.getOrCreate().newSession()
        except PySparkException as error:
            msg = f"Spark ({settings.spark_master}) does not start: {error}. `streamforge doctor` checks its parts"
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
