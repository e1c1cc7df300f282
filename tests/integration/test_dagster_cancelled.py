"""Runs that a person terminates, through a real code server as the UI does: no process and no lock is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from dagster._core.test_utils import create_run_for_test, create_test_daemon_workspace_context
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget
from filelock import FileLock

from orchestration import lakehouse, maintenance
from streamforge.contracts import load_contracts
from streamforge.marts.project import work_dir
from streamforge.settings import Settings
from tests.dagster_support import Jobs, with_platform
from tests.marts_process import BTC, walk
from tests.marts_support import append_bars, settings_of, table_of
from tests.waiting import wait_until

# Two runs, each with a Spark of its own, on a machine that may have other work.
pytestmark = pytest.mark.timeout(900)

WITHIN_S = 240.0
SMALL_FILES = 6
CANCELED = dg.DagsterRunStatus.CANCELED
ENDED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, CANCELED}


class Cockpit:
    """A code server of the location `lakehouse` on a platform without a broker, and what it runs."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance, workspace: WorkspaceProcessContext) -> None:
        self.settings = settings
        self._instance = instance
        self._workspace = workspace

    def launch(self, job: str, **options: Any) -> str:
        """Launch a run and return its id."""
        context = self._workspace.create_request_context()
        found = context.get_code_location("lakehouse").get_repository("__repository__").get_full_job(job)
        run = create_run_for_test(
            self._instance,
            job_name=job,
            remote_job_origin=found.get_remote_origin(),
            job_code_origin=found.get_python_origin(),
            **options,
        )
        self._instance.launch_run(run.run_id, context)
        return str(run.run_id)

    def end_of(self, run_id: str) -> dg.DagsterRunStatus:
        """Wait for the end of a run, and return its status."""

        def ended() -> dg.DagsterRunStatus | None:
            run = self._instance.get_run_by_id(run_id)
            return run.status if run is not None and run.status in ENDED else None

        return wait_until(ended, timeout_s=WITHIN_S, what=f"run {run_id} ends")

    def cancel_at(self, run_id: str, is_meant: Callable[[psutil.Process], bool]) -> set[psutil.Process]:
        """Terminate a run as the UI does once such a process is there; return all processes that are there then."""

        def started() -> bool:
            run = self._instance.get_run_by_id(run_id)
            assert run is not None
            assert run.status not in ENDED, f"{run.status} before it could be cancelled"
            return any(is_meant(each) for each in processes())

        wait_until(started, timeout_s=WITHIN_S, what="the process to be cancelled has started")
        found = processes()
        assert self._instance.run_coordinator.cancel_run(run_id)
        return found


def processes() -> set[psutil.Process]:
    """Return whatever hangs below the code server and belongs to a run: not Python's own helper."""
    servers = [each for each in psutil.Process().children(recursive=True) if "grpc" in command_of(each)]
    found = {each for server in servers for each in server.children(recursive=True)}
    return {each for each in found if "resource_tracker" not in " ".join(command_of(each))}


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line; nothing of a process that has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_java(process: psutil.Process) -> bool:
    """Return whether it is Java."""
    return [Path(each).name for each in command_of(process)[:1]] == ["java"]


def is_below_dbt(process: psutil.Process) -> bool:
    """Return whether it was started by `streamforge dbt`."""
    try:
        return any(command_of(each)[1:4] == ["-m", "cli", "dbt"] for each in process.parents())
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def cockpit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cockpit]:
    home = tmp_path_factory.mktemp("cancelled") / "home"
    settings = settings_of(home)
    bars = list(walk(BTC, range(120), 60_000))
    for number in range(SMALL_FILES):
        append_bars(settings, bars[20 * number : 20 * (number + 1)])
    location = ModuleTarget(
        module_name=lakehouse.__name__,
        attribute="defs",
        working_directory=str(Path(__file__).parents[2]),
        location_name="lakehouse",
    )
    with pytest.MonkeyPatch.context() as patch, dg.instance_for_test() as instance:
        patch.setenv("STREAMFORGE_HOME", str(home))
        patch.setenv("STREAMFORGE_BOOTSTRAP_SERVERS", "127.0.0.1:1")
        with create_test_daemon_workspace_context(location, instance) as workspace:
            yield Cockpit(settings, instance, workspace)


def content(settings: Settings) -> Mapping[str, Any]:
    """Return the rows of the bars, and their table snapshot."""
    table = table_of(settings, "bars")
    return {"rows": table.scan().to_arrow().sort_by("source_offset"), "snapshot": table.metadata.current_snapshot_id}


def test_cancelled_runs_of_spark_and_dbt_leave_no_process_no_lock_and_the_table_as_it_was(cockpit: Cockpit) -> None:
    before = content(cockpit.settings)
    runs = {job: cockpit.launch(job) for job in ("maintain", "marts")}
    # dbt is a child of the step's process, and Spark's Java its grandchild.
    seen = cockpit.cancel_at(runs["maintain"], lambda process: is_java(process) and not is_below_dbt(process))
    seen |= cockpit.cancel_at(runs["marts"], lambda process: is_java(process) and is_below_dbt(process))
    assert {job: cockpit.end_of(run_id) for job, run_id in runs.items()} == dict.fromkeys(runs, CANCELED)
    _, alive = psutil.wait_procs(seen, timeout=60)
    assert not alive, [each.cmdline() for each in alive]
    wait_until(lambda: not processes(), what="no process is left that came after the cancel")
    assert content(cockpit.settings) == before
    with FileLock(work_dir(cockpit.settings) / "run.lock", timeout=0):
        pass
    contracts = load_contracts(cockpit.settings.contracts_dir)
    with dg.DagsterInstance.ephemeral() as instance:
        again = Jobs(with_platform(maintenance.definitions(contracts), cockpit.settings, contracts), instance)
        assert again.run("maintain", {"compact": False, "retained_snapshots": 1}).success
    assert content(cockpit.settings) == before
    assert len(table_of(cockpit.settings, "bars").snapshots()) == 1
