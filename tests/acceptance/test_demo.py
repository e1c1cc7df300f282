"""`streamforge demo` as a person runs it: the report, a loss that it must see, and no process left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyiceberg.table import Table

from streamforge.contracts import load_contracts
from streamforge.demo.home import HOME_NAME, REPORT_FILE
from streamforge.gnn.libraries import missing_libraries
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.settings import Settings
from tests.recordings import RECORDINGS_DIR, needs_recordings
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

EVENTS = 5_000
SMALL = ("--events", str(EVENTS), "--rate", "100", "--start-minutes-ago", "1.5", "--output", "json")
PHASE_TIMEOUT_S = 400.0
END_TIMEOUT_S = 300.0


@contextmanager
def demo(home: Path, *options: str, kill_at: str = "", dagster: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Start a small demo below `home`, in a process group of its own as a shell does; kill it if it still runs.

    Dagster takes half of its time.
    """
    command = [sys.executable, "-m", "cli", "demo", *SMALL, *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFORGE_")}
    environment |= {"STREAMFORGE_HOME": str(home), "STREAMFORGE_KILL_AT": kill_at, "STREAMFORGE_DAGSTER": str(dagster)}
    with (home / "out").open("w") as out, (home / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def errors(home: Path) -> str:
    return (home / "err").read_text()


def wait_for_phase(home: Path, process: subprocess.Popen[str], phase: str) -> None:
    def begun() -> bool:
        assert process.poll() is None, f"the demo ended before {phase}: {errors(home)}"
        return re.search(rf"^{phase}: ", errors(home), re.MULTILINE) is not None

    wait_until(begun, timeout_s=PHASE_TIMEOUT_S, what=f"phase {phase} begins")


def result(home: Path, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the end and return what was printed."""
    process.wait(timeout=END_TIMEOUT_S + PHASE_TIMEOUT_S)
    text = (home / "out").read_text()
    assert text, errors(home)
    found: dict[str, Any] = json.loads(text)
    return found


def left_over(home: Path) -> list[str]:
    """Return the processes that belong to the demo below `home`: by their environment or command line."""
    mark, found = str(home / HOME_NAME), []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get("STREAMFORGE_HOME") == mark or any(
                mark in part for part in process.cmdline()
            )
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
        except psutil.Error:
            continue
    return found


def test_demo_loses_nothing_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    with demo(tmp_path, dagster=True) as process:
        found = result(tmp_path, process)
    assert process.returncode == 0, errors(tmp_path)
    assert found == json.loads((tmp_path / REPORT_FILE).read_text())
    assert (found["ok"], found["lost"], found["doubled"], found["problems"]) == (True, 0, 0, [])
    assert found["events_produced"] >= EVENTS
    tables = found["tables"]
    assert tables["market.raw_trades"]["rows"] + tables["market.raw_depth"]["rows"] == found["events_produced"]
    assert tables["market.trades"]["rows"] == tables["market.raw_trades"]["rows"]
    assert tables["market.bars"]["rows"] > 0
    assert found["rows_landed"] == sum(item["rows"] for item in tables.values())
    assert found["ledger"]["sent"] == found["ledger"]["in_raw"] > 0
    assert found["replay"]["changed_nothing"]
    assert found["replay"]["rows"] > 0
    runs = {item["job"]: item for item in found["dagster"]}
    assert {item["status"] for item in runs.values()} == {"SUCCESS"}
    assert set(runs) == {"replay", "observe", "observe_consumers", "check_consumers", "quality", "bars_backfill"}
    assert runs["observe"]["assets"] >= len(tables)
    assert runs["quality"]["checks_passed"] > 0
    assert 0 < found["freshness_p50_s"] <= found["freshness_p99_s"]
    assert found["events_per_s"] > 0
    assert found["wall_s"] > found["live_s"] > 0
    assert not left_over(tmp_path)


def test_demo_with_rows_removed_behind_its_back_reports_them_lost(tmp_path: Path) -> None:
    with demo(tmp_path, kill_at="demo.verify!stop") as process:
        # It stands still before it compares, until the rows are gone.
        wait_for_phase(tmp_path, process, "verify")
        stopped = psutil.Process(process.pid)
        wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED, what="the demo stands still")
        gone = remove_a_data_file(tmp_path / HOME_NAME, "trades")
        process.send_signal(signal.SIGCONT)
        found = result(tmp_path, process)
    assert process.returncode == 1
    assert not found["ok"]
    assert found["lost"] == gone > 0
    assert any(f"{gone} rows are lost" in problem for problem in found["problems"])
    assert not left_over(tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("start", signal.SIGINT),
        ("market", signal.SIGKILL),
        ("landing", signal.SIGTERM),
    ],
)
def test_demo_stopped_in_a_phase_leaves_no_process(tmp_path: Path, phase: str, number: signal.Signals) -> None:
    with demo(tmp_path, dagster=phase == "market") as process:
        wait_for_phase(tmp_path, process, phase)
        if phase == "start":
            wait_until(lambda: left_over(tmp_path), timeout_s=PHASE_TIMEOUT_S, what="something was started")
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does at Ctrl-C
        else:
            process.send_signal(number)
        process.wait(timeout=END_TIMEOUT_S)
        assert process.returncode == (-signal.SIGKILL if number is signal.SIGKILL else 130), errors(tmp_path)
    wait_until(lambda: not left_over(tmp_path), timeout_s=END_TIMEOUT_S, what="every process of the demo is gone")


@pytest.mark.minutes
@pytest.mark.timeout(1800)
def test_demo_with_models_trains_one_through_dagster_and_makes_the_marts(tmp_path: Path) -> None:
    missing = missing_libraries()
    if missing:
        pytest.skip(f"the dependency group ml is not installed: {', '.join(missing)}")
    with demo(tmp_path, "--models", dagster=True) as process:
        found = result(tmp_path, process)
    assert process.returncode == 0, errors(tmp_path)
    assert (found["ok"], found["lost"], found["doubled"], found["problems"]) == (True, 0, 0, [])
    assert {item["status"] for item in found["dagster"]} == {"SUCCESS"}
    assert "marts" in {item["job"] for item in found["dagster"]}
    model = found["models"]
    assert model["history_rows"] > 0
    assert len(model["rmse"]) > 1, "the model is compared with others"
    # Forecasts are made by a champion only, and who wins on a simulated market is not for a test to say.
    assert (model["forecasts"] > 0) is model["is_champion"]
    assert not left_over(tmp_path)


@needs_recordings
@pytest.mark.minutes
@pytest.mark.timeout(1800)
def test_demo_with_recordings_loses_none_of_their_messages(tmp_path: Path) -> None:
    with demo(tmp_path, "--recordings", str(RECORDINGS_DIR)) as process:
        found = result(tmp_path, process)
    assert process.returncode == 0, errors(tmp_path)
    assert (found["ok"], found["lost"], found["doubled"], found["problems"]) == (True, 0, 0, [])
    trades = table_of(tmp_path / HOME_NAME, "trades").scan(selected_fields=("instrument",)).to_arrow()
    venues = {str(name).rpartition(".")[2] for name in trades["instrument"].unique().to_pylist()}
    assert venues == {"SIM", "BINANCE"}
    assert trades.num_rows == found["tables"]["market.trades"]["rows"]
    assert not left_over(tmp_path)


def test_demo_refuses_a_folder_that_no_demo_has_made(tmp_path: Path) -> None:
    treasure = tmp_path / HOME_NAME / "treasure"
    treasure.parent.mkdir()
    treasure.write_text("mine")
    with demo(tmp_path) as process:
        found = result(tmp_path, process)
    assert process.returncode == 2
    assert found["error"] == "ConfigurationError"
    assert treasure.read_text() == "mine"


def remove_a_data_file(home: Path, contract_id: str) -> int:
    """Take one data file out of a table, as a careless person would; return the rows that went with it."""
    table = table_of(home, contract_id)
    file = next(iter(table.scan().plan_files())).file
    commit.commit_snapshot(table, decide=lambda _: {}, removed=[file], summary={commit.KIND_KEY: "test"})
    return int(file.record_count)


def table_of(home: Path, contract_id: str) -> Table:
    """Return a table of the demo's home, whether it runs or not."""
    settings = Settings(_env_file=None, home=home)  # type: ignore[call-arg]
    return load_table(open_catalog(settings), settings, load_contracts(settings.contracts_dir)[contract_id])
