"""Dagster as part of the platform: its home, its code locations and its processes. Nothing here imports Dagster.

    dagster-<location>   one code server for each location of `workspace.yaml`; it runs what is launched
    dagster-webserver    the UI
    dagster-daemon       schedules, sensors, the queue of runs

Code servers of our own, shared by webserver and daemon, because each of these would start one a location for
itself: six processes instead of four, which are nobody's when their parent is killed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml
from msgspec.structs import replace

from streamforge.errors import ConfigurationError, ProcessError
from streamforge.platform.plan import PORT_RELEASE_S, UI, PlatformFiles, PlatformPlan, ProcessPlan
from streamforge.processes import LOOPBACK, remembered_ports, write_atomically

DAGSTER = "dagster"
WEBSERVER = f"{DAGSTER}-webserver"
DAEMON = f"{DAGSTER}-daemon"

_GRPC = "grpc"
_BEFORE_ALL = -1
_STOP_DEADLINE_S = 15
_DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")

_WORKSPACE = Path(__file__).resolve().parents[2] / "workspace.yaml"
_PACKAGES = ("dagster", "dagster_webserver")
_INSTANCE = """\
# Written once by `streamforge up`; yours from then on.
storage:
  sqlite:
    base_dir:
      env: DAGSTER_HOME
telemetry:
  enabled: false
# No invitation to a newsletter.
nux:
  enabled: false
# A laptop has few cores, and the consumers need theirs.
concurrency:
  runs:
    max_concurrent_runs: 2
  # Runs of one pool come one after the other: two retrainings would mix what their steps hand on.
  pools:
    granularity: run
    default_limit: 1
run_monitoring:
  enabled: true
  # A machine that went down leaves runs that nobody ends: they must not hold a place for ever.
  max_runtime_seconds: 86400
retention:
  sensor:
    purge_after_days: {skipped: 1, failure: 30, success: 30}
  schedule:
    purge_after_days: {skipped: 7, failure: 30, success: 30}
"""


@dataclass(frozen=True, slots=True)
class CodeLocation:
    """One code location of `workspace.yaml`: its name and the module with its definitions."""

    name: str
    module: str

    @property
    def process_name(self) -> str:
        """Return the name of its code server."""
        return f"{DAGSTER}-{self.name}"


class _PythonModule(msgspec.Struct):
    module_name: str
    location_name: str


class _Entry(msgspec.Struct):
    python_module: _PythonModule


class _Workspace(msgspec.Struct):
    load_from: list[_Entry]


def missing() -> str | None:
    """Return why Dagster cannot run here; None: it can."""
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"Dagster is not installed ({', '.join(absent)} missing): no UI. `uv sync --group dagster` brings it"
    if not _WORKSPACE.is_file():
        return f"{_WORKSPACE} is missing: no Dagster UI. Run `streamforge up` from a checkout of the project"
    return None


def code_locations(path: Path = _WORKSPACE) -> tuple[CodeLocation, ...]:
    """Return the code locations that `workspace.yaml` names.

    Raises:
        ConfigurationError: the file cannot be read, or has another form.
    """
    try:
        found = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), _Workspace)
    except (OSError, yaml.YAMLError, msgspec.ValidationError) as error:
        msg = f"{path} must list python_module entries with module_name and location_name: {error}"
        raise ConfigurationError(msg) from error
    return tuple(
        CodeLocation(entry.python_module.location_name, entry.python_module.module_name) for entry in found.load_from
    )


def dagster_home(home: Path) -> Path:
    """Return the folder of Dagster's instance below the platform's home."""
    return home / DAGSTER


def dagster_environment(home: Path) -> dict[str, str]:
    """Return the environment variables that name Dagster's instance to each of its processes."""
    return {"DAGSTER_HOME": str(dagster_home(home)), "DAGSTER_DISABLE_TELEMETRY": "1"}


def prepare_instance(home: Path) -> Path:
    """Make Dagster's home and its `dagster.yaml` where they are absent; return the home."""
    folder = dagster_home(home)
    folder.mkdir(parents=True, exist_ok=True)
    instance = folder / "dagster.yaml"
    if not instance.exists():
        write_atomically(instance, _INSTANCE)
    return folder


def with_dagster(plan: PlatformPlan, *, remember: bool) -> PlatformPlan:
    """Return `plan` with Dagster's processes, or with a note that says why there are none.

    Args:
        plan: of the data plane.
        remember: whether the ports are written down for the next start; not for a dry run.
    """
    why_not = missing()
    if why_not is not None:
        return replace(plan, notes=[*plan.notes, why_not])
    files = PlatformFiles(Path(plan.home))
    locations = code_locations()
    names = [WEBSERVER, *(item.process_name for item in locations)]
    ports = remembered_ports(files.ports, names, release_s=PORT_RELEASE_S, remember=remember)
    served = ["--host", LOOPBACK, "--port"]
    workspace = ["--workspace", str(_workspace_file(files.home))]
    servers = [
        _process(
            files,
            item.process_name,
            ["dagster", "api", "grpc", "--module-name", item.module, "--location-name", item.name, *served],
            {_GRPC: ports.numbers[item.process_name]},
        )
        for item in locations
    ]
    webserver = _process(files, WEBSERVER, ["dagster_webserver", *workspace, *served], {UI: ports.numbers[WEBSERVER]})
    daemon = _process(files, DAEMON, ["dagster._daemon", "run", *workspace], {})
    # A location that does not answer when the webserver asks first stays an error until a person reloads it.
    last = [replace(each, starts_after=tuple(item.process_name for item in locations)) for each in (webserver, daemon)]
    return replace(
        plan,
        processes=[*plan.processes, *servers, *last],
        notes=[*plan.notes, *ports.notes()],
    )


def write_instance(plan: PlatformPlan) -> None:
    """Write what Dagster's processes of `plan` read at their start; nothing where it has none.

    Raises:
        ProcessError: Dagster cannot make its databases.
    """
    if plan.named(WEBSERVER) is None:
        return
    home = Path(plan.home)
    _make_storage(prepare_instance(home), dagster_environment(home))
    entries = [
        {"grpc_server": {"host": LOOPBACK, "port": server.ports[_GRPC], "location_name": item.name}}
        for item in code_locations()
        if (server := plan.named(item.process_name)) is not None
    ]
    write_atomically(_workspace_file(home), yaml.safe_dump({"load_from": entries}, sort_keys=False))


def _make_storage(folder: Path, environment: Mapping[str, str]) -> None:
    """Make the databases of a new instance, once and alone: processes that do it at the same time spoil them.

    Raises:
        ProcessError: Dagster cannot make them.
    """
    if all((folder / name).exists() for name in _DATABASES):
        return
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "instance", "info"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        msg = f"Dagster cannot open its instance in {folder}: {done.stderr.strip()[-500:]}. Move the folder away"
        raise ProcessError(msg)


def _workspace_file(home: Path) -> Path:
    return dagster_home(home) / "workspace.yaml"


def _process(files: PlatformFiles, name: str, module: list[str], ports: dict[str, int]) -> ProcessPlan:
    port = [str(number) for number in ports.values()]
    return ProcessPlan(
        name=name,
        kind=DAGSTER,
        slot=name,
        command=[sys.executable, "-m", *module, *port],
        ports=ports,
        log_file=str(files.logs / f"{name}.out"),
        # Nothing may be launched on a line that goes down.
        stop_rank=_BEFORE_ALL,
        stop_deadline_s=_STOP_DEADLINE_S,
        # A code server waits for its runs; they are told to end with it.
        stops_children=True,
    )
