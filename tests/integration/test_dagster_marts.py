"""dbt under Dagster: one connected graph, real runs on Spark, data tests as checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets.catalogue import PLATFORM_RESOURCE, table_key
from assets.marts import mart_key, marts_assets
from orchestration.marts import definitions
from orchestration.resources import Platform
from streamforge.contracts import Contracts, load_contracts
from streamforge.lakehouse.catalog import open_catalog
from streamforge.marts.project import marts_namespace, read_graph
from streamforge.settings import Settings
from tests.marts_process import BTC, MART, walk
from tests.marts_support import append_bars, settings_of

# Two runs of dbt, each with a Spark of its own, on a machine that may have other work.
pytestmark = pytest.mark.timeout(900)
CHAIN = ("stg_bars", "int_bars", MART)


@pytest.fixture(scope="module")
def contracts() -> Contracts:
    return load_contracts(Settings(_env_file=None).contracts_dir)  # type: ignore[call-arg]


def test_models_hang_on_the_tables_and_tests_are_checks(contracts: Contracts) -> None:
    graph = read_graph()
    assets = marts_assets(contracts, graph)
    deps = {spec.key: {dep.asset_key for dep in spec.deps} for spec in assets.specs}
    assert deps[mart_key("stg_bars")] == {table_key(contracts["bars"])}
    assert deps[mart_key("int_bars")] == {mart_key("stg_bars")}
    assert deps[mart_key(MART)] == {mart_key("int_bars")}
    roots = {key for wanted in deps.values() for key in wanted} - deps.keys()
    assert roots == {table_key(item) for item in contracts.with_table}
    assert {check.name for check in assets.check_specs} == {test.name for test in graph.tests}


def test_the_job_has_every_model_and_the_schedule_runs_it(contracts: Contracts) -> None:
    platform = dg.ResourceDefinition.none_resource()
    made = dg.Definitions.merge(definitions(contracts), dg.Definitions(resources={PLATFORM_RESOURCE: platform}))
    job = made.resolve_job_def("marts")
    assert job.asset_layer.executable_asset_keys == {mart_key(model.name) for model in read_graph().models}
    [schedule] = made.get_repository_def().schedule_defs
    assert (schedule.job_name, schedule.cron_schedule) == ("marts", "5 * * * *")


def test_definitions_load_without_dbt_and_spark() -> None:
    code = (
        "import sys; import orchestration.marts as marts; from streamforge.contracts import load_contracts\n"
        "from streamforge.settings import load_settings\n"
        "marts.definitions(load_contracts(load_settings().contracts_dir))\n"
        "print(sorted(set(sys.modules) & {'dbt', 'dagster_dbt', 'pyspark', 'duckdb'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_builds_the_mart_and_a_broken_one_fails_its_check(tmp_path: Path, contracts: Contracts) -> None:
    settings = settings_of(tmp_path / "home", "bars")
    append_bars(settings, walk(BTC, range(300), 60_000))
    assets = marts_assets(contracts, read_graph())
    resources = {PLATFORM_RESOURCE: dg.ResourceDefinition.hardcoded_resource(Platform(settings, contracts))}
    with dg.instance_for_test() as instance:
        chain = dg.AssetSelection.assets(*(mart_key(name) for name in CHAIN))
        result = dg.materialize([assets], selection=chain, instance=instance, resources=resources)
        assert result.success
        made = {event.asset_key: event.materialization for event in _materialized(result)}
        assert made.keys() == {mart_key(name) for name in CHAIN}
        assert made[mart_key(MART)].metadata["dagster/row_count"].value == 300 // 5 + 300 // 60
        assert {each.check_name: each.passed for each in result.get_asset_check_evaluations()} == {
            test.name: True for test in read_graph().tests
        }
        _double_a_row(settings)
        wanted = dg.AssetSelection.checks(dg.AssetCheckKey(mart_key(MART), "one_row_per_bar"))
        broken = dg.materialize(
            [assets],
            # stg_trades reads a table that is not there: a run that makes nothing of it must not be called well.
            selection=wanted | dg.AssetSelection.assets(mart_key("stg_trades")).without_checks(),
            instance=instance,
            resources=resources,
            raise_on_error=False,
        )
        [check] = broken.get_asset_check_evaluations()
        assert (check.check_name, check.passed) == ("one_row_per_bar", False)
        assert check.metadata["rows_that_break_it"].value == 1
        assert not broken.success
        assert "stg_trades" in str(broken.failure_data_for_node("dbt_build"))
        assert not _materialized(broken)


def _materialized(result: dg.ExecuteInProcessResult) -> list[dg.DagsterEvent]:
    return [event for event in result.all_events if event.is_step_materialization]


def _double_a_row(settings: Settings) -> None:
    table = open_catalog(settings).load_table((marts_namespace(settings), MART))
    table.append(table.scan(limit=1).to_arrow().cast(table.schema().as_arrow()))
