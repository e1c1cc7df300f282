"""The Dockerfile, as far as it can be checked without Docker: what it copies, installs and runs is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.kubernetes_support import REPOSITORY, container_of, pod_of, workloads

DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
IGNORE_FILE = REPOSITORY / "deploy" / "Dockerfile.dockerignore"
PAGE = REPOSITORY / "docs" / "deployment.md"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order, continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(word.upper(), " ".join(rest.split())) for word, rest in pairs]


def copied() -> list[str]:
    """Return what the build copies from the repository."""
    found = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--from=")]
    return [source for words in found for source in words[:-1]]


def runs() -> list[str]:
    """Return the commands of the build in order."""
    return [rest for word, rest in instructions() if word == "RUN"]


def test_every_instruction_is_one_that_docker_knows() -> None:
    words = {word for word, _ in instructions()}
    assert words <= {"ARG", "FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "ENTRYPOINT", "CMD"}


def test_everything_copied_is_in_git_and_let_through_and_nothing_else_is() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    roots = {line.split("/")[0] for line in tracked.splitlines()}
    assert set(copied()) <= roots
    rules = [line for line in IGNORE_FILE.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert rules[0] == "*", "everything is left out that is not named"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied())


def test_a_program_runs_from_nothing_but_what_is_copied(tmp_path: Path) -> None:
    rooms = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*rooms, "contracts", "dbt"} <= set(copied())
    for name in copied():
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "target", "logs"))
        else:
            shutil.copy(source, tmp_path)
    code = (
        "import cli.app, orchestration.lakehouse, streamforge\n"
        "from streamforge.settings import Settings\n"
        "print(streamforge.__file__, Settings().contracts_dir)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(Path(word).is_relative_to(tmp_path) for word in done.stdout.split())


def test_packages_come_from_the_lock_file_before_the_code_and_by_group() -> None:
    order = [(word, rest) for word, rest in instructions() if word in {"RUN", "COPY"}]
    syncs = [place for place, (_, rest) in enumerate(order) if "uv sync" in rest]
    code = next(place for place, (_, rest) in enumerate(order) if rest.startswith("streamforge "))
    packages, project = syncs
    # A change of the code alone leaves the layer with the packages as it is.
    assert packages < code < project
    assert "--no-install-project" in order[packages][1]
    assert all(word in order[place][1] for place in syncs for word in ("--frozen", "--no-default-groups", "--group"))


def test_uv_and_python_are_those_of_the_project() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (wanted,) = re.findall(r"'(uv[^']+)'", makefile)
    assert any(f"'{wanted}'" in command for command in runs())
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(arguments["PYTHON_VERSION"])


def test_image_runs_as_the_user_of_the_manifests_under_an_init() -> None:
    final = instructions()[max(place for place, (word, _) in enumerate(instructions()) if word == "FROM") :]
    (user,) = [rest for word, rest in final if word == "USER"]
    for item in workloads().values():
        context = pod_of(item)["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
        # The image's own entry point stays: process 1 hands SIGTERM on.
        assert "command" not in container_of(item)
    assert ("ENTRYPOINT", '["/usr/bin/tini", "--"]') in final
    assert any("install" in rest and "tini" in rest for word, rest in final if word == "RUN")


def test_folders_that_manifests_mount_are_those_of_the_image() -> None:
    homes = [rest for word, rest in instructions() if word == "ENV" and "STREAMFORGE_HOME" in rest]
    assert homes == ["STREAMFORGE_HOME=/var/lib/streamforge"]
    for item in workloads().values():
        assert "/var/lib/streamforge" in {mount["mountPath"] for mount in container_of(item)["volumeMounts"]}


def test_nothing_secret_is_named_in_the_image() -> None:
    named = [rest for word, rest in instructions() if word in {"ARG", "ENV"}]
    assert not [rest for rest in named if re.search(r"passw|secret|token|credential|api_?key", rest, re.IGNORECASE)]


@pytest.mark.parametrize("image", sorted({container_of(item)["image"] for item in workloads().values()}))
def test_page_says_how_each_image_is_built_with_groups_that_exist(image: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.strip().startswith("docker build") and f" {image} " in line]
    assert len(commands) == 1, f"one docker build of {image} in {PAGE.name}"
    assert "-f deploy/Dockerfile" in commands[0]
    groups = re.findall(r'--build-arg DEPENDENCY_GROUPS="([^"]*)"', commands[0])
    assert {name for text in groups for name in text.split()} <= set(PROJECT["dependency-groups"])
    wanted = {"streamforge": "", "streamforge-dagster": "dagster spark", "streamforge-ml": "dagster spark ml"}
    assert " ".join(groups) == wanted[image.split(":", maxsplit=1)[0]]
