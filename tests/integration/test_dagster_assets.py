"""Definitions load without the platform, and an observation tells what really lies in broker and catalog."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pytest
import yaml
from confluent_kafka import Producer

from assets.catalogue import PLATFORM_RESOURCE, observable_streams, observable_tables, stream_key, table_key
from orchestration.resources import Platform
from streamforge.contracts import load_contracts
from streamforge.kafka import producer_config
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.settings import Settings
from tests.conftest import MakeTopics

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "pyspark", "mlflow", "lightgbm")


def test_every_code_location_loads_without_heavy_libraries(tmp_path: Path) -> None:
    workspace = yaml.safe_load((ROOT / "workspace.yaml").read_text())
    modules = [item["python_module"]["module_name"] for item in workspace["load_from"]]
    assert modules
    for module in modules:
        code = (
            f"import sys, {module}\n"
            f"found = sorted(set(sys.modules) & set({HEAVY!r}))\n"
            f"{module}.defs.get_repository_def()\n"
            "sys.exit(f'imported {found}' if found else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_topic_and_table_of_a_contract_is_an_asset_with_its_columns() -> None:
    contracts = load_contracts(ROOT / "contracts")
    specs = {
        spec.key: spec
        for assets in (observable_streams(contracts), observable_tables(contracts))
        for spec in assets.specs
    }
    wanted = {stream_key(item) for item in contracts.with_topic} | {table_key(item) for item in contracts.with_table}
    assert set(specs) == wanted
    trades = contracts["trades"]
    spec = specs[table_key(trades)]
    columns = spec.metadata["dagster/column_schema"].columns
    assert [(column.name, column.type) for column in columns] == [(f.name, f.type_name) for f in trades.fields]
    assert [dep.asset_key for dep in specs[stream_key(trades)].deps] == [stream_key(contracts["raw-trades"])]
    assert list(spec.owners) == [f"team:{trades.owner}"]


@pytest.mark.integration
def test_observation_tells_offsets_rows_and_table_snapshot(platform: Settings, make_topics: MakeTopics) -> None:
    contracts = make_topics("market-gaps")
    gaps = contracts["market-gaps"]
    assert gaps.topic is not None
    producer = Producer(producer_config(platform))
    for number in range(3):
        producer.produce(gaps.topic.name, b"{}", key=str(number).encode(), partition=0)
    assert producer.flush(30) == 0
    ensure_table(open_catalog(platform), platform, contracts["commits"]).append(
        pa.Table.from_pylist([_commit_row(number) for number in range(2)], schema=contracts["commits"].arrow_schema)
    )
    with dg.instance_for_test() as instance:
        for assets, key in (
            (observable_streams(contracts), stream_key(gaps)),
            (observable_tables(contracts), table_key(contracts["commits"])),
        ):
            result = dg.materialize(
                [assets],
                selection=[key],
                instance=instance,
                resources={PLATFORM_RESOURCE: dg.ResourceDefinition.hardcoded_resource(Platform(platform, contracts))},
            )
            assert result.success
        stream = _last_observation(instance, stream_key(gaps))
        table = _last_observation(instance, table_key(contracts["commits"]))
    assert stream["end_offsets"] == {"0": 3} | {str(n): 0 for n in range(1, gaps.topic.partitions)}
    assert stream["retained_offsets"] == len(range(3))
    assert table["dagster/row_count"] == len(range(2))
    assert table["table_snapshot"] != "none"


def _last_observation(instance: dg.DagsterInstance, key: dg.AssetKey) -> dict[str, object]:
    [record] = instance.fetch_observations(key, limit=1).records
    observation = record.asset_observation
    assert observation is not None
    return {name: value.value for name, value in observation.metadata.items()}


def _commit_row(number: int) -> dict[str, object]:
    return {
        "table_name": "trades",
        "snapshot_id": number,
        "commit_id": str(number),
        "operation": "append",
        "ts_committed": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        "added_rows": 1,
        "source_ranges": "{}",
        "summary": "{}",
    }
