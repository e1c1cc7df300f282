"""Logs: JSON lines on standard error and in a file, level as set, and no secret in either."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from streamforge.logs import configure
from streamforge.settings import Settings

pytestmark = pytest.mark.usefixtures("restored_logging")


def _settings(**overrides: Any) -> Settings:
    return Settings(_env_file=None, **overrides)


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_line_on_stderr_has_utc_time_level_logger_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure(_settings())
    structlog.get_logger("streamforge.test").info("landed", rows=3)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = _lines(captured.err)
    assert line | {"timestamp": ""} == {
        "event": "landed", "rows": 3, "level": "info", "logger": "streamforge.test", "timestamp": "",
    }  # fmt: skip
    assert line["timestamp"].endswith("Z")


def test_file_gets_json_of_both_kinds_of_loggers_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "logs" / "writer.jsonl"
    for _ in range(2):
        configure(_settings(log_file=path))
    structlog.get_logger("ours").warning("ours")
    logging.getLogger("library").warning("theirs %s", 1)
    assert [line["event"] for line in _lines(path.read_text(encoding="utf-8"))] == ["ours", "theirs 1"]


def test_level_below_setting_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure(_settings(log_level="warning"))
    structlog.get_logger("ours").info("quiet")
    logging.getLogger("library").info("quiet")
    assert capsys.readouterr().err == ""


def test_terminal_gets_text_and_not_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    configure(_settings())
    structlog.get_logger("ours").info("landed", rows=3)
    text = capsys.readouterr().err
    assert "landed" in text
    assert not text.startswith("{")


@pytest.mark.parametrize(
    "fields",
    [
        {"sasl_password": "hunter2"},
        {"anything": SecretStr("hunter2")},
        {"catalog_uri": "postgresql://me:hunter2@db/catalog"},
        {"config": {"s3.secret-access-key": "hunter2", "list": ["http://me:hunter2@host"]}},
        {"api_key": "hunter2", "headers": {"Authorization": "Bearer hunter2"}},
    ],
)
def test_secret_is_never_logged(fields: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    configure(_settings())
    structlog.get_logger("ours").info("connecting", **fields)
    text = capsys.readouterr().err
    assert "***" in text
    assert "hunter2" not in text


def test_secret_in_traceback_of_a_library_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    configure(_settings())
    url = "http://me:hunter2@host"
    try:
        int(url)
    except ValueError:
        logging.getLogger("library").exception("failed")
        structlog.get_logger("ours").exception("failed")
    text = capsys.readouterr().err
    assert text.count("://***@host") == 2
    assert "hunter2" not in text
