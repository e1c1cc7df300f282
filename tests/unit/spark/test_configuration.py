"""What Spark is told: the catalog, loopback, and a Java that drops one argument."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from streamforge.errors import ConfigurationError
from streamforge.settings import Settings
from streamforge.spark.configuration import catalog_conf, spark_conf, spark_environment


def _settings(home: Path, **values: Any) -> Settings:
    return Settings(_env_file=None, home=home, **values)  # type: ignore[call-arg]


def test_conf_local_binds_to_loopback_and_brings_only_jars_that_spark_lacks(tmp_path: Path) -> None:
    conf = spark_conf(_settings(tmp_path))
    assert conf["spark.master"] == "local[*]"
    assert conf["spark.driver.bindAddress"] == conf["spark.driver.host"] == "127.0.0.1"
    names = sorted(Path(jar).name for jar in conf["spark.driver.extraClassPath"].split(":"))
    assert [name for name in names if name.startswith(("iceberg", "spark-sql-kafka", "sqlite"))] == [
        "iceberg-spark-runtime-4.1_2.13-1.12.0.jar",
        "spark-sql-kafka-0-10_2.13-4.1.1.jar",
        "sqlite-jdbc-3.50.3.0.jar",
    ]
    assert not [name for name in names if name.startswith(("scala-library", "hadoop-", "slf4j"))]


def test_conf_cluster_ships_the_jars_and_does_not_bind_to_loopback(tmp_path: Path) -> None:
    settings = _settings(tmp_path, spark_master="spark://head:7077", spark_options={"spark.ui.enabled": "true"})
    conf = spark_conf(settings)
    assert "sqlite-jdbc" in conf["spark.jars"]
    assert "spark.driver.bindAddress" not in conf
    assert conf["spark.ui.enabled"] == "true"
    assert "SPARK_LOCAL_IP" not in spark_environment(settings)


def test_catalog_conf_rest_names_the_uri_and_no_file(tmp_path: Path) -> None:
    settings = _settings(tmp_path, catalog_type="rest", catalog_uri="http://127.0.0.1:1", catalog_name="lake")
    conf = catalog_conf(settings)
    assert conf["spark.sql.catalog.lake.type"] == "rest"
    assert conf["spark.sql.catalog.lake.uri"] == "http://127.0.0.1:1"
    assert conf["spark.sql.catalog.lake.cache-enabled"] == "false"
    assert "spark.sql.catalog.lake.warehouse" not in conf


def test_catalog_conf_other_sql_catalog_is_refused_without_its_password(tmp_path: Path) -> None:
    settings = _settings(tmp_path, catalog_uri="postgresql://me:secret@host/lake")
    with pytest.raises(ConfigurationError, match="STREAMFORGE_CATALOG_TYPE=rest") as raised:
        catalog_conf(settings)
    assert "secret" not in str(raised.value)


def test_java_of_ours_runs_with_a_module_that_the_runtime_lacks_and_keeps_spaces(tmp_path: Path) -> None:
    environment = spark_environment(_settings(tmp_path / "a home"))
    java = Path(environment["JAVA_HOME"]) / "bin" / "java"
    shown = subprocess.run(
        [java, "-Dkept=two words", "--add-modules=jdk.incubator.vector", "-XshowSettings:properties", "-version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "kept = two words" in shown.stderr
    assert "java.specification.version = 21" in shown.stderr
