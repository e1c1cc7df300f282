"""The libraries that models need and the rest does not: the dependency group `ml`."""

from __future__ import annotations

from importlib.util import find_spec

from streamforge.errors import ConfigurationError

MODEL_LIBRARIES = ("torch", "torch_geometric", "mlflow", "lightgbm")


def missing_libraries() -> list[str]:
    """Return those that are not installed, without importing any."""
    return [name for name in MODEL_LIBRARIES if find_spec(name) is None]


def require_libraries() -> None:
    """Check that models can be trained and used here.

    Raises:
        ConfigurationError: libraries are missing; says how to install them.
    """
    missing = missing_libraries()
    if missing:
        msg = f"models need {', '.join(missing)}, which this environment lacks: `uv sync --frozen --group ml`"
        raise ConfigurationError(msg)
