"""Streams and tables: what there is of them, and when Dagster looks at them."""

from __future__ import annotations

import dagster as dg

from assets.catalogue import STREAMS, TABLES, observable_streams, observable_tables
from streamforge.contracts import Contracts


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return the streams and tables of `contracts`, observed every five minutes."""
    observe = dg.define_asset_job(
        "observe",
        selection=dg.AssetSelection.groups(STREAMS, TABLES),
        description="Record where every stream and table stands: offsets, rows, table snapshot.",
    )
    return dg.Definitions(
        assets=[observable_streams(contracts), observable_tables(contracts)],
        jobs=[observe],
        schedules=[dg.ScheduleDefinition(job=observe, cron_schedule="*/5 * * * *")],
    )
