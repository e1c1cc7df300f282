"""The dbt project as values: where it lies, what it makes and checks. Nothing here imports dbt.

`graph.json`, beside the project, is what Dagster needs of dbt's manifest: it is read in a millisecond, while dbt
takes seconds to parse itself. It is written by `dbt/generate.py`; a test compares it with dbt's own manifest.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from streamforge.errors import ConfigurationError
from streamforge.settings import Settings

PROJECT_NAME = "streamforge"
SOURCE_NAME = "lake"
GRAPH_FILE = "graph.json"
_PACKAGE = Path(__file__).resolve().parent.parent


class ModelColumn(msgspec.Struct, frozen=True):
    """One column of a model."""

    name: str
    type: str
    description: str


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One dbt model.

    Args:
        layer: folder of the model: staging, intermediate or marts.
        materialized: view or incremental.
        models: the models that it reads.
        tables: the tables of contracts that it reads, by table name.
    """

    name: str
    layer: str
    materialized: str
    description: str
    columns: list[ModelColumn]
    models: list[str]
    tables: list[str]


class ModelTest(msgspec.Struct, frozen=True, kw_only=True):
    """One data test of dbt; `model` is the one whose rows it judges."""

    name: str
    model: str
    description: str
    severity: str


class MartGraph(msgspec.Struct, frozen=True, kw_only=True):
    """Every model and test of the project."""

    models: list[Model]
    tests: list[ModelTest]


def project_dir() -> Path:
    """Return the folder of the dbt project.

    Raises:
        ConfigurationError: it is neither in a checkout nor in the installed package.
    """
    for folder in (_PACKAGE.parent / "dbt", _PACKAGE / "_dbt"):
        if (folder / "dbt_project.yml").is_file():
            return folder
    msg = f"the dbt project is not installed: no dbt_project.yml below {_PACKAGE.parent / 'dbt'} or {_PACKAGE / '_dbt'}"
    raise ConfigurationError(msg)


def read_graph() -> MartGraph:
    """Return what the project makes and checks.

    Raises:
        ConfigurationError: `graph.json` is missing or unreadable.
    """
    path = project_dir() / GRAPH_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=MartGraph)
    except (OSError, msgspec.MsgspecError) as error:
        msg = f"{path} cannot be read: {error}. `uv run python dbt/generate.py` writes it"
        raise ConfigurationError(msg) from error


def marts_namespace(settings: Settings) -> str:
    """Return the Iceberg namespace that dbt writes; that of the contracts stays theirs alone."""
    return f"{settings.namespace}_marts"


def work_dir(settings: Settings) -> Path:
    """Return the folder below `home` for what dbt writes beside tables: artifacts, logs, its lock."""
    return settings.home_path / "dbt"
