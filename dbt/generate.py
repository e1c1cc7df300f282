"""Write the files of this project that follow from the contracts and from dbt: `uv run python dbt/generate.py`.

Tests compare them, so they cannot fall behind.
"""  # noqa: INP001 - a script in a folder of models

from __future__ import annotations

import tempfile

from streamforge.contracts import load_contracts
from streamforge.marts.generate import STAGING, graph_file, staging_files
from streamforge.marts.project import project_dir
from streamforge.marts.run import parse_manifest
from streamforge.settings import load_settings


def main() -> None:
    """Write staging, then what dbt makes of the whole project."""
    with tempfile.TemporaryDirectory() as home:
        settings = load_settings(home=home)
        folder = project_dir()
        staging = staging_files(load_contracts(settings.contracts_dir))
        for old in (folder / STAGING).iterdir():
            if f"{STAGING}/{old.name}" not in staging:
                old.unlink()
        for name, text in staging.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name, text in graph_file(parse_manifest(settings)).items():
            (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
