"""Definitions load without the platform, and an observation tells what really lies in broker and catalog."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from confluent_kafka import Consumer
from confluent_kafka import TopicPartition as KafkaTopicPartition

from assets.catalogue import STREAMS, TABLES, stream_key, table_key
from orchestration import lakehouse, tables
from streamforge import kafka
from streamforge.contracts import Contracts, load_contracts
from streamforge.kafka import reader_config
from streamforge.lakehouse.catalog import ensure_table, ensure_tables, open_catalog
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from tests.conftest import MakeTopics
from tests.dagster_support import failures, with_platform
from tests.pipeline_support import Pipeline
from tests.replay_support import land_direct
from tests.writer_support import produce
from tests.writer_support import trades as trade_values

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torch_geometric", "pyspark", "mlflow", "lightgbm", "sklearn")
# What Dagster and the catalog cost by themselves; a location may cost as much again.
LIBRARIES = "import dagster, pyiceberg.catalog.sql, pyiceberg.io.pyarrow"
MOST_OF_LIBRARIES = 2.0


def test_code_location_lakehouse_loads_in_time_without_heavy_libraries() -> None:
    # A ratio, because a second of processor time is longer on a busy machine. benchmarks/code_locations.py has seconds.
    location = "import orchestration.lakehouse as location; location.defs.get_repository_def()"
    found: set[str] = set()

    def processor_s(code: str) -> float:
        ask = f"import sys, time; {code}; print(time.process_time(), *sorted(set(sys.modules) & set({HEAVY!r})))"
        done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        spent_s, *heavy = done.stdout.split()
        found.update(heavy)
        return float(spent_s)

    # What disturbs one measurement does not disturb all three; what is too slow is so in each.
    ratios = (processor_s(location) / processor_s(LIBRARIES) for _ in range(3))
    assert any(ratio < MOST_OF_LIBRARIES for ratio in ratios)
    assert not found


def test_location_ml_that_cannot_be_imported_leaves_lakehouse_working(tmp_path: Path) -> None:
    workspace = yaml.safe_load((ROOT / "workspace.yaml").read_text())
    [ml] = [each["python_module"] for each in workspace["load_from"] if each["python_module"]["location_name"] == "ml"]
    (tmp_path / "broken.py").write_text("import a_library_that_is_not_there\n")
    ml |= {"module_name": "broken", "working_directory": str(tmp_path)}
    (tmp_path / "workspace.yaml").write_text(yaml.safe_dump(workspace))
    done = subprocess.run(
        [Path(sys.executable).with_name("dagster"), "definitions", "validate", "-w", tmp_path / "workspace.yaml"],
        cwd=ROOT,
        env={**os.environ, "DAGSTER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "Validation successful for code location lakehouse" in said
    assert "Validation failed for code location ml" in said
    assert "a_library_that_is_not_there" in said
    assert done.returncode == 1


def test_every_topic_and_table_of_a_contract_is_an_asset_with_its_columns() -> None:
    contracts = load_contracts(ROOT / "contracts")
    specs = {spec.key: spec for spec in lakehouse.defs.resolve_all_asset_specs()}
    wanted = {stream_key(item) for item in contracts.with_topic} | {table_key(item) for item in contracts.with_table}
    assert wanted <= set(specs)
    unknown = {key for key in specs if key.path[0] in (STREAMS, TABLES)} - wanted
    assert not unknown
    trades = contracts["trades"]
    spec = specs[table_key(trades)]
    columns = spec.metadata["dagster/column_schema"].columns
    assert [(column.name, column.type) for column in columns] == [(f.name, f.type_name) for f in trades.fields]
    shown = {column.name: column for column in columns}
    assert shown["aggressor_side"].constraints.other == ["one of BUY, SELL"]
    assert shown["price"].constraints.other == ["exclusiveMinimum 0"]
    assert [column.name for column in columns if "primary_key" in column.tags] == list(trades.primary_key)
    assert [dep.asset_key for dep in specs[stream_key(trades)].deps] == [stream_key(contracts["raw-trades"])]
    assert list(spec.owners) == [f"team:{trades.owner}"]
    assert spec.description is not None
    assert trades.purpose in spec.description
    assert spec.metadata["freshness_target_s"] == trades.freshness_s is not None


@pytest.mark.integration
def test_observe_tells_offsets_lag_of_each_consumer_rows_and_table_snapshot(
    platform: Settings, make_topics: MakeTopics
) -> None:
    contracts = make_topics("trades")
    trades = contracts["trades"]
    topic = topic_of(contracts, "trades").name
    ensure_tables(open_catalog(platform), platform, contracts)
    produce(platform, topic, trade_values(6))
    land_direct(Pipeline(platform, contracts), "trades")
    produce(platform, topic, trade_values(4, start=6))
    bars = Consumer(reader_config(platform, **{"group.id": f"{platform.topic_prefix}bars"}))
    bars.commit(offsets=[KafkaTopicPartition(topic, 0, 1)], asynchronous=False)
    bars.close()
    with dg.instance_for_test() as instance:
        result = _observe(instance, platform, contracts)
        assert result.success
        stream = _last_observation(instance, stream_key(trades))
        table = _last_observation(instance, table_key(trades))
        empty = _last_observation(instance, table_key(contracts["bars"]))
        assert not instance.fetch_observations(stream_key(contracts["bars"]), limit=1).records, "there is no such topic"
    # Of each of two topic-partitions: three records and a commit marker, then two and another marker.
    assert stream["end_offsets"] == {"0": 7, "1": 7}
    assert stream["retained_offsets"] == 14
    assert stream["lag/table_trades"] == 2 * (7 - 4)
    assert stream["lag/bars"] == (7 - 1) + 7
    assert "lag/parser" not in stream
    assert (table["dagster/row_count"], table["committed_by"]) == (6, "write")
    assert table["table_snapshot"] != "none"
    assert table["newest_event_at"] == pytest.approx(1_700_000_000.0)
    assert (empty["dagster/row_count"], empty["table_snapshot"]) == (0, "none")


@pytest.mark.integration
def test_observe_with_a_table_missing_says_so_and_still_tells_of_the_others(
    platform: Settings, make_topics: MakeTopics
) -> None:
    contracts = make_topics("trades")
    ensure_table(open_catalog(platform), platform, contracts["trades"])
    with dg.instance_for_test() as instance:
        [(step, said)] = failures(_observe(instance, platform, contracts)).items()
        assert _last_observation(instance, table_key(contracts["trades"]))["dagster/row_count"] == 0
        assert _last_observation(instance, stream_key(contracts["trades"]))["retained_offsets"] == 0
    assert step == "observe_streams_and_tables"
    assert "table market.bars does not exist: `streamforge contracts apply` creates it" in said
    assert "market.trades" not in said


def test_observe_with_the_broker_away_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "REQUEST_TIMEOUT_S", 1.0)
    settings = Settings(_env_file=None, home=tmp_path, bootstrap_servers="127.0.0.1:1")  # type: ignore[call-arg]
    contracts = load_contracts(settings.contracts_dir)
    ensure_tables(open_catalog(settings), settings, contracts)
    with dg.instance_for_test() as instance:
        [(_, said)] = failures(_observe(instance, settings, contracts)).items()
        assert _last_observation(instance, table_key(contracts["trades"]))["dagster/row_count"] == 0, "tables are there"
    assert said.startswith("the broker does not describe topics")
    assert "streamforge broker status" in said


def _observe(instance: dg.DagsterInstance, settings: Settings, contracts: Contracts) -> dg.ExecuteInProcessResult:
    merged = with_platform(tables.definitions(contracts), settings, contracts)
    return merged.resolve_job_def("observe").execute_in_process(instance=instance, raise_on_error=False)


def _last_observation(instance: dg.DagsterInstance, key: dg.AssetKey) -> dict[str, object]:
    [record] = instance.fetch_observations(key, limit=1).records
    observation = record.asset_observation
    assert observation is not None
    return {name: value.value for name, value in observation.metadata.items()}
