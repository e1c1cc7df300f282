"""Code location `ml`: the assets of a retraining, when they run, and the watch for drift.

It is a location of its own so that a broken model import cannot stop ingestion. On one machine a retraining is one
process: its steps hand arrays on, and each would load the libraries again. In a cluster each step is a Job.
"""

import datetime as dt
from typing import Any

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE
from assets.models import ASSETS, CHECKS, MODELS
from orchestration.resources import Platform, job_executor, platform_resource
from streamforge.errors import StreamForgeError
from streamforge.gnn.history import BarsSource
from streamforge.gnn.libraries import missing_libraries
from streamforge.gnn.steps import champion_drift, champion_source

_DRIFT_INTERVAL_S = 3_600

retrain = dg.define_asset_job(
    "retrain",
    selection=dg.AssetSelection.groups(MODELS),
    executor_def=job_executor(dg.in_process_executor),
    description="Read bars, make features and graphs, train, walk forward beside the baselines, and promote the new "
    "version if it is better.",
)


@dg.schedule(
    job=retrain,
    cron_schedule="0 3 * * 1",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    required_resource_keys={PLATFORM_RESOURCE},
    description="Retrain every Monday at 03:00 UTC, on bars of the table that the champion was trained on.",
)
def weekly_retraining(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Ask for a retraining, where the libraries for it are installed."""
    missing = missing_libraries()
    if missing:
        return dg.SkipReason(f"not installed: {', '.join(missing)} (`uv sync --frozen --group ml`)")
    try:
        source = champion_source(getattr(context.resources, PLATFORM_RESOURCE).settings)
    except StreamForgeError as error:
        return dg.SkipReason(str(error))
    return dg.RunRequest(run_key=f"weekly-{context.scheduled_execution_time:%Y-%m-%d}", run_config=_reading(source))


@dg.sensor(
    job=retrain,
    minimum_interval_seconds=_DRIFT_INTERVAL_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    required_resource_keys={PLATFORM_RESOURCE},
    description="Retrain when recent features have left what the champion was trained on (population stability index), "
    "at most once a day for each champion.",
)
def drift(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Compare recent features with the champion's training and ask for a retraining where they have drifted."""
    missing = missing_libraries()
    if missing:
        return dg.SkipReason(f"not installed: {', '.join(missing)} (`uv sync --frozen --group ml`)")
    platform: Platform = getattr(context.resources, PLATFORM_RESOURCE)
    try:
        found = champion_drift(platform.settings, platform.contracts)
    except StreamForgeError as error:
        return dg.SkipReason(str(error))
    if found is None:
        return dg.SkipReason("there is no champion yet: run the job `retrain`")
    if not found.features:
        return dg.SkipReason(f"fewer than {found.needed_intervals} recent intervals: too few to judge")
    if not found.drifted:
        name, worst = max(found.features.items(), key=lambda item: item[1].psi / item[1].limit)
        return dg.SkipReason(
            f"no drift against champion {found.version}; nearest is {name}: {worst.psi:.3f} of {worst.limit:.3f}"
        )
    told = ", ".join(f"{name} {found.features[name].psi:.3f}" for name in found.drifted)
    context.log.info("drift against champion %s: %s", found.version, told)
    today = dt.datetime.now(dt.UTC).date().isoformat()
    key = f"drift-{found.version}-{today}"
    return dg.RunRequest(run_key=key, run_config=_reading(found.source), tags={"drift": told[:200]})


def _reading(source: BarsSource | None) -> dict[str, Any]:
    """Return the run configuration of a model made of the champion's kind of bars, whichever are more by now.

    Of another kind it could not be compared with the champion, and never take its place. None: there is no champion.
    """
    return {} if source is None else {"ops": {"features": {"config": {"source": source.name}}}}


defs = dg.Definitions(
    assets=ASSETS,
    asset_checks=CHECKS,
    jobs=[retrain],
    schedules=[weekly_retraining],
    sensors=[drift],
    resources={PLATFORM_RESOURCE: platform_resource},
    executor=job_executor(dg.in_process_executor),
)
