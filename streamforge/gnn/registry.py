"""The model registry: MLflow, on SQLite and a folder under the home unless a setting names a server.

A version holds the model artifact, and as tags which table snapshots it was trained on. Two aliases: `challenger`
is the latest version that was trained, `champion` the one that forecasts. Only `promote` moves the champion.

MLflow is used as a store: no autologging, no telemetry, no look at git, no package index.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from filelock import FileLock
from sqlalchemy.exc import SQLAlchemyError

from streamforge.errors import ConfigurationError
from streamforge.gnn.forecast import InstrumentForecast, forecast
from streamforge.gnn.libraries import require_libraries
from streamforge.gnn.training import TrainedModel, load_model, save_model
from streamforge.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL_NAME = "volatility"
CHAMPION = "champion"
CHALLENGER = "challenger"
SNAPSHOT_TAG = "table_snapshot."
"""A version's tag `table_snapshot.<table>` is the id of the table snapshot that it was trained on."""

_LOCK_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Champion:
    """A version of the model, ready to forecast.

    Args:
        version: in the registry.
        model: what it is.
    """

    version: str
    model: TrainedModel

    @property
    def interval_ns(self) -> int:
        """Return the length of the intervals that it forecasts."""
        return self.model.interval_ns

    @property
    def history_intervals(self) -> int:
        """Return the intervals that a forecast looks back; with fewer it is made of what there is."""
        return self.model.recipe.history_intervals

    def predict(self, bars: pa.Table) -> list[InstrumentForecast]:
        """Forecast the interval after the last one in `bars`; see `forecast`."""
        return forecast(self.model, bars)


def champion_version(settings: Settings) -> str | None:
    """Return the version that is champion, None where there is none; cheap enough to ask every few seconds."""
    return alias_version(settings, CHAMPION)


def load_champion(settings: Settings) -> Champion | None:
    """Load the champion, None where there is none.

    Raises:
        ConfigurationError: the registry or the artifact cannot be read, or libraries are missing.
    """
    version = champion_version(settings)
    return None if version is None else Champion(version, load_version(settings, version))


def alias_version(settings: Settings, alias: str) -> str | None:
    """Return the version that an alias names, None where it names none.

    Raises:
        ConfigurationError: the registry cannot be read, or libraries are missing.
    """
    if not _exists(settings):
        return None
    with _asked(settings):
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            aliases: Mapping[str, object] = _client(settings).get_registered_model(MODEL_NAME).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return str(aliases[alias]) if alias in aliases else None


