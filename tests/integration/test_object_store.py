"""An object store and a REST catalog, and a network that fails before them: nothing lost, nothing doubled.

What these tests run on is real (SeaweedFS), and so is every answer but those that the proxy takes away or invents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import SecretStr

from streamforge.contracts import Contracts
from streamforge.errors import CommitError, ConfigurationError, RetryableSourceError
from streamforge.lakehouse import catalog as catalogs
from streamforge.lakehouse.catalog import ensure_table, load_table, open_catalog, probe_compare_and_set
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from tests.conftest import MakeTopics
from tests.fault_proxy import ALWAYS, Fault, FaultProxy
from tests.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
from tests.table_rig import Rig, Writer
from tests.writer_support import (
    TRADE_TOPICS,
    WriterThread,
    assert_consistent,
    kill_writer_at,
    next_offsets,
    produce,
    running_writer,
    table_identities,
    topic_identities,
    trades,
    wait_for_landed,
    writer_settings,
)

pytestmark = pytest.mark.integration

LANDS_AFTER = (Fault.UNAVAILABLE, Fault.DROPPED, Fault.TRUNCATED, Fault.ANSWER_LOST, Fault.FAILED_AFTER)
COMMIT = "/tables/market_gaps"


class Proxies(NamedTuple):
    """What stands before the object store and before its catalog."""

    s3: FaultProxy
    catalog: FaultProxy


@pytest.fixture(scope="module")
def proxies(object_store: ObjectStore) -> Iterator[Proxies]:
    made = Proxies(FaultProxy(object_store.s3_url), FaultProxy(object_store.catalog_url))
    yield made
    for each in made:
        each.stop()


@pytest.fixture(autouse=True)
def _calm(proxies: Proxies) -> Iterator[None]:
    """Let the proxies pass everything on after each test."""
    yield
    for each in proxies:
        each.clear()


@pytest.fixture
def store(object_store: ObjectStore, proxies: Proxies) -> dict[str, Any]:
    """Put `platform` behind the proxies, in a warehouse of its own."""
    return _proxied(object_store, proxies)


@pytest.fixture(scope="module")
def behind(object_store: ObjectStore, proxies: Proxies, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Return a table behind the proxies; the tests of it go on from each other's positions, in any order."""
    return Rig(tmp_path_factory.mktemp("rig"), **_proxied(object_store, proxies))


@pytest.fixture
def writer(behind: Rig) -> Writer:
    """Return a writer that has claimed the table."""
    made = behind.writer()
    made.claim()
    return made


