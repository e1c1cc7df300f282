"""The command line itself: every command loads and teaches, bad input ends in a sentence and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.testing import CliRunner, Result

from cli.app import COMMANDS, app
from cli.lazy import LazyCommand
from streamforge import __version__
from streamforge.platform.plan import consumer_kinds
from streamforge.processes import choose_free_port

pytestmark = pytest.mark.usefixtures("restored_logging")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMFORGE_HOME", str(tmp_path / "home"))


def _call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_version_is_printed() -> None:
    result = _call("--version")
    assert (result.exit_code, result.stdout) == (0, f"streamforge {__version__}\n")


def test_help_lists_every_command_without_loading_any() -> None:
    code = (
        "import sys; from cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'pyarrow', 'confluent_kafka', 'pyiceberg', 'jgo'} & sys.modules.keys()), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "[]\n"
    assert all(str(command.name) in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_every_command_loads_and_has_help(command: object) -> None:
    result = _call(str(getattr(command, "name", "")), "--help")
    assert result.exit_code == 0, result.output
    assert "Usage" in result.stdout


READ_ONLY = {
    "status", "doctor", "broker status", "topics list", "topics describe", "contracts lint", "contracts diff",
    "contracts show", "verify", "sql", "trace",
    "dlq list", "dlq show",
}  # fmt: skip
OTHERS_OUTPUT = {"broker run", "dbt"}
"""Kafka's own and dbt's: the process becomes the other program, or its arguments are passed on."""


def _leaves(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return each command that does something, by its words on the command line."""
    loaded = command.load() if isinstance(command, LazyCommand) else command
    if isinstance(loaded, TyperGroup):
        for name, child in loaded.commands.items():
            yield from _leaves(child, f"{path} {name}".strip())
        if not loaded.invoke_without_command:
            return
    yield path, loaded


@cache
def _every_leaf() -> dict[str, Any]:
    return {name: leaf for command in COMMANDS for name, leaf in _leaves(command, str(command.name))}


def test_every_command_has_output_and_whatever_writes_a_dry_run() -> None:
    found = {
        name: {option for parameter in leaf.params for option in parameter.opts} for name, leaf in _every_leaf().items()
    }
    assert found.keys() >= READ_ONLY | OTHERS_OUTPUT
    assert [name for name, options in found.items() if "--output" not in options] == sorted(OTHERS_OUTPUT)
    without = {name for name, options in found.items() if "--dry-run" not in options}
    assert without == READ_ONLY | OTHERS_OUTPUT


def test_every_command_shows_an_example_of_itself_in_its_help() -> None:
    without = {name for name, leaf in _every_leaf().items() if not _has_example(name, leaf)}
    assert not without


def _has_example(name: str, leaf: Any) -> bool:
    _, found, example = (leaf.help or "").partition("Example")
    return bool(found) and f"streamforge {name}" in " ".join(example.split())


