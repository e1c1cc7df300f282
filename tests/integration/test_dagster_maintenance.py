"""Maintenance of the tables under Dagster where some are absent or broken, without Spark: expiry alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import dagster as dg
import pytest

from assets.maintenance import maintenance_key
from orchestration import maintenance
from streamforge.contracts import Contracts, load_contracts
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.settings import Settings
from tests.dagster_support import Jobs, Ran, with_platform

pytestmark = pytest.mark.integration

EXPIRE = {"compact": False, "retained_snapshots": 2}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]


@pytest.fixture
def contracts(settings: Settings) -> Contracts:
    return load_contracts(settings.contracts_dir)


@pytest.fixture
def jobs(settings: Settings, contracts: Contracts) -> Iterator[Jobs]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Jobs(with_platform(maintenance.definitions(contracts), settings, contracts), instance)


def land(settings: Settings, contracts: Contracts, name: str, *, times: int) -> None:
    """Make as many empty table snapshots."""
    table = ensure_table(open_catalog(settings), settings, contracts[name])
    for _ in range(times):
        table.append(contracts[name].arrow_schema.empty_table())


def maintained(jobs: Jobs, ran: Ran) -> set[dg.AssetKey | None]:
    """Return the keys of what a run materialized."""
    records = jobs.instance.all_logs(ran.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    return {each.dagster_event.asset_key for each in records if each.dagster_event is not None}


def test_absent_tables_are_no_failure_and_what_is_there_is_maintained(
    settings: Settings, contracts: Contracts, jobs: Jobs
) -> None:
    nothing = jobs.run("maintain", EXPIRE)
    assert nothing.success
    assert maintained(jobs, nothing) == set()
    land(settings, contracts, "trades", times=4)
    ran = jobs.run("maintain", EXPIRE)
    assert ran.success
    # The ledger of the expired snapshots is made by it, so it may be maintained too.
    assert maintenance_key(contracts["trades"]) in maintained(jobs, ran)
    table = open_catalog(settings).load_table((settings.namespace, "trades"))
    assert len(table.snapshots()) == 2


def test_broken_table_fails_the_run_only_after_all_others_were_maintained(
    settings: Settings, contracts: Contracts, jobs: Jobs
) -> None:
    first, *later = [contract.id for contract in contracts.with_table if contract.id != "commits"]
    for name in (first, *later):
        land(settings, contracts, name, times=3)
    catalog = open_catalog(settings)
    broken = catalog.load_table((settings.namespace, contracts[first].table.name))  # type: ignore[union-attr]
    Path(urlsplit(broken.metadata_location).path).unlink()
    ran = jobs.run("maintain", EXPIRE)
    assert not ran.success
    assert ran.failure.startswith(f"table {first} cannot be read or written: FileNotFoundError")
    assert ran.error == "CommitError"
    assert maintained(jobs, ran) >= {maintenance_key(contracts[name]) for name in later}