def test_doctors_probe_shows_that_the_catalog_refuses_the_second_of_two_conflicting_commits(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    settings = Settings(_env_file=None, home=tmp_path, **object_store.new_warehouse())  # type: ignore[arg-type]
    assert "exactly one passed" in probe_compare_and_set(settings)
    assert open_catalog(settings).list_tables(settings.namespace) == [], "the scratch table is gone"


# The object store


@pytest.mark.parametrize("fault", LANDS_AFTER, ids=lambda fault: fault.name)
def test_upload_that_fails_once_is_repeated_and_lands_once(
    behind: Rig, writer: Writer, proxies: Proxies, fault: Fault
) -> None:
    struck = [proxies.s3.strike(fault, "PUT", path) for path in (".parquet", "/metadata/snap-")]
    end = writer.ends[0] + 10
    assert writer.land(end).attempts == 1
    assert [each.struck for each in struck] == [1, 1], "data file and manifest list"
    behind.assert_exact(end)


@pytest.mark.parametrize(("path", "what"), [(".parquet", "data file"), ("/metadata/", "manifest")])
def test_store_that_stays_away_is_an_error_before_anything_was_sent(
    behind: Rig, writer: Writer, proxies: Proxies, path: str, what: str
) -> None:
    start = writer.ends[0]
    commits = proxies.catalog.count("POST", COMMIT)
    proxies.s3.strike(Fault.UNAVAILABLE, "PUT", path, times=ALWAYS)
    with pytest.raises((CommitError, OSError), match="SERVICE_UNAVAILABLE"):
        writer.land(start + 10)
    assert proxies.catalog.count("POST", COMMIT) == commits
    behind.assert_exact(start)
    proxies.s3.clear()
    writer.land(start + 10)
    behind.assert_exact(start + 10)


def test_store_that_refuses_connections_is_an_error_and_the_batch_lands_when_it_is_back(
    behind: Rig, writer: Writer, proxies: Proxies
) -> None:
    start = writer.ends[0]
    proxies.s3.refuse()
    try:
        with pytest.raises((CommitError, OSError), match="NETWORK_CONNECTION"):
            writer.land(start + 10)
    finally:
        proxies.s3.accept()
    writer.land(start + 10)
    behind.assert_exact(start + 10)


def test_store_that_does_not_answer_is_given_up_after_the_deadline_and_asked_again(
    behind: Rig, proxies: Proxies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs, "REQUEST_TIMEOUT_S", 0.5)
    writer = behind.writer()
    writer.claim()
    silent = proxies.s3.strike(Fault.SILENT, "GET", "/metadata/snap-")
    end = writer.ends[0] + 10
    writer.land(end)
    assert silent.struck == 1
    behind.assert_exact(end)


# The catalog


@pytest.mark.parametrize(
    "fault",
    [
        Fault.ANSWER_LOST,
        Fault.FAILED_AFTER,
        Fault.GATEWAY_AFTER,
        Fault.UNAVAILABLE_AFTER,
        Fault.CONFLICT_AFTER,
    ],
    ids=lambda fault: fault.name,
)
def test_commit_that_landed_and_was_answered_with_a_lie_is_sent_by_nobody_again(
    behind: Rig, writer: Writer, proxies: Proxies, fault: Fault
) -> None:
    struck = proxies.catalog.strike(fault, "POST", COMMIT)
    before, end = proxies.catalog.count("POST", COMMIT), writer.ends[0] + 10
    assert writer.land(end).attempts == 1
    assert struck.struck == 1
    assert proxies.catalog.count("POST", COMMIT) == before + 1, "neither we nor a library repeat it"
    behind.assert_exact(end)


@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.UNAVAILABLE, Fault.SILENT], ids=lambda fault: fault.name)
def test_commit_lost_on_the_way_is_looked_for_and_lands_once_at_the_next_attempt(
    behind: Rig, proxies: Proxies, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault is Fault.SILENT:
        monkeypatch.setattr(catalogs, "REQUEST_TIMEOUT_S", 0.5)
    writer = behind.writer()
    writer.claim()
    before, end = proxies.catalog.count("POST", COMMIT), writer.ends[0] + 10
    proxies.catalog.strike(fault, "POST", COMMIT)
    assert writer.land(end).attempts == 2
    assert proxies.catalog.count("POST", COMMIT) == before + 2
    behind.assert_exact(end)


def test_commit_whose_answer_is_lost_and_cannot_be_looked_up_at_first_is_looked_up_later(
    behind: Rig, writer: Writer, proxies: Proxies
) -> None:
    before, end = proxies.catalog.count("POST", COMMIT), writer.ends[0] + 10
    proxies.catalog.strike(Fault.ANSWER_LOST, "POST", COMMIT)
    unavailable = proxies.catalog.strike(Fault.UNAVAILABLE, "GET", COMMIT, times=3)
    assert writer.land(end).attempts == 1
    assert unavailable.struck == 3
    assert proxies.catalog.count("POST", COMMIT) == before + 1
    behind.assert_exact(end)


def test_snapshots_are_not_expired_while_the_store_does_not_take_their_summaries(
    behind: Rig, writer: Writer, proxies: Proxies
) -> None:
    maintenance = behind.maintenance(retained=2)
    for _ in range(3):
        writer.land(writer.ends[0] + 1)
    snapshots = len(behind.fresh().snapshots())
    proxies.s3.strike(Fault.UNAVAILABLE, "PUT", ".parquet", times=ALWAYS)
    with pytest.raises(CommitError, match="commits: data files cannot be written"):
        maintenance.expire(writer.table)
    assert len(behind.fresh().snapshots()) == snapshots
    proxies.s3.clear()
    maintenance.expire(writer.table)
    assert len(behind.fresh().snapshots()) == 2
    again = writer.restart()
    assert dict(again.claim()) == writer.ends, "expiry keeps the position"
    behind.assert_exact(writer.ends[0])


# The writer


def test_writer_behind_a_failing_network_loses_and_doubles_nothing(
    platform: Settings, make_topics: MakeTopics, proxies: Proxies, capfd: pytest.CaptureFixture[str]
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    with running_writer(settings, contracts) as writer:
        _land(settings, contracts, writer)
        for fault in (Fault.ANSWER_LOST, Fault.CONFLICT_AFTER, Fault.UNAVAILABLE, Fault.DROPPED):
            struck = proxies.catalog.strike(fault, "POST", "/tables/trades")
            uploads = proxies.s3.strike(Fault.TRUNCATED, "PUT", ".parquet")
            _land(settings, contracts, writer)
            assert (struck.struck, uploads.struck) == (1, 1)
        proxies.s3.strike(Fault.UNAVAILABLE, "PUT", ".parquet", times=ALWAYS)
        produce(settings, topic, trades(10))
        assert writer.join(60) == 1, "the SDK has tried thrice: a supervisor starts it again"
    assert "could not be written as data files" in "".join(capfd.readouterr())
    assert_consistent(settings, contracts, topic, "503")
    proxies.s3.clear()
    with running_writer(settings, contracts) as again:
        wait_for_landed(settings, contracts, topic, writer=again)
    assert again.exit_code == 0
    assert table_identities(settings, contracts) == topic_identities(settings, topic)


def test_writer_killed_right_after_its_commit_loses_and_doubles_nothing_and_writes_no_secret(
    platform: Settings, make_topics: MakeTopics, tmp_path: Path
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform, log_level="debug", log_file=tmp_path / "writer.jsonl")
    topic, log = topic_of(contracts, "trades").name, tmp_path / "writer.log"
    produce(settings, topic, trades(10))
    kill_writer_at("writer.commit_sent", settings, log)
    assert_consistent(settings, contracts, topic, "kill")
    with running_writer(settings, contracts) as writer:
        wait_for_landed(settings, contracts, topic, writer=writer)
    assert_consistent(settings, contracts, topic, "stop")
    assert sum(next_offsets(settings, contracts).values()) >= sum(topic_identities(settings, topic).values()) == 10
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {log, tmp_path / "writer.jsonl"} <= set(written)
    assert '"level": "debug"' in (tmp_path / "writer.jsonl").read_text()
    for path in written:
        for secret in (ACCESS_KEY, SECRET_KEY):
            assert secret.encode() not in path.read_bytes(), path


def test_catalog_that_does_not_know_the_key_is_a_clear_error_without_it(behind: Rig) -> None:
    other = {"s3_secret_access_key": SecretStr("another-secret")}
    settings = behind.settings.model_copy(update=other)
    asks: tuple[Callable[[], object], ...] = (
        lambda: load_table(open_catalog(settings), settings, behind.contract),
        lambda: ensure_table(open_catalog(settings), settings, behind.contract),
        lambda: probe_compare_and_set(settings),
    )
    for ask in asks:
        with pytest.raises(ConfigurationError, match=r"signature .* the credentials") as error:
            ask()
        assert "another-secret" not in str(error.value)


def test_catalog_that_is_away_is_worth_a_restart(behind: Rig, proxies: Proxies) -> None:
    """Exit code 2 would tell the supervisor that a restart cannot help."""
    catalog = open_catalog(behind.settings)
    proxies.catalog.refuse()
    try:
        for ask in (open_catalog, lambda each: load_table(catalog, each, behind.contract)):
            with pytest.raises(RetryableSourceError, match="does not answer") as error:
                ask(behind.settings)
            assert error.value.exit_code == 1
    finally:
        proxies.catalog.accept()
    assert load_table(catalog, behind.settings, behind.contract).name() == ("market", "market_gaps")


def _proxied(object_store: ObjectStore, proxies: Proxies) -> dict[str, Any]:
    return object_store.new_warehouse() | {"s3_endpoint": proxies.s3.url, "catalog_uri": proxies.catalog.url}


def _land(settings: Settings, contracts: Contracts, writer: WriterThread) -> None:
    topic = topic_of(contracts, "trades").name
    produce(settings, topic, trades(10))
    wait_for_landed(settings, contracts, topic, writer=writer)
