"""When tables are maintained: small files are merged and table snapshots expire every six hours, orphans go weekly."""

from __future__ import annotations

import dagster as dg

from assets.maintenance import MAINTENANCE, maintained_tables, orphan_removal
from streamforge.contracts import Contracts


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return the maintenance of the tables of `contracts`, with its jobs and schedules."""
    maintain = dg.define_asset_job(
        "maintain",
        selection=dg.AssetSelection.groups(MAINTENANCE),
        description="Merge the small files of every table and expire its old table snapshots.",
    )
    orphans = orphan_removal(contracts)
    running = dg.DefaultScheduleStatus.RUNNING
    return dg.Definitions(
        assets=[maintained_tables(contracts)],
        jobs=[maintain, orphans],
        schedules=[
            dg.ScheduleDefinition(job=maintain, cron_schedule="30 */6 * * *", default_status=running),
            dg.ScheduleDefinition(job=orphans, cron_schedule="30 4 * * 0", default_status=running),
        ],
    )
