"""Jobs run for real that cannot do their work: the broker is away, a partition key is none. They say what to do.

Nothing is changed then, and nothing is said of what is not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration import control, letters, replay, tables
from streamforge import kafka, log_reader
from streamforge.contracts import load_contracts
from streamforge.lakehouse.catalog import ensure_tables, open_catalog
from streamforge.processes import LOOPBACK, choose_free_port
from streamforge.settings import Settings
from tests.dagster_support import Jobs, Ran, with_platform

SAID = {dg.DagsterEventType.ASSET_OBSERVATION, dg.DagsterEventType.ASSET_CHECK_EVALUATION}
RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return a platform with every table and without a broker."""
    address = f"{LOOPBACK}:{choose_free_port()}"
    home = tmp_path_factory.mktemp("home")
    made = Settings(_env_file=None, home=home, bootstrap_servers=address)  # type: ignore[call-arg]
    ensure_tables(open_catalog(made), made, load_contracts(made.contracts_dir))
    return made


@pytest.fixture(scope="module")
def jobs(settings: Settings) -> Iterator[Jobs]:
    contracts = load_contracts(settings.contracts_dir)
    rooms = dg.Definitions.merge(*(room.definitions(contracts) for room in (control, letters, replay, tables)))
    with dg.instance_for_test() as instance:
        yield Jobs(with_platform(rooms, settings, contracts), instance)


@pytest.fixture(autouse=True)
def _nothing_is_changed(settings: Settings) -> Iterator[None]:
    before = _metadata_files(settings)
    yield
    assert _metadata_files(settings) == before


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("observe_consumers", None),
        ("check_consumers", None),
        ("observe_dead_letters", None),
        ("check_dead_letters", None),
        ("redrive", {"dry_run": False}),
    ],
)
def test_job_without_a_broker_fails_and_says_what_to_do(
    name: str, config: dict[str, Any] | None, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kafka, log_reader):
        monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 0.5)
    ran = jobs.run(name, config)
    assert (ran.success, ran.error) == (False, "RetryableSourceError")
    assert ran.failure.startswith("the broker does not ")
    assert "Is it up? `streamforge " in ran.failure
    assert not jobs.instance.all_logs(ran.run_id, of_type=SAID), "nothing is known, so nothing is said"


@pytest.mark.parametrize("key", ["2024-13-01", "2024-05-06-06", "yesterday"])
def test_replay_of_a_key_that_is_none_fails_and_shows_one_that_is(key: str, jobs: Jobs) -> None:
    ran = jobs.run("replay", {"partition_keys": ["2024-05-06", key], "dry_run": False})
    _refused(ran, f"a partition key is a day or an hour in UTC, 2026-11-24 or 2026-11-24-06:00, found {key!r}")


@pytest.mark.parametrize(("name", "key"), [("replay_hours", "2026-01-05"), ("replay_days", "2026-01-05-06:00")])
def test_partition_that_the_job_does_not_have_is_refused_before_anything_runs(name: str, key: str, jobs: Jobs) -> None:
    with pytest.raises(dg.DagsterUnknownPartitionError, match=f"Could not find a partition with key `{key}`"):
        jobs.run(name, partition_key=key)


def test_bars_of_a_range_that_ends_before_it_starts_are_refused(jobs: Jobs) -> None:
    ran = jobs.run("bars_backfill", tags=dict(zip(RANGE, ("2026-01-05-06:00", "2026-01-05-03:00"), strict=True)))
    _refused(ran, "the window from 2026-01-05T06:00:00+00:00 to 2026-01-05T04:00:00+00:00 holds nothing")


def _refused(ran: Ran, said: str) -> None:
    assert (ran.success, ran.error) == (False, "ConfigurationError")
    assert ran.failure.startswith(said)


def _metadata_files(settings: Settings) -> set[Path]:
    """Return the metadata files of every table: a commit makes one."""
    return set(settings.home_path.rglob("*.metadata.json"))
