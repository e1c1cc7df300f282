"""The folder that a demo has for itself: found, guarded, emptied."""

from __future__ import annotations

import shutil
from pathlib import Path

from streamforge.errors import ConfigurationError
from streamforge.settings import Settings

HOME_NAME = "demo"
REPORT_FILE = "demo-report.json"

_MARK = ".streamforge-demo"


def demo_home(settings: Settings) -> Path:
    """Return the folder that a demo has for itself.

    Raises:
        ConfigurationError: the settings point to a cluster or a catalog that is not the demo's own.
    """
    for name in ("bootstrap_servers", "catalog_uri", "warehouse"):
        if getattr(settings, name) is not None:
            msg = (
                f"STREAMFORGE_{name.upper()} is set: the demo brings its own broker and tables and never writes into "
                "yours. Unset it for the demo, or use `streamforge up` with it"
            )
            raise ConfigurationError(msg)
    return settings.home_path / HOME_NAME


def prepare_home(home: Path) -> None:
    """Make `home` an empty demo home; what an earlier demo left there is removed.

    Raises:
        ConfigurationError: the folder holds something that no demo has made.
    """
    if home.exists() and not is_demo_home(home) and (not home.is_dir() or any(home.iterdir())):
        msg = (
            f"{home} exists and was not made by a demo (it has no file {_MARK}): it is left alone. Move it away, or "
            "set STREAMFORGE_HOME to another folder"
        )
        raise ConfigurationError(msg)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / _MARK).write_text(
        "Made by `streamforge demo`, which empties this folder at each start.\n", encoding="utf-8"
    )


def is_demo_home(home: Path) -> bool:
    """Return whether a demo has made this folder."""
    return (home / _MARK).is_file()
