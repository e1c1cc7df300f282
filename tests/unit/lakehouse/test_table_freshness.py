"""Freshness is told by the table: each row against the commit that brought it, replays left out."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from streamforge.contract_model import Contracts
from streamforge.contracts import load_contracts
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.table_freshness import read_ages
from streamforge.settings import Settings

NOW_MS = 1_750_000_000_000


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]


@pytest.fixture
def contracts(settings: Settings) -> Contracts:
    return load_contracts(settings.contracts_dir)


@pytest.fixture
def catalog(settings: Settings) -> Catalog:
    return open_catalog(settings)


def market_gaps(contracts: Contracts, commit_id: str, detected_ns: Sequence[int]) -> pa.Table:
    """Return rows of `market-gaps`, noticed at `detected_ns`, of spans that ended a second before."""
    rows = []
    for at_ns in detected_ns:
        row: dict[str, Any] = {
            field.name: 0 if pa.types.is_integer(field.type) else "" for field in contracts["market-gaps"].arrow_schema
        }
        times_ns = {"ts_start": at_ns - 2 * 10**9, "ts_end": at_ns - 10**9, "ts_detected": at_ns}
        row |= {f"{name}_ns": value for name, value in times_ns.items()}
        row |= {name: datetime.fromtimestamp(value / 1e9, UTC) for name, value in times_ns.items()}
        rows.append(row | {"commit_id": commit_id})
    return pa.Table.from_pylist(rows, schema=contracts["market-gaps"].arrow_schema)


def land(table: Table, contracts: Contracts, kind: str, detected_ms: Sequence[int]) -> tuple[Table, list[int]]:
    """Commit one row for each time; return how old each was at the commit, in milliseconds."""
    commit_id = uuid.uuid4().hex
    rows = market_gaps(contracts, commit_id, [at_ms * 1_000_000 for at_ms in detected_ms])
    landed = commit.commit_snapshot(
        table,
        decide=lambda _: {},
        added=commit.write_data_files(table, rows),
        summary={commit.KIND_KEY: kind, commit.COMMIT_ID_KEY: commit_id},
    )
    snapshot = landed.table.snapshot_by_id(landed.snapshot_id)
    assert snapshot is not None
    return landed.table, [snapshot.timestamp_ms - at_ms for at_ms in detected_ms]


def test_ages_are_of_the_commit_that_brought_the_row_and_not_of_replays(
    settings: Settings, contracts: Contracts, catalog: Catalog
) -> None:
    table = ensure_table(catalog, settings, contracts["market-gaps"])
    ensure_table(catalog, settings, contracts["commits"])
    table, first = land(table, contracts, "write", [NOW_MS - 700, NOW_MS - 1500])
    table, _ = land(table, contracts, "replay", [NOW_MS - 90_000])
    _, second = land(table, contracts, "write", [NOW_MS - 20])
    found = read_ages(catalog, settings, contracts, contracts["market-gaps"])
    assert (found.table, found.rows, found.commits) == ("market.market_gaps", 4, 2)
    assert sorted(found.received.tolist()) == sorted(first + second)
    assert sorted(found.event.tolist()) == sorted(age + 1000 for age in first + second)


def test_ages_survive_the_expiry_of_the_snapshot_that_brought_the_row(
    settings: Settings, contracts: Contracts, catalog: Catalog
) -> None:
    table = ensure_table(catalog, settings, contracts["market-gaps"])
    ledger = ensure_table(catalog, settings, contracts["commits"])
    ages = []
    for age_ms in (250, 1, 2, 3):
        table, landed = land(table, contracts, "write", [NOW_MS - age_ms])
        ages += landed
    table = Maintenance(ledger, contracts["commits"], retained=2).expire(table)
    assert len(table.metadata.snapshots) == 2
    found = read_ages(catalog, settings, contracts, contracts["market-gaps"])
    assert (sorted(found.received.tolist()), found.commits) == (sorted(ages), 4)


def test_ages_of_history_are_none(settings: Settings, contracts: Contracts, catalog: Catalog) -> None:
    contract = contracts["venue-bars"]
    table = ensure_table(catalog, settings, contract)
    ensure_table(catalog, settings, contracts["commits"])
    row = {
        field.name: 0 if pa.types.is_integer(field.type) or pa.types.is_decimal(field.type) else ""
        for field in contract.arrow_schema
    }
    row |= {name: datetime(2020, 1, 1, tzinfo=UTC) for name in ("ts_start", "ts_end", "ts_receive")} | {
        "commit_id": "c"
    }
    commit.commit_snapshot(
        table,
        decide=lambda _: {},
        added=commit.write_data_files(table, pa.Table.from_pylist([row], schema=contract.arrow_schema)),
        summary={commit.KIND_KEY: "write", commit.COMMIT_ID_KEY: "c"},
    )
    found = read_ages(catalog, settings, contracts, contract)
    assert (found.rows, found.commits, len(found.received), len(found.event)) == (1, 1, 0, 0)


def test_ages_of_an_empty_table_are_none(settings: Settings, contracts: Contracts, catalog: Catalog) -> None:
    ensure_table(catalog, settings, contracts["trades"])
    ensure_table(catalog, settings, contracts["commits"])
    found = read_ages(catalog, settings, contracts, contracts["trades"])
    assert (found.rows, found.commits, len(found.received), len(found.event)) == (0, 0, 0, 0)
