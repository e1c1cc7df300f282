"""The marts: what dbt makes of the tables, and when."""

from __future__ import annotations

import dagster as dg

from assets.marts import MARTS, marts_assets
from streamforge.contracts import Contracts
from streamforge.marts.project import read_graph


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return the models and tests of dbt, built every hour once switched on."""
    graph = read_graph()
    marts = dg.define_asset_job(
        MARTS,
        selection=dg.AssetSelection.groups(*sorted({model.layer for model in graph.models})),
        description="Run dbt on Spark: staging views, the mart of bars with indicators, and their data tests.",
        executor_def=dg.in_process_executor,
    )
    return dg.Definitions(
        assets=[marts_assets(contracts, graph)],
        jobs=[marts],
        schedules=[
            dg.ScheduleDefinition(
                job=marts,
                cron_schedule="5 * * * *",
                description="Every hour; off until somebody switches it on, since each run starts Spark.",
                default_status=dg.DefaultScheduleStatus.STOPPED,
            )
        ],
    )
