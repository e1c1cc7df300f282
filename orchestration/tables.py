"""Streams and tables: what there is of them, and when Dagster looks at them, checks them and mends them."""

from datetime import UTC, timedelta
from typing import Any

import dagster as dg

from assets.bars import BARS_BACKFILL_KEY, bars_backfill
from assets.catalogue import observable_streams_and_tables
from assets.checks import NEWEST_HOURS, table_checks
from assets.gaps import retention_gap_checks
from orchestration.resources import job_executor
from streamforge.contracts import Contracts

HOURLY = dg.HourlyPartitionsDefinition(start_date="2024-01-01-00:00", timezone="UTC", end_offset=1)
"""Hours of event time, the current one too; the oldest trades that the project knows (recordings) are of 2024."""

_LATE_ENOUGH_MINUTE = 20
"""Of the next hour: out-of-orderness and allowed lateness have passed, and the bars have landed."""

_MENDED_HOURS = 6
"""How far back the schedule mends bars."""

_CHECKED_HOURS = 24.0


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return the streams and tables of `contracts`, with jobs and schedules that observe, check and mend them."""
    observed = observable_streams_and_tables(contracts)
    observe = dg.define_asset_job(
        "observe",
        # By key: a selection by group leaves out what is only observed.
        selection=dg.AssetSelection.assets(*observed.keys).without_checks(),
        description="Record where every stream and table stands: offsets and lag, rows and table snapshot.",
        executor_def=job_executor(dg.in_process_executor),
    )
    mend_bars = dg.define_asset_job(
        "bars_backfill",
        selection=dg.AssetSelection.assets(BARS_BACKFILL_KEY),
        description="Build the bars of past hours again from the trades; land those that are missing or different. The "
        f"schedule asks for the last {_MENDED_HOURS} hours; start a backfill for older ones.",
    )
    checks = table_checks(contracts)
    gaps = retention_gap_checks(contracts)
    quality = dg.define_asset_job(
        "quality",
        selection=dg.AssetSelection.checks(*checks, gaps),
        description="Check every table against the quality rules of its contract, how fresh each instrument is, and "
        "whether Kafka's retention was faster than us.",
        executor_def=job_executor(dg.in_process_executor),
    )
    newest = {"ops": {item.node_def.name: {"config": {NEWEST_HOURS: _CHECKED_HOURS}} for item in checks}}
    return dg.Definitions(
        assets=[observed, bars_backfill(contracts, HOURLY)],
        asset_checks=[*checks, gaps],
        jobs=[observe, mend_bars, quality],
        schedules=[
            dg.ScheduleDefinition(
                job=observe, cron_schedule="*/5 * * * *", default_status=dg.DefaultScheduleStatus.RUNNING
            ),
            dg.ScheduleDefinition(
                job=quality,
                cron_schedule="40 * * * *",
                run_config=newest,
                description=f"Of each table the newest {_CHECKED_HOURS:g} hours; start the job by hand for every row.",
                default_status=dg.DefaultScheduleStatus.RUNNING,
            ),
            _of_the_last_hours(mend_bars),
        ],
    )


def _of_the_last_hours(job: Any) -> dg.ScheduleDefinition:  # Dagster does not export the type of an asset job
    @dg.schedule(
        name=f"{job.name}_schedule",
        job=job,
        cron_schedule=f"{_LATE_ENOUGH_MINUTE} * * * *",
        execution_timezone="UTC",
        description=f"Of each of the last {_MENDED_HOURS} hours that have ended, in one run: trades may land late, and "
        "a run may have been missed. Hours whose bars are equal commit nothing; what comes later needs a backfill.",
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    def last_hours(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        now = context.scheduled_execution_time.astimezone(UTC)
        last, first = (
            (now - timedelta(hours=back)).strftime(HOURLY.fmt.replace("%M", "00")) for back in (1, _MENDED_HOURS)
        )
        # Dagster's own tags of a run over a range of partitions.
        tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        return dg.RunRequest(run_key=last, tags=tags)

    return last_hours
