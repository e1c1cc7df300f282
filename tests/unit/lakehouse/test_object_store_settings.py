"""An object store and a signed catalog as settings: what is missing is said, and no secret is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter

from streamforge.errors import ConfigurationError, RetryableSourceError
from streamforge.lakehouse import catalog as catalogs
from streamforge.lakehouse.catalog import open_catalog
from streamforge.logs import configure
from streamforge.platform.plan import PlatformFiles, environment_of, make_plan
from streamforge.platform.supervisor import render_config
from streamforge.settings import Settings, build_settings

SECRET = "a-secret-that-nobody-may-see"  # noqa: S105
KEY = {"s3_access_key_id": "key-id-that-nobody-may-see", "s3_secret_access_key": SECRET}


@pytest.fixture(autouse=True)
def _no_credentials_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep what AWS's own search would find out of these tests."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def _settings(home: Path, **values: Any) -> Settings:
    signed = {"catalog_type": "rest", "catalog_uri": "http://127.0.0.1:1", "catalog_signing_name": "s3tables"}
    return build_settings(Settings, _env_file=None, home=home, **(signed | values))


@pytest.mark.parametrize("half", list(KEY))
def test_half_a_key_is_refused_and_both_names_are_said(tmp_path: Path, half: str) -> None:
    settings = _settings(tmp_path, s3_region="us-east-1", **{half: KEY[half]})
    with pytest.raises(ConfigurationError, match="S3_ACCESS_KEY_ID and STREAMFORGE_S3_SECRET_ACCESS_KEY") as error:
        open_catalog(settings)
    assert "nobody-may-see" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"s3_region": "us-east-1"}, "set STREAMFORGE_S3_ACCESS_KEY_ID and STREAMFORGE_S3_SECRET_ACCESS_KEY"),
        (KEY, "set STREAMFORGE_S3_REGION"),
    ],
    ids=["credentials", "region"],
)
def test_signed_catalog_without_what_signs_is_refused_before_any_request(
    tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        open_catalog(_settings(tmp_path, **values))
    assert str(error.value).endswith(says)


def test_signed_requests_have_a_deadline_and_are_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyIceberg's own adapter that signs would try ten times, and wait for ever."""
    sent: list[tuple[Any, Any]] = []

    def send(adapter: HTTPAdapter, request: PreparedRequest, **options: Any) -> Response:
        sent.append((options["timeout"], adapter.max_retries.total))
        msg = "no network in this test"
        raise ConnectionError(msg)

    monkeypatch.setattr(HTTPAdapter, "send", send)
    with pytest.raises(ConfigurationError, match="no network"):
        open_catalog(_settings(tmp_path, s3_region="us-east-1", **KEY))
    [(timeout, retries)] = sent
    assert timeout == (catalogs.CONNECT_TIMEOUT_S, catalogs.REQUEST_TIMEOUT_S)
    assert retries == 0


@pytest.mark.usefixtures("restored_logging")
def test_keys_are_shown_nowhere_and_reach_children_by_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Kubernetes' client, where another test has used it, silences what is looked for here.
    caplog.set_level("DEBUG", logger="urllib3")
    token = "token-that-nobody-may-see"  # noqa: S105
    settings = _settings(tmp_path, s3_region="us-east-1", s3_session_token=token, log_level="debug", **KEY)
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "nobody-may-see" not in text
    given = environment_of(settings)
    assert given["STREAMFORGE_S3_SECRET_ACCESS_KEY"] == SECRET
    assert given["STREAMFORGE_S3_SESSION_TOKEN"] == token
    plan = make_plan(settings, broker=True, simulator=True, remember=False)
    assert b"nobody-may-see" not in msgspec.json.encode(plan)
    assert "nobody-may-see" not in render_config(PlatformFiles(settings.home_path), plan)
    configure(settings)
    with pytest.raises(RetryableSourceError) as error:
        open_catalog(settings)
    logged = capsys.readouterr().err
    assert "debug" in logged
    assert "nobody-may-see" not in str(error.value) + logged


@pytest.mark.parametrize("wrong", ["localhost:8333", "s3://lake"])
def test_an_endpoint_that_is_no_url_is_refused_by_name(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="STREAMFORGE_S3_ENDPOINT"):
        _settings(tmp_path, s3_endpoint=wrong)
