"""`streamforge topics` against a real broker: plan, create, describe, refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner

from cli.app import app
from streamforge.kafka import describe_topics
from streamforge.platform.plan import environment_of
from streamforge.settings import Settings
from tests.kafka_records import create_topic

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("restored_logging")]


@pytest.fixture(autouse=True)
def _environment(platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contracts = tmp_path / "contracts"
    contracts.mkdir()
    shutil.copy(platform.contracts_dir / "queue-control.yaml", contracts)
    monkeypatch.chdir(tmp_path)
    for name, value in environment_of(platform.model_copy(update={"contracts_dir": contracts})).items():
        monkeypatch.setenv(name, value)


def _call(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["topics", *arguments, "--output", "json"])
    return result.exit_code, json.loads(result.stdout)


def test_create_creates_what_the_dry_run_said_and_then_nothing(platform: Settings, admin: AdminClient) -> None:
    name = f"{platform.topic_prefix}queue-control"
    code, planned = _call("create", "--dry-run")
    assert (code, planned["topics"][0]["action"], planned["topics"][0]["topic"]) == (0, "create", name)
    assert describe_topics(admin, [name]) == {}
    code, done = _call("create")
    assert (code, done) == (0, planned)
    assert name in describe_topics(admin, [name])
    assert _call("create")[1]["topics"][0]["action"] == "keep"
    assert _call("list")[1]["topics"][0]["action"] == "keep"
    code, described = _call("describe", "queue-control")
    assert (code, described["topic"], described["live"]["action"]) == (0, name, "keep")


def test_create_of_a_topic_that_contradicts_its_contract_exits_1(platform: Settings, admin: AdminClient) -> None:
    name = f"{platform.topic_prefix}queue-control"
    create_topic(admin, name, 3)
    code, result = _call("create")
    assert code == 1
    assert result["error"] == "SchemaMismatchError"
    assert "3 partitions" in result["message"]
