"""Fixtures that all tests share: one real broker for the session, and a platform of its own for each test."""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import structlog
from confluent_kafka.admin import AdminClient
from filelock import FileLock

from streamforge import broker
from streamforge.contracts import Contracts, load_contracts
from streamforge.kafka import admin_client
from streamforge.kafka_server import SHORT_LIVED
from streamforge.processes import ProcessRecord
from streamforge.settings import Settings
from streamforge.spark.session import spark_session
from streamforge.topics import create_topics
from tests.contract_files import copy_contracts
from tests.object_store import ObjectStore

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Every Java of the tests lives for a minute or two: its second compiler would take more time than it gives. It is half
# of what an embedded broker costs.
os.environ.setdefault("JDK_JAVA_OPTIONS", SHORT_LIVED)

MAX_TEST_PARTITIONS = 2


class MakeTopics(Protocol):
    """What the fixture `make_topics` gives."""

    def __call__(self, *contract_ids: str, partitions: int | None = MAX_TEST_PARTITIONS) -> Contracts:
        """Create the topics of `contract_ids` and return all contracts with those partition counts.

        `partitions` is an upper bound on the contract's own count, because 64 topic-partitions for each
        topic of each test cost seconds; None means as the contract says.
        """


_PLATFORM_TESTS = (Path(__file__).parent / "acceptance", Path(__file__).parent / "chaos")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a person choose where tables are: every test that uses `platform`, `pipeline` or `rig` follows."""
    parser.addoption("--store", choices=("local", "s3"), default="local", help="SQLite and a folder, or REST and S3.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, say which worker of pytest-xdist has a test, and what PySpark may leave behind.

    The tests of a file stay in one worker, for what they share. Those that start a whole platform stay in one
    together: two platforms at once are too much for two cores. PySpark leaves the socket of each result to the
    garbage collector: no error in the tests that use Spark.
    """
    if "minutes" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("minutes")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    for item in items:
        group = "platform" if item.path.parent in _PLATFORM_TESTS else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
        if "spark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own STREAMFORGE_ variables out of tests."""
    for name in [name for name in os.environ if name.startswith("STREAMFORGE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Undo what `streamforge.logs.configure` did during the test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def broker_settings(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Settings]:
    """Return settings of a running embedded broker; workers of pytest-xdist share one.

    Each worker leaves a record of itself; the last one alive stops the broker.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    settings = Settings(_env_file=None, home=shared / "session-broker")  # type: ignore[call-arg]
    members = shared / "session-broker-members"
    members.mkdir(exist_ok=True)
    own = members / worker_id
    lock = FileLock(shared / "session-broker.lock")
    try:
        with lock:
            ProcessRecord.of(os.getpid()).write(own)
            broker.start(settings)
        yield settings
    finally:
        with lock:
            own.unlink(missing_ok=True)
            if not any(_is_alive(path) for path in members.iterdir()):
                broker.stop(settings)


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """Return Spark, started once; `spark_session(platform)` then gives a test a session on its own catalog."""
    settings = Settings(_env_file=None, home=tmp_path_factory.mktemp("spark"))  # type: ignore[call-arg]
    session = spark_session(settings)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Return an object store with a REST catalog, started once for a worker of pytest-xdist."""
    running = ObjectStore(tmp_path_factory.mktemp("object-store"))
    yield running
    running.stop()


@pytest.fixture
def store(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the settings that say where this test's tables are; none: in its home."""
    kind = getattr(request, "param", request.config.getoption("store"))
    if kind == "local":
        return {}
    running: ObjectStore = request.getfixturevalue("object_store")
    return running.new_warehouse()


@pytest.fixture
def platform(broker_settings: Settings, tmp_path: Path, store: dict[str, Any]) -> Settings:
    """Return settings with a home and a topic prefix of their own, on the session's broker."""
    return Settings(
        _env_file=None,  # type: ignore[call-arg]
        home=tmp_path / "home",
        topic_prefix=f"t{uuid.uuid4().hex[:8]}.",
        bootstrap_servers=broker.status(broker_settings).address,
        **store,
    )


@pytest.fixture
def admin(platform: Settings) -> AdminClient:
    """Return an admin client of the session's broker."""
    return admin_client(platform)


@pytest.fixture
def make_topics(platform: Settings) -> MakeTopics:
    """Return a function that creates the topics that a test needs, with few topic-partitions."""

    def make(*contract_ids: str, partitions: int | None = MAX_TEST_PARTITIONS) -> Contracts:
        contracts = load_contracts(platform.contracts_dir, topic_prefix=platform.topic_prefix)
        made = with_partitions(contracts, contract_ids, partitions)
        create_topics(platform, made, contract_ids)
        return made

    return make


@pytest.fixture
def contract_folder(tmp_path: Path) -> Path:
    """Return a copy of the contract files that a test may spoil."""
    return copy_contracts(tmp_path / "contracts")


def with_partitions(contracts: Contracts, contract_ids: Iterable[str], partitions: int | None) -> Contracts:
    """Return the contracts with at most `partitions` topic-partitions in the topics named; None: as they say."""
    by_id = dict(contracts)
    for contract_id in contract_ids:
        topic = contracts[contract_id].topic
        assert topic is not None, f"contract {contract_id} has no topic"
        if partitions is not None:
            topic = dataclasses.replace(topic, partitions=min(partitions, topic.partitions))
        by_id[contract_id] = dataclasses.replace(contracts[contract_id], topic=topic)
    return Contracts(by_id)


def _is_alive(path: Path) -> bool:
    record = ProcessRecord.read(path)
    return record is not None and record.process() is not None
