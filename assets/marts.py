"""dbt's models as assets and its data tests as their checks; a run is one `dbt build` on Spark.

Staging views are made from the contracts; the mart `market_bars` holds bars of five minutes and one hour with
indicators. A run takes in whatever changed in the tables since the last one, late trades and replays included. Spark
runs in a process of its own and ends with it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from assets.catalogue import PLATFORM_RESOURCE, platform_of, table_key
from assets.failures import clear_failures
from streamforge.contracts import Contracts
from streamforge.lakehouse.catalog import open_catalog
from streamforge.lakehouse.manifests import total_rows
from streamforge.marts.project import MartGraph, Model, ModelTest, marts_namespace
from streamforge.marts.run import NodeResult, run_dbt_process
from streamforge.settings import Settings

MARTS = "marts"

_INCREMENTAL = "incremental"
_WELL = frozenset({"success", "pass", "warn"})


class MartsConfig(dg.Config):
    """What a person may change before a run."""

    full_refresh: bool = Field(
        default=False,
        description="Make the mart anew from all bars; needed only after its model or indicators changed.",
    )


def mart_key(name: str) -> dg.AssetKey:
    """Return the asset key of a dbt model."""
    return dg.AssetKey([MARTS, name])


def marts_assets(contracts: Contracts, graph: MartGraph) -> dg.AssetsDefinition:
    """Return every model as an asset that depends on the tables it reads, and every test as a check of its model."""

    def dbt_build(
        context: dg.AssetExecutionContext, config: MartsConfig
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        settings, _ = platform_of(context.op_execution_context)
        models = {item.name: item for item in graph.models if mart_key(item.name) in context.selected_asset_keys}
        checks = {key.name for key in context.selected_asset_check_keys}
        tests = {item.name: item for item in graph.tests if item.name in checks}
        arguments = ["build", "--indirect-selection", "empty", "--select", *models, *tests]
        with clear_failures():
            found = run_dbt_process(
                settings, [*arguments, *(["--full-refresh"] if config.full_refresh else [])], context.log.info
            )
        results = {item.unique_id.split(".")[2]: item for item in found}
        # In dbt's order: Dagster wants a model after those that it reads.
        for name, result in results.items():
            if name in models and result.status in _WELL:
                yield dg.MaterializeResult(asset_key=mart_key(name), metadata=_metadata(settings, models[name], result))
            elif name in tests:
                yield _judged(tests[name], result)
        _raise_unless_made(models, results)

    decorate = dg.multi_asset(
        name="dbt_build",
        specs=[_spec(model, contracts) for model in graph.models],
        check_specs=[
            dg.AssetCheckSpec(name=item.name, asset=mart_key(item.model), description=item.description)
            for item in graph.tests
        ],
        can_subset=True,
        required_resource_keys={PLATFORM_RESOURCE},
    )
    return decorate(dbt_build)


def _spec(model: Model, contracts: Contracts) -> dg.AssetSpec:
    columns = [dg.TableColumn(name=item.name, type=item.type, description=item.description) for item in model.columns]
    return dg.AssetSpec(
        key=mart_key(model.name),
        deps=[
            *(mart_key(name) for name in model.models),
            *(table_key(contracts.of_table(name)) for name in model.tables),
        ],
        description=model.description,
        group_name=model.layer,
        kinds={"dbt", "spark"} | ({"iceberg"} if model.materialized == _INCREMENTAL else {"view"}),
        metadata={"dagster/column_schema": dg.TableSchema(columns=columns), "materialized": model.materialized},
        # A model that dbt did not come to has no result; the failure that is raised names it.
        skippable=True,
    )


def _metadata(settings: Settings, model: Model, result: NodeResult) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": round(result.execution_time, 2)}
    if model.materialized != _INCREMENTAL:
        return found
    snapshot = open_catalog(settings).load_table((marts_namespace(settings), model.name)).current_snapshot()
    if snapshot is None:
        return found
    return found | {
        "dagster/row_count": total_rows(snapshot),
        "table_snapshot": str(snapshot.snapshot_id),
    }


def _judged(test: ModelTest, result: NodeResult) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        asset_key=mart_key(test.model),
        check_name=test.name,
        passed=result.status == "pass",
        severity=dg.AssetCheckSeverity.WARN if test.severity == "warn" else dg.AssetCheckSeverity.ERROR,
        description=result.message,
        metadata={"status": result.status, "rows_that_break_it": result.failures or 0},
    )


def _raise_unless_made(models: Mapping[str, Model], results: Mapping[str, NodeResult]) -> None:
    missing = {name: results.get(name) for name in models if name not in results or results[name].status not in _WELL}
    if missing:
        said = "\n".join(
            f"{name}: {result.status}: {result.message}" if result else f"{name}: dbt did not come to it"
            for name, result in sorted(missing.items())
        )
        raise dg.Failure(description=f"dbt did not make {len(missing)} of {len(models)} models\n{said}")
