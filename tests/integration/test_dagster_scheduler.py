"""The loop of Dagster's own scheduler daemon over the code location, with a clock that a test sets."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.scheduler.instigation import TickStatus
from dagster._core.test_utils import (
    InProcessTestWorkspaceLoadTarget,
    create_test_daemon_workspace_context,
    freeze_time,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._scheduler.scheduler import launch_scheduled_runs

from orchestration import lakehouse

SUNDAY = datetime(2026, 1, 4, 3, 58, tzinfo=UTC)
AFTER_EVERY_TICK = timedelta(hours=2, minutes=47)
"""Until 06:45: past the weekly removal of orphans (04:30) and the maintenance of every six hours (06:30)."""
SWITCHED_ON = "marts_schedule"
# Runs are queued, as `streamforge up` has it, and nothing takes them from the queue here.
QUEUE = {"run_coordinator": {"module": "dagster._core.run_coordinator", "class": "QueuedRunCoordinator"}}


def _iterate(daemon: WorkspaceProcessContext, now: datetime) -> None:
    """Let the scheduler look once; of the ticks that it missed it makes up for the last one."""
    with freeze_time(now):
        for _ in launch_scheduled_runs(daemon, logging.getLogger(__name__), now, {}, max_catchup_runs=1):
            pass


# Dagster looks at its own property when a location is loaded in this process.
@pytest.mark.filterwarnings("ignore:Property `ScheduleDefinition.environment_vars` is deprecated:DeprecationWarning")
def test_scheduler_evaluates_every_schedule_that_is_on_and_queues_its_run() -> None:
    repository = lakehouse.defs.get_repository_def()
    jobs = {each.name: each.job_name for each in repository.schedule_defs}
    module = LoadableTargetOrigin(executable_path=sys.executable, module_name=lakehouse.__name__, attribute="defs")
    target = InProcessTestWorkspaceLoadTarget(InProcessCodeLocationOrigin(module, location_name="lakehouse"))
    with (
        dg.instance_for_test(overrides=QUEUE) as instance,
        create_test_daemon_workspace_context(target, instance) as daemon,
    ):
        location = daemon.create_request_context().get_code_location("lakehouse")
        [remote] = location.get_repositories().values()
        schedules = {each.name: each for each in remote.get_schedules()}
        _iterate(daemon, SUNDAY)
        assert not instance.get_runs(), "no schedule makes up for what was before it was there"
        with freeze_time(SUNDAY):
            instance.start_schedule(schedules[SWITCHED_ON])
        _iterate(daemon, SUNDAY + AFTER_EVERY_TICK)
        ran = {}
        for name, schedule in schedules.items():
            [tick] = instance.get_ticks(schedule.get_remote_origin_id(), schedule.selector_id)
            assert (name, tick.status, tick.error) == (name, TickStatus.SUCCESS, None)
            runs = [instance.get_run_by_id(run_id) for run_id in tick.run_ids]
            ran[name] = [(run.job_name, run.status) for run in runs if run is not None]
    assert ran == {name: [(job, dg.DagsterRunStatus.QUEUED)] for name, job in jobs.items()}
