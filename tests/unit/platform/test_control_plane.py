"""Dagster's part of a plan: its processes, its instance, and what is said where it cannot run."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
import yaml

from streamforge.errors import ConfigurationError
from streamforge.platform import control_plane
from streamforge.platform.control_plane import (
    DAEMON,
    WEBSERVER,
    code_locations,
    dagster_home,
    prepare_instance,
    with_dagster,
    write_instance,
)
from streamforge.platform.plan import PlatformFiles, PlatformPlan


@pytest.fixture
def plan(tmp_path: Path) -> PlatformPlan:
    return PlatformPlan(home=str(tmp_path), processes=[], notes=[])


def test_plan_has_a_code_server_for_each_location_then_webserver_and_daemon(plan: PlatformPlan) -> None:
    found = with_dagster(plan, remember=True)
    names = [item.name for item in found.processes]
    assert names == [*(item.process_name for item in code_locations()), WEBSERVER, DAEMON]
    assert "lakehouse" in {item.name for item in code_locations()}
    assert {item.name: item.starts_after for item in found.processes if item.starts_after} == {
        name: tuple(names[:-2]) for name in (WEBSERVER, DAEMON)
    }
    ports = [port for item in found.processes for port in item.ports.values()]
    assert len(set(ports)) == len(ports) == len(names) - 1
    assert found.ui_url == f"http://127.0.0.1:{found.processes[-2].ports['ui']}"
    assert with_dagster(plan, remember=True) == found, "the ports are not remembered"


def test_workspace_of_the_instance_names_the_ports_of_the_code_servers(plan: PlatformPlan) -> None:
    found = with_dagster(plan, remember=False)
    write_instance(found)
    written = yaml.safe_load((dagster_home(Path(plan.home)) / "workspace.yaml").read_text())
    servers = {entry["grpc_server"]["location_name"]: entry["grpc_server"]["port"] for entry in written["load_from"]}
    assert servers == {
        item.name: found.named(item.process_name).ports["grpc"]  # type: ignore[union-attr]
        for item in code_locations()
    }


def test_databases_are_made_before_several_processes_open_them(plan: PlatformPlan) -> None:
    # Four processes that make them at once leave them with two versions, which no later start repairs.
    write_instance(with_dagster(plan, remember=False))
    home = dagster_home(Path(plan.home))
    assert sorted(path.name for path in home.rglob("*.db")) == ["index.db", "runs.db", "schedules.db"]


def test_instance_is_bounded_silent_and_kept_when_a_person_edits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = prepare_instance(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert not instance.telemetry_enabled
        assert instance.get_concurrency_config().run_queue_config.max_concurrent_runs == 2  # type: ignore[union-attr]
        assert instance.run_monitoring_enabled
        assert instance.event_log_storage.get_stats_for_run("none") is not None
    assert list(home.rglob("*.db")), "the storage lies elsewhere"
    (home / "dagster.yaml").write_text("telemetry: {enabled: true}\n")
    prepare_instance(tmp_path)
    assert (home / "dagster.yaml").read_text() == "telemetry: {enabled: true}\n"


def test_small_installation_is_said_and_has_no_process_of_dagster(
    plan: PlatformPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_plane, "_PACKAGES", ("dagster", "streamforge_absent"))
    found = with_dagster(plan, remember=True)
    assert found.processes == []
    assert "streamforge_absent missing" in found.notes[0]
    assert "uv sync --group dagster" in found.notes[0]
    write_instance(found)
    assert not dagster_home(Path(plan.home)).exists()
    assert not PlatformFiles(Path(plan.home)).ports.exists()


def test_workspace_of_another_form_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "workspace.yaml"
    path.write_text("load_from: [{python_file: x.py}]")
    with pytest.raises(ConfigurationError, match=r"workspace.yaml must list python_module"):
        code_locations(path)
