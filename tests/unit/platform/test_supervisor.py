"""What is written for the supervisor library and read from its log."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

import pytest

from streamforge.platform.control_plane import with_dagster
from streamforge.platform.plan import PlatformFiles, consumer_kinds, make_plan
from streamforge.platform.supervisor import History, log_file, read_history, render_config, socket_path
from streamforge.settings import Settings


def _settings(home: Path, **overrides: object) -> Settings:
    return Settings(_env_file=None, home=home, **overrides)  # type: ignore[arg-type]


def test_config_ends_feeders_before_readers_and_the_broker_last(tmp_path: Path) -> None:
    home = tmp_path / "100% home"
    plan = make_plan(_settings(home), broker=True, simulator=True)
    config = configparser.RawConfigParser()
    config.read_string(render_config(PlatformFiles(home), plan))
    programs = {name.removeprefix("program:"): config[name] for name in config.sections() if name.startswith("program")}
    # The library ends the highest priority first.
    order = sorted(programs, key=lambda name: -int(programs[name]["priority"]))
    assert order == ["simulator", "loader", *consumer_kinds(), "broker"]
    assert [name for name, program in programs.items() if program["autostart"] == "true"] == ["broker"]
    assert {program["exitcodes"] for program in programs.values()} == {"0,2,3"}
    command = shlex.split(programs["writer"]["command"].replace("%%", "%"))
    assert command[command.index("--state") + 1] == str(home / "supervisor")
    assert command[command.index("run") :][:2] == ["run", "writer"]


def test_plan_without_simulator_reads_the_real_venue(tmp_path: Path) -> None:
    plan = make_plan(_settings(tmp_path), broker=False, simulator=False)
    assert {process.name for process in plan.processes} == {"loader", *consumer_kinds()}
    loader = plan.named("loader")
    assert loader is not None
    assert "--ws-url" not in loader.command


def test_plan_with_recordings_replays_them_under_their_venue(tmp_path: Path) -> None:
    plan = make_plan(_settings(tmp_path, recordings_dir=tmp_path), broker=False, simulator=True)
    simulator, loader = plan.named("simulator"), plan.named("loader")
    assert simulator is not None
    assert loader is not None
    assert simulator.command[simulator.command.index("--source") + 1] == "recordings"
    assert loader.command[loader.command.index("--venue") + 1] == "BINANCE"


def test_ports_are_remembered_unless_the_run_is_dry(tmp_path: Path) -> None:
    dry = make_plan(_settings(tmp_path), broker=False, simulator=True, remember=False)
    assert not PlatformFiles(tmp_path).ports.exists()
    first = make_plan(_settings(tmp_path), broker=False, simulator=True)
    second = make_plan(_settings(tmp_path), broker=False, simulator=True)
    assert [process.ports for process in first.processes] == [process.ports for process in second.processes]
    assert [process.name for process in dry.processes] == [process.name for process in first.processes]


def test_restart_tells_code_servers_and_no_one_else_to_end_their_children(tmp_path: Path) -> None:
    plan = with_dagster(make_plan(_settings(tmp_path), broker=True, simulator=True), remember=False)
    config = configparser.RawConfigParser()
    config.read_string(render_config(PlatformFiles(tmp_path), plan))
    by_name = {name.removeprefix("program:"): config[name] for name in config.sections() if name.startswith("program")}
    in_group = {name for name, program in by_name.items() if program["stopasgroup"] == "true"}
    assert in_group == {name for name in by_name if name.startswith("dagster-")}
    assert min(int(by_name[name]["priority"]) for name in in_group) > int(by_name["simulator"]["priority"])


def test_socket_path_of_a_deep_home_is_short(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    assert len(str(socket_path(PlatformFiles(deep)))) <= 90
    assert socket_path(PlatformFiles(deep)) != socket_path(PlatformFiles(tmp_path / ("e" * 90)))
    assert socket_path(PlatformFiles(Path("/h"))) == Path("/h/supervisor/socket")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([], History(0, None)),
        (["exit status 1; not expected"], History(1, "exit code 1")),
        (["exit status 3; expected", "terminated by SIGKILL; not expected"], History(2, "SIGKILL")),
    ],
)
def test_history_counts_restarts_and_keeps_the_last_end(tmp_path: Path, ends: list[str], expected: History) -> None:
    lines = ["2026-01-01 00:00:00,000 INFO spawned: 'writer' with pid 10"]
    for end in ends:
        lines.append(f"2026-01-01 00:00:01,000 WARN exited: writer ({end})")
        lines.append("2026-01-01 00:00:02,000 INFO spawned: 'writer' with pid 11")
    path = log_file(PlatformFiles(tmp_path))
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_history(PlatformFiles(tmp_path)) == {"writer": expected}
