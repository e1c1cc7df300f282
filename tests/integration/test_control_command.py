"""`streamforge control` on a real broker: told, obeyed, answered."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import cast

import pytest
from typer.testing import CliRunner

from cli.app import app
from streamforge.events import ProcessState
from streamforge.settings import Settings
from tests.pipeline_support import Pipeline, WorkerThread, make_pipeline, make_worker, wait_for_positions

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("restored_logging")]


@pytest.fixture
def pipeline(broker_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    made = make_pipeline(broker_settings, tmp_path, f"c{uuid.uuid4().hex[:8]}.")
    for name in ("home", "topic_prefix", "bootstrap_servers", "contracts_dir"):
        monkeypatch.setenv(f"STREAMFORGE_{name.upper()}", str(getattr(made.settings, name)))
    return made


def control(*arguments: str, exit_code: int = 0) -> dict[str, object]:
    result = CliRunner().invoke(app, ["control", *arguments, "--output", "json"])
    assert result.exit_code == exit_code, result.output
    answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])  # the worker in this process logs there too
    return answer


def told(*arguments: str) -> dict[str, str]:
    [answer] = cast("list[dict[str, str]]", control(*arguments)["answers"])
    return answer


def test_pause_resume_and_stop_are_obeyed_and_the_answer_is_printed(pipeline: Pipeline) -> None:
    thread = WorkerThread(pipeline, make_worker(pipeline, "parser"))
    wait_for_positions(pipeline, thread, "raw-trades")
    assert control("pause", "parser", "--dry-run")["dry_run"] is True
    assert told("ping", "parser/0")["state"] == ProcessState.RUNNING, "a dry run told somebody"
    paused = told("pause", "parser")
    assert paused["state"] == ProcessState.PAUSED
    assert paused["process_id"].startswith("parser/0")
    assert told("resume", "parser")["state"] == ProcessState.RUNNING
    assert told("stop", paused["process_id"])["state"] == ProcessState.STOPPING
    assert thread.join() == 0


def test_nobody_there_exits_1_and_names_the_next_step(pipeline: Pipeline) -> None:
    answer = control("ping", "nobody", "--wait-s", "0.5", exit_code=1)
    assert answer["error"] == "RetryableSourceError"
    assert "streamforge status" in str(answer["message"])
