"""The platform as a newcomer uses it, with the real processes: up, killed, steered from Dagster, down.

One test, because a platform takes half a minute to start. In order: `up --detach`; a writer that is killed comes back;
runs launched, cancelled and backfilled as Dagster's pages do; Dagster killed in the middle of a replay; everything
that was sent is landed once; `down` leaves nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from streamforge.contracts import load_contracts
from streamforge.demo.session import Session
from streamforge.lakehouse.line import Line
from streamforge.lakehouse.verify import verify_tables
from streamforge.platform.plan import PlatformFiles, consumer_kinds, read_plan
from streamforge.platform.report import report
from streamforge.settings import Settings
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

_WITHIN_S = 300.0
_REPOSITORY = {"repositoryLocationName": "lakehouse", "repositoryName": "__repository__"}
_ENDED = {"SUCCESS", "FAILURE", "CANCELED"}
_BUSY = ("REQUESTED", "COMPLETING")
_LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } } } }"""
_STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
_TERMINATE = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"
_BACKFILL = """mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
_BACKFILL_STATUS = """query($id: String!) { partitionBackfillOrError(backfillId: $id) {
  ... on PartitionBackfill { status } } }"""
_SENSOR_TICKS = """query($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) {
  ... on Sensor { sensorState { status ticks(limit: 50) { status skipReason error { message } } } } } }"""
_START_SCHEDULE = """mutation($selector: ScheduleSelector!) { startSchedule(scheduleSelector: $selector) {
  ... on ScheduleStateResult { scheduleState { id status nextTick { timestamp } } }
  ... on PythonError { message } } }"""
_STOP_SCHEDULE = """mutation($id: String!) { stopRunningSchedule(id: $id) {
  ... on ScheduleStateResult { scheduleState { status } } ... on PythonError { message } } }"""
_DAEMONS = """{ instance { daemonHealth { allDaemonStatuses {
  daemonType required healthy lastHeartbeatErrors { message } } } } }"""
_LOCATIONS = """{ workspaceOrError { ... on Workspace { locationEntries { name
  locationOrLoadError { __typename } } } } }"""


@dataclass(frozen=True)
class Platform:
    """A detached platform and Dagster's interface, as the UI's pages use it."""

    home: Path

    @property
    def settings(self) -> Settings:
        """Return the platform's settings."""
        return Settings(_env_file=None, home=self.home)  # type: ignore[call-arg]

    def call(self, *arguments: str) -> dict[str, Any]:
        """Call `streamforge` and return its JSON; `status` may say by its exit code that something is not well."""
        command = [sys.executable, "-m", "cli", *arguments, "--output", "json"]
        environment = os.environ | {"STREAMFORGE_HOME": str(self.home)}
        done = subprocess.run(
            command, env=environment, cwd=self.home.parent, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or arguments == ("status",), f"{done.stdout}\n{done.stderr}"
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def processes(self) -> dict[str, dict[str, Any]]:
        """Return what `streamforge status` says of the processes, by name, without a process for each look."""
        return {process["name"]: process for process in report(self.settings).processes_as_dicts()}

    def ask(self, query: str, **variables: Any) -> Any:
        """Ask Dagster and return the only answer."""
        url = read_plan(PlatformFiles(self.home)).ui_url  # type: ignore[union-attr]
        reply = httpx.post(f"{url}/graphql", json={"query": query, "variables": variables}, timeout=60.0)
        data = reply.raise_for_status().json()
        assert "errors" not in data, data
        [answer] = data["data"].values()
        return answer

    def is_answered(self) -> bool:
        """Return whether Dagster's webserver answers."""
        url = read_plan(PlatformFiles(self.home)).ui_url  # type: ignore[union-attr]
        try:
            return httpx.get(f"{url}/server_info", timeout=60.0).is_success
        except httpx.TransportError:
            return False

    def launch(self, job: str, op: str, config: Mapping[str, Any]) -> str:
        """Launch a run as the launchpad does and return its id."""
        params = {
            "selector": _REPOSITORY | {"jobName": job},
            "runConfigData": {"ops": {op: {"config": dict(config)}}},
            "mode": "default",
        }
        answer = self.ask(_LAUNCH, params=params)
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def status(self, run_id: str) -> str:
        """Return the status of a run."""
        return str(self.ask(_STATUS, id=run_id)["status"])

    def end_of(self, run_id: str) -> str:
        """Wait for the end of a run and return its status."""
        return wait_until(
            lambda: status if (status := self.status(run_id)) in _ENDED else None,
            timeout_s=_WITHIN_S,
            what=f"run {run_id} ends",
        )

    def run(self, job: str, op: str, config: Mapping[str, Any]) -> str:
        """Launch a run and return how it ended."""
        return self.end_of(self.launch(job, op, config))


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    found = Platform(tmp_path / "home")
    yield found
    found.call("down")


def test_platform_is_started_killed_steered_and_stopped_and_loses_nothing(platform: Platform) -> None:
    up = platform.call("up", "--detach")
    assert up["ui_url"], up
    names = {process["name"] for process in up["processes"]}
    dagster = {name for name in names if name.startswith("dagster-")}
    assert dagster == {"dagster-lakehouse", "dagster-ml", "dagster-webserver", "dagster-daemon"}
    assert names - dagster == {"broker", "simulator", "loader", *consumer_kinds()}
    _killed_writer_comes_back(platform)
    _launchpad_control_backfill_and_cancel_work(platform)
    _daemon_evaluates_sensors_and_schedules(platform)
    _killing_dagster_in_the_middle_of_a_replay_changes_nothing(platform)
    _down_leaves_nothing(platform)


def _killed_writer_comes_back(platform: Platform) -> None:
    def landed() -> dict[str, Any] | None:
        writer = platform.processes()["writer"]
        is_landed = any(topic.startswith("trades-") and offset > 0 for topic, offset in writer["positions"].items())
        return writer if is_landed else None

    writer = wait_until(landed, timeout_s=_WITHIN_S, what="trades are in the table")
    os.kill(writer["pid"], signal.SIGKILL)

    def is_back() -> dict[str, Any] | None:
        found = platform.processes()["writer"]
        return found if found["restarts"] == 1 and found["state"] == "RUNNING" else None

    assert wait_until(is_back, timeout_s=_WITHIN_S, what="the writer was restarted")["last_end"] == "SIGKILL"
    assert platform.call("status")["is_well"]


def _down_leaves_nothing(platform: Platform) -> None:
    status = platform.call("status")
    running = {process["name"]: process["pid"] for process in status["processes"] if process["pid"]}
    stopped = platform.call("down")["stopped"]
    assert set(stopped) == running.keys()
    assert {"broker", "writer", "dagster-daemon"} <= running.keys()
    pids = [status["supervisor_pid"], *running.values()]
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert platform.call("broker", "status")["state"] == "stopped"


def _launchpad_control_backfill_and_cancel_work(platform: Platform) -> None:
    locations = platform.ask(_LOCATIONS)["locationEntries"]
    loaded = {entry["name"]: entry["locationOrLoadError"]["__typename"] for entry in locations}
    assert loaded == dict.fromkeys(("lakehouse", "ml"), "RepositoryLocation")
    assert platform.run("replay", "replay_ranges", {}) == "SUCCESS"
    assert platform.run("pause", "tell_to_pause", {"target": "parser", "wait_s": 60.0}) == "SUCCESS"
    assert platform.processes()["parser"]["own_state"] == "paused"

    # The parser stands still while raw trades come in: this replay waits for it until somebody cancels it.
    waiting = platform.launch(
        "replay", "replay_ranges", {"everything": True, "dry_run": False, "wait_s": _WITHIN_S, "time": "produce"}
    )
    wait_until(lambda: platform.status(waiting) == "STARTED", timeout_s=_WITHIN_S, what="the replay has started")
    platform.ask(_TERMINATE, id=waiting)
    assert platform.end_of(waiting) == "CANCELED"
    assert platform.run("resume", "tell_to_resume", {"target": "parser", "wait_s": 60.0}) == "SUCCESS"

    hours = [(datetime.now(UTC) - timedelta(hours=ago)).strftime("%Y-%m-%d-%H:00") for ago in (1, 0)]
    selector = {"partitionSetName": "replay_hours_partition_set", "repositorySelector": _REPOSITORY}
    backfill = platform.ask(_BACKFILL, params={"selector": selector, "partitionNames": hours})
    assert backfill["__typename"] == "LaunchBackfillSuccess", backfill
    ended = wait_until(
        lambda: (
            status
            if (status := platform.ask(_BACKFILL_STATUS, id=backfill["backfillId"])["status"]) not in _BUSY
            else None
        ),
        timeout_s=_WITHIN_S,
        what="the backfill ends",
    )
    assert ended == "COMPLETED_SUCCESS"


def _daemon_evaluates_sensors_and_schedules(platform: Platform) -> None:
    sensor = _REPOSITORY | {"sensorName": "stuck_consumers"}

    def looked() -> list[dict[str, Any]]:
        state = platform.ask(_SENSOR_TICKS, selector=sensor)["sensorState"]
        assert state["status"] == "RUNNING", "it is on without anybody having switched it on"
        assert not [tick for tick in state["ticks"] if tick["error"] or tick["status"] == "FAILURE"], state
        return [tick for tick in state["ticks"] if "kinds of consumers speak" in (tick["skipReason"] or "")]

    wait_until(looked, timeout_s=_WITHIN_S, what="the daemon has looked at the consumers")
    # What ticks start is tested with a clock, in tests/integration/test_dagster_scheduler.py: here an hour is too long.
    schedule = _REPOSITORY | {"scheduleName": "marts_schedule"}
    on = platform.ask(_START_SCHEDULE, selector=schedule)["scheduleState"]
    assert on["status"] == "RUNNING"
    assert on["nextTick"]["timestamp"] > datetime.now(UTC).timestamp()
    assert platform.ask(_STOP_SCHEDULE, id=on["id"])["scheduleState"]["status"] == "STOPPED"
    daemons = platform.ask(_DAEMONS)["daemonHealth"]["allDaemonStatuses"]
    required = {each["daemonType"]: each["healthy"] for each in daemons if each["required"]}
    assert {"SENSOR", "SCHEDULER", "BACKFILL", "QUEUED_RUN_COORDINATOR"} <= required.keys()
    assert all(required.values()), daemons


def _killing_dagster_in_the_middle_of_a_replay_changes_nothing(platform: Platform) -> None:
    before = platform.processes()
    # It waits for the parser, which stands still, when it is killed.
    assert platform.run("pause", "tell_to_pause", {"target": "parser", "wait_s": 60.0}) == "SUCCESS"
    running = platform.launch("replay", "replay_ranges", {"everything": True, "dry_run": False, "wait_s": _WITHIN_S})
    wait_until(lambda: platform.status(running) == "STARTED", timeout_s=_WITHIN_S, what="the replay has started")
    dagster = {name: item["pid"] for name, item in before.items() if name.startswith("dagster-")}
    runs = psutil.Process(dagster["dagster-lakehouse"]).children(recursive=True)
    assert runs, "the run is not a child of its code server"
    for pid in [*dagster.values(), *(each.pid for each in runs)]:
        psutil.Process(pid).kill()

    def is_back() -> dict[str, dict[str, Any]] | None:
        found = platform.processes()
        restarted = all(found[name]["pid"] not in (None, pid) for name, pid in dagster.items())
        return found if restarted else None

    after = wait_until(is_back, timeout_s=_WITHIN_S, what="Dagster's processes are started again")
    wait_until(platform.is_answered, timeout_s=_WITHIN_S, what="the UI answers again")
    line = {name for name in before if not name.startswith("dagster-")}
    assert {name: (after[name]["pid"], after[name]["restarts"]) for name in line} == {
        name: (before[name]["pid"], before[name]["restarts"]) for name in line
    }
    landed = sum(before["writer"]["positions"].values())
    wait_until(
        lambda: sum(platform.processes()["writer"]["positions"].values()) > landed,
        timeout_s=_WITHIN_S,
        what="the writer lands on",
    )
    assert platform.status(running) != "SUCCESS"
    assert platform.run("resume", "tell_to_resume", {"target": "parser", "wait_s": 60.0}) == "SUCCESS"
    _everything_that_was_sent_is_landed_once(platform.settings)
    assert platform.end_of(platform.launch("replay", "replay_ranges", {})) == "SUCCESS"


def _everything_that_was_sent_is_landed_once(settings: Settings) -> None:
    contracts = load_contracts(settings.contracts_dir)
    files = PlatformFiles(settings.home_path)
    plan = read_plan(files)
    assert plan is not None
    sent = Session(settings, contracts, plan).land(Line(settings, contracts), files.ledger)
    assert sent.messages > 0
    for each in verify_tables(settings, contracts):
        assert (each.tally.lost, each.tally.doubled, each.tally.different) == (0, 0, 0), each