@pytest.mark.parametrize(
    ("arguments", "would"),
    [(["broker", "start"], "start"), (["broker", "stop"], "do nothing"), (["down"], [])],
    ids=["start", "stop", "down"],
)
def test_dry_run_says_what_would_be_done_and_changes_nothing(
    tmp_path: Path, arguments: list[str], would: object
) -> None:
    result = _call(*arguments, "--dry-run", "--output", "json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["dry_run"] is True
    assert said["would_stop" if arguments == ["down"] else "would"] == would
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["--no-such-option"],
        ["broker"],
        ["broker", "nope"],
        ["broker", "start", "--timeout-s", "soon"],
        ["broker", "start", "--timeout-s", "0"],
        ["broker", "stop", "--deadline-s", "-1"],
        ["broker", "status", "--output", "xml"],
        ["topics", "describe"],
        ["up", "extra"],
        ["down", "--now"],
        ["status", "--output", "yaml"],
        ["doctor", "everything"],
        ["control", "pause"],
        ["control", "explode", "writer"],
        ["control", "pause", "writer", "-a", "x=1"],
        ["control", "fault", "simulator", "-a", "count"],
        ["run", "parser", "--metrics-port", "-1"],
        ["demo", "--events", "0"],
        ["demo", "--rate", "fast"],
        ["rebind"],
        ["reconcile", "--output", "xml"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_with_a_sentence_and_no_traceback(arguments: list[str]) -> None:
    result = _call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "Usage" in result.output


@pytest.mark.parametrize("arguments", [["topics", "list"], ["topics", "create", "--dry-run"]], ids=" ".join)
def test_no_broker_yet_exits_2_and_says_how_to_start_one(arguments: list[str]) -> None:
    result = _call(*arguments, "--output", "json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "ConfigurationError"
    assert "streamforge broker start" in result.output


def test_unknown_contract_exits_2_and_names_those_there_are() -> None:
    result = _call("topics", "describe", "tradez")
    assert result.exit_code == 2
    assert "tradez" in result.output
    assert "raw-trades" in result.output


def test_wrong_setting_exits_2_and_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFORGE_TOPIC_PREFIX", "no spaces!")
    result = _call("broker", "status")
    assert result.exit_code == 2
    assert "STREAMFORGE_TOPIC_PREFIX" in result.output


@pytest.mark.parametrize("action", ["start", "stop", "run"])
def test_broker_command_with_external_cluster_exits_2_and_does_nothing(
    action: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMFORGE_BOOTSTRAP_SERVERS", "kafka.example:9092")
    result = _call("broker", action)
    assert result.exit_code == 2
    assert "external cluster" in result.output
    assert not (tmp_path / "home" / "broker").exists()


def test_broker_status_before_the_first_start_is_stopped_and_says_what_to_do() -> None:
    result = _call("broker", "status", "--output", "json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["state"], found["address"]) == ("stopped", None)
    assert "broker start" in found["advice"]


def test_status_before_the_first_up_exits_1_and_says_so() -> None:
    result = _call("status", "--output", "json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["is_well"], found["processes"]) == (False, [])
    assert "streamforge up" in found["notes"][0]


def test_down_with_nothing_running_is_harmless() -> None:
    result = _call("down", "--output", "json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"stopped": [], "dry_run": False})


def test_up_dry_run_shows_the_plan_and_changes_nothing(tmp_path: Path) -> None:
    result = _call("up", "--dry-run", "--no-simulator", "--output", "json")
    assert result.exit_code == 0, result.output
    names = [process["name"] for process in json.loads(result.stdout)["processes"]]
    assert [name for name in names if not name.startswith("dagster-")] == [
        "broker",
        *reversed(consumer_kinds()),
        "loader",
    ]
    assert not (tmp_path / "home").exists()


def test_doctor_exits_1_on_a_problem_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFORGE_BOOTSTRAP_SERVERS", f"127.0.0.1:{choose_free_port()}")
    result = _call("doctor", "--output", "json")
    assert result.exit_code == 1
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert {check for check, finding in findings.items() if finding["level"] == "problem"} == {"broker"}
    assert "STREAMFORGE_BOOTSTRAP_SERVERS" in findings["broker"]["advice"]
    assert "refused" in findings["catalog"]["found"]


def test_doctor_reports_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("STREAMFORGE_HOME", str(tmp_path / "file"))
    result = _call("doctor", "--output", "json")
    assert result.exit_code == 1
    problems = {f["check"]: f["advice"] for f in json.loads(result.stdout)["findings"] if f["level"] == "problem"}
    assert "STREAMFORGE_HOME" in problems["home"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nokind"], "nokind"),
        (["run", "parser", "--slot", "a b"], "slot"),
        (["rebind", "nope"], "nope"),
        (["reconcile", "nope"], "nope"),
        (["replay", "nope", "--all"], "nope"),
        (["replay", "trades", "--offsets", "raw-trades-0[5,2)"], "[5,2)"),
        (["replay", "trades", "--from-time", "yesterday", "--to-time", "today"], "yesterday"),
        (["contracts", "apply", "--folder", "nowhere"], "nowhere"),
        (["backfill", "bars", "--from", "soon", "--to", "later"], "soon"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_value_exits_2_and_names_it(arguments: list[str], said: str) -> None:
    result = _call(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("variables", "arguments", "said"),
    [
        ({"SPARK_OPTIONS": "notjson"}, ["broker", "status"], "Lists and mappings are JSON"),
        ({"WRITER_CONTRACTS": "trades,bars"}, ["run", "writer", "--dry-run"], "Lists and mappings are JSON"),
        ({"LOG_FILE": "/proc/nowhere/log"}, ["broker", "status"], "the log file cannot be written"),
        ({"HOME": "/proc/nowhere"}, ["broker", "start"], "Set STREAMFORGE_HOME"),
        ({"SECURITY_PROTOCOL": "SASL_PLAINTEXT", "SASL_MECHANISM": "NOPE"}, ["topics", "list"], "refuses the settings"),
        (
            {"SECURITY_PROTOCOL": "SSL", "SSL_CA_LOCATION": "/nowhere"},
            ["topics", "list"],
            "refuses the settings",
        ),
        ({"CATALOG_URI": "nonsense"}, ["replay", "trades", "--all"], "STREAMFORGE_CATALOG_URI"),
        (
            {},
            ["replay", "trades", "--from-time", "0001-01-01T00:00:00+14:00", "--to-time", "2026-01-01T00:00:00Z"],
            "after 9999",
        ),
        ({}, ["load", "--rest-url", "http://127.0.0.1:99999", "--dry-run"], "a port of 1 to 65535"),
        ({}, ["load", "--rest-url", "http://[bad", "--dry-run"], "--rest-url must be a URL"),
        ({}, ["load", "--dry-run", "history", ".", "--format", "candles_1h"], "put options behind"),
        ({}, ["simulate", "--start-minutes-ago", "inf", "--dry-run"], "525600"),
    ],
)
def test_bad_settings_and_bad_input_exit_2_with_a_sentence_and_no_traceback(
    variables: dict[str, str], arguments: list[str], said: str, tmp_path: Path
) -> None:
    home = {"STREAMFORGE_HOME": str(tmp_path), "STREAMFORGE_BOOTSTRAP_SERVERS": "localhost:1"}
    given = home | {f"STREAMFORGE_{name}": value for name, value in variables.items()}
    if "HOME" in variables:
        del given["STREAMFORGE_BOOTSTRAP_SERVERS"]
    result = CliRunner().invoke(app, arguments, env=given)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert said in " ".join(result.output.split())


def test_an_error_that_nobody_expected_is_a_sentence_and_its_traceback_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        msg = "the disk is full"
        raise OSError(msg)

    monkeypatch.setattr("streamforge.broker.status", fail)
    log = tmp_path / "log"
    variables = {"STREAMFORGE_HOME": str(tmp_path), "STREAMFORGE_LOG_FILE": str(log)}
    result = CliRunner().invoke(app, ["broker", "status", "--output", "json"], env=variables)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "OSError"
    assert "Traceback" in log.read_text()
