"""The code location `ml` loads quickly and without the libraries that models need, also where they are missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

from assets.catalogue import table_key
from assets.models import ASSETS
from orchestration import ml
from streamforge.contracts import load_contracts
from streamforge.gnn.history import BarsSource
from streamforge.gnn.libraries import MODEL_LIBRARIES
from streamforge.platform.control_plane import prepare_instance

ROOT = Path(__file__).parents[2]
HEAVY = (*MODEL_LIBRARIES, "sklearn", "pyspark", "dbt")
MAX_CPU_S = 5.0


def _load(module: str, *, before: str = "") -> str:
    code = (
        f"import sys, time\n{before}\nimport {module}\n{module}.defs.get_repository_def()\n"
        f"print(sorted(set({HEAVY!r}) & {{name for name, found in sys.modules.items() if found}}))\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_location_loads_without_heavy_libraries_in_seconds() -> None:
    heavy, cpu_s = _load("orchestration.ml").splitlines()
    assert heavy == "[]"
    # CPU time, because others may use the machine meanwhile.
    assert float(cpu_s) < MAX_CPU_S


@pytest.mark.parametrize("module", ["orchestration.ml", "orchestration.lakehouse"])
def test_locations_load_where_the_libraries_are_not_installed(module: str) -> None:
    absent = f"for name in {MODEL_LIBRARIES!r}: sys.modules[name] = None"
    assert _load(module, before=absent).startswith("[]")


def test_lakehouse_loads_although_the_modules_of_ml_are_broken() -> None:
    broken = "for name in ('orchestration.ml', 'assets.models'): sys.modules[name] = None"
    assert _load("orchestration.lakehouse", before=broken).startswith("[]")


def test_model_libraries_are_imported_below_gnn_only_and_only_when_they_are_used() -> None:
    for room in ("streamforge", "streaming", "assets", "orchestration", "cli"):
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            when_loaded = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            anywhere = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
            is_gnn = path.is_relative_to(ROOT / "streamforge" / "gnn")
            assert not _heavy(when_loaded if is_gnn else anywhere), path


def _heavy(nodes: list[ast.Import | ast.ImportFrom]) -> set[str]:
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names} & set(MODEL_LIBRARIES)


def test_features_depend_on_both_tables_of_bars() -> None:
    contracts = load_contracts(ROOT / "contracts")
    wanted = {table_key(contracts[item.value]) for item in (BarsSource.BARS, BarsSource.VENUE_BARS)}
    [features] = [item for item in ASSETS if item.key.path == ["features"]]
    assert set(features.asset_deps[features.key]) == wanted


@pytest.mark.parametrize("place", ["laptop", "cluster"])
def test_two_retrainings_run_one_after_the_other_however_they_are_launched(place: str, tmp_path: Path) -> None:
    cluster = ROOT / "deploy" / "kubernetes" / "dagster" / "dagster.yaml"
    file = cluster if place == "cluster" else prepare_instance(tmp_path) / "dagster.yaml"
    concurrency = yaml.safe_load(file.read_text(encoding="utf-8"))["concurrency"]
    by_job, by_hand = ml.defs.resolve_job_def("retrain"), ml.defs.resolve_implicit_global_asset_job_def()
    with dg.instance_for_test(overrides={"concurrency": concurrency}) as instance:
        queue = QueuedRunCoordinatorDaemon(interval_seconds=1)

        def next_runs() -> list[str]:
            found = queue._get_runs_to_dequeue(instance, instance.get_concurrency_config(), fixed_iteration_time=None)
            return [run.run_id for run in found]

        def launched(job: dg.JobDefinition) -> dg.DagsterRun:
            origin = RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("ml"), "ml"), job.name)
            return instance.create_run_for_job(job, status=dg.DagsterRunStatus.QUEUED, remote_job_origin=origin)

        first = launched(by_job)
        assert next_runs() == [first.run_id]
        starting = dg.DagsterEvent(dg.DagsterEventType.PIPELINE_STARTING.value, job_name=first.job_name)
        instance.report_dagster_event(starting, first.run_id)
        second, third = launched(by_hand), launched(by_job)
        assert next_runs() == []
        instance.report_run_failed(first)
        # Of the two that wait, one.
        assert next_runs() == [second.run_id]
        assert third.run_op_concurrency == second.run_op_concurrency