def load_version(settings: Settings, version: str) -> TrainedModel:
    """Load one version of the model.

    Raises:
        ConfigurationError: there is no such version, or its artifact cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        return load_model(artifact_of(settings, version, Path(folder)))


def artifact_of(settings: Settings, version: str, folder: Path) -> Path:
    """Copy the model artifact of a version into `folder` and return where it lies.

    Raises:
        ConfigurationError: there is no such version, or the registry cannot be read.
    """
    with _asked(settings):
        client = _client(settings)
        run_id = client.get_model_version(MODEL_NAME, version).run_id
        return Path(client.download_artifacts(run_id, "", str(folder)))


def version_tags(settings: Settings, version: str) -> dict[str, str]:
    """Return what is said of a version.

    Raises:
        ConfigurationError: there is no such version, or the registry cannot be read.
    """
    with _asked(settings):
        found: ModelVersion = _client(settings).get_model_version(MODEL_NAME, version)
        return dict(found.tags)


def trained_on(settings: Settings, version: str) -> dict[str, int]:
    """Return the table snapshot ids that a version was trained on, by table."""
    return {
        name.removeprefix(SNAPSHOT_TAG): int(value)
        for name, value in version_tags(settings, version).items()
        if name.startswith(SNAPSHOT_TAG)
    }


def store(settings: Settings, model: TrainedModel, *, tags: Mapping[str, str], files: Mapping[str, bytes]) -> str:
    """Store the artifact of a trained model, as no version yet, and return its id.

    Args:
        settings: where the registry is.
        model: the model.
        tags: what to say of it.
        files: further files of the artifact, by name.

    Raises:
        ConfigurationError: the registry cannot be read or written.
    """
    with _asked(settings):
        client = _client(settings)
        run = client.create_run(_experiment(client, settings), tags=dict(tags), run_name=MODEL_NAME)
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder))
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            client.log_artifacts(run.info.run_id, folder)
        client.set_terminated(run.info.run_id)
        return str(run.info.run_id)


def register(
    settings: Settings, artifact_id: str, *, table_snapshots: Mapping[str, int], tags: Mapping[str, str]
) -> str:
    """Make a new version of a stored artifact, make it the challenger, and return the version.

    Whatever must be there as long as the version is, must be there before: a kill can come between any two steps.

    Args:
        settings: where the registry is.
        artifact_id: of the artifact.
        table_snapshots: table snapshot ids that it was trained on, by table.
        tags: what else to say of the version.

    Raises:
        ConfigurationError: the registry cannot be read or written.
    """
    with _asked(settings):
        client = _client(settings)
        _ensure_model(client)
        pinned = {f"{SNAPSHOT_TAG}{table}": str(snapshot) for table, snapshot in table_snapshots.items()}
        source = client.get_run(artifact_id).info.artifact_uri
        version = str(
            client.create_model_version(MODEL_NAME, source=source, run_id=artifact_id, tags={**tags, **pinned}).version
        )
        client.set_registered_model_alias(MODEL_NAME, CHALLENGER, version)
        return version


def version_metrics(settings: Settings, version: str) -> dict[str, float]:
    """Return the figures that were written beside a version.

    Raises:
        ConfigurationError: there is no such version, or the registry cannot be read.
    """
    with _asked(settings):
        client = _client(settings)
        return dict(client.get_run(client.get_model_version(MODEL_NAME, version).run_id).data.metrics)


def log_metrics(settings: Settings, version: str, metrics: Mapping[str, float]) -> None:
    """Write figures of a version beside it.

    Raises:
        ConfigurationError: the registry cannot be read or written.
    """
    with _asked(settings):
        client = _client(settings)
        run_id = client.get_model_version(MODEL_NAME, version).run_id
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)


def promote(settings: Settings, version: str) -> None:
    """Make a version the champion; it is no challenger any more.

    Raises:
        ConfigurationError: the registry cannot be read or written.
    """
    with _asked(settings):
        client = _client(settings)
        client.set_registered_model_alias(MODEL_NAME, CHAMPION, version)
        if alias_version(settings, CHALLENGER) == version:
            client.delete_registered_model_alias(MODEL_NAME, CHALLENGER)


@contextmanager
def _asked(settings: Settings) -> Iterator[None]:
    """Make what MLflow raises an error that says which registry it was."""
    require_libraries()
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise _unreadable(settings, error) from error


def registry_uri(settings: Settings) -> str:
    """Return the MLflow URI, with the embedded default filled in."""
    return settings.mlflow_uri or f"sqlite:///{_folder(settings) / 'mlflow.db'}"


def _folder(settings: Settings) -> Path:
    return settings.home_path / "mlflow"


def _exists(settings: Settings) -> bool:
    """Return whether there can be a registry: nobody who asks for a champion makes one."""
    return settings.mlflow_uri is not None or (_folder(settings) / "mlflow.db").is_file()


def _client(settings: Settings) -> MlflowClient:
    """Return a client of the registry; called within `_asked`."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A server that is away is told within seconds, not after MLflow's seven tries of two minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient  # noqa: PLC0415

    uri = registry_uri(settings)
    _folder(settings).mkdir(parents=True, exist_ok=True)
    # MLflow creates its tables on the first use; two processes at once would both do so.
    with FileLock(_folder(settings) / "mlflow.lock", timeout=_LOCK_TIMEOUT_S):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment(client: MlflowClient, settings: Settings) -> str:
    found = client.get_experiment_by_name(MODEL_NAME)
    if found is not None:
        return str(found.experiment_id)
    location = None if settings.mlflow_uri else (_folder(settings) / "artifacts").as_uri()
    return str(client.create_experiment(MODEL_NAME, artifact_location=location))


def _ensure_model(client: MlflowClient) -> None:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        client.create_registered_model(MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _unreadable(settings: Settings, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the model registry {registry_uri(settings)} cannot be read: {error}. Check STREAMFORGE_MLFLOW_URI"
    )
