"""Contracts as they were in a git revision."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from streamforge.contracts import Contracts, parse_contracts, parse_document
from streamforge.errors import ConfigurationError

_TIMEOUT_S = 30.0


def contracts_at(folder: Path, revision: str, *, topic_prefix: str = "") -> Contracts:
    """Return the contracts of `folder` as git has them in `revision`; empty where it had none.

    Raises:
        ConfigurationError: git is absent, the folder lies in no repository, the revision is unknown, or a
            file of that revision is no contract.
    """
    if not folder.is_dir():
        msg = f"contracts folder {folder} does not exist; set STREAMFORGE_CONTRACTS_DIR or --folder to the right one"
        raise ConfigurationError(msg)
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    names = [name for name in _git(folder, "ls-tree", "--name-only", commit, "./").splitlines() if _is_contract(name)]
    documents = {
        folder / name: parse_document(_git(folder, "show", f"{commit}:./{name}"), Path(f"{revision}:{name}"))
        for name in names
    }
    return parse_contracts(documents, topic_prefix=topic_prefix)


def _is_contract(name: str) -> bool:
    return name.endswith(".yaml") and "/" not in name


def _git(folder: Path, *arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        msg = "git is not installed: it is needed to compare contracts with a revision. Install it, or use --live"
        raise ConfigurationError(msg)
    try:
        done = subprocess.run(  # noqa: S603 - arguments are ours, the revision stands behind --end-of-options
            [git, "-C", str(folder), *arguments], capture_output=True, timeout=_TIMEOUT_S, check=False
        )
        output = done.stdout.decode()
    except (subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        msg = f"git {arguments[0]} in {folder} gave no answer that can be read: {error}"
        raise ConfigurationError(msg) from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or "no such revision"
        msg = f"git {' '.join(arguments)} in {folder} failed: {said}. Name a revision that exists with --revision"
        raise ConfigurationError(msg)
    return output
