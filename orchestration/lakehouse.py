"""Code location `lakehouse`: streams and tables as the contracts say, observed every five minutes."""

from __future__ import annotations

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE, STREAMS, TABLES, observable_streams, observable_tables
from orchestration.resources import platform_resource
from streamforge.contracts import load_contracts
from streamforge.settings import load_settings

_contracts = load_contracts(load_settings().contracts_dir)

observe = dg.define_asset_job(
    "observe",
    selection=dg.AssetSelection.groups(STREAMS, TABLES),
    description="Record where every stream and table stands: offsets, rows, table snapshot.",
)

defs = dg.Definitions(
    assets=[observable_streams(_contracts), observable_tables(_contracts)],
    jobs=[observe],
    schedules=[dg.ScheduleDefinition(job=observe, cron_schedule="*/5 * * * *")],
    resources={PLATFORM_RESOURCE: platform_resource},
)
