"""Real Dagster runs over tables: checks, the bars of past hours, schedules, and how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from assets.bars import BARS_BACKFILL_KEY
from assets.catalogue import table_key
from assets.checks import FRESHNESS
from assets.gaps import NO_OPEN_GAP, retention_gap_checks
from orchestration.resources import Platform
from orchestration.tables import definitions
from streamforge.contracts import load_contracts
from streamforge.lakehouse.catalog import ensure_tables, load_table, open_catalog
from streamforge.lakehouse.pipeline_gaps import record_gaps
from streamforge.retention_gaps import ConsumerKind, GapState
from streamforge.settings import Settings
from tests.bars_support import HOUR, land_trades, market, trade_row
from tests.dagster_support import failures, with_platform
from tests.gaps_support import GAP
from tests.pipeline_support import make_trade

KEY = HOUR.strftime("%Y-%m-%d-%H:%M")
NEXT_KEY = HOUR.replace(hour=HOUR.hour + 1).strftime("%Y-%m-%d-%H:%M")


@pytest.fixture
def lakehouse(tmp_path: Path) -> Platform:
    """Return a platform with every table made; no broker is needed to look at tables."""
    settings = Settings(_env_file=None, home=tmp_path / "home", bootstrap_servers="127.0.0.1:1")  # type: ignore[call-arg]
    contracts = load_contracts(settings.contracts_dir)
    ensure_tables(open_catalog(settings), settings, contracts)
    return Platform(settings, contracts)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


def job(platform: Platform, name: str) -> dg.JobDefinition:
    return with_platform(definitions(platform.contracts), platform.settings, platform.contracts).resolve_job_def(name)


def run(platform: Platform, instance: dg.DagsterInstance, name: str, **options: Any) -> dg.ExecuteInProcessResult:
    return job(platform, name).execute_in_process(instance=instance, raise_on_error=False, **options)


def checks(result: dg.ExecuteInProcessResult) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    return {(item.asset_key.path[-1], item.check_name): item for item in result.get_asset_check_evaluations()}


def test_quality_of_good_rows_passes_and_of_a_planted_row_fails_with_count_and_example(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    trades = lakehouse.contracts["trades"]
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    land_trades(lakehouse.settings, trades, [make_trade("BTC-USDT.SIM", number, now_ms) for number in range(20)])
    first = run(lakehouse, instance, "quality")
    assert first.success
    found = checks(first)
    assert {name for table, name in found if table == "trades"} >= {
        "one_row_per_trade",
        "values_are_in_range",
        FRESHNESS,
    }
    assert all(item.passed for (_, name), item in found.items() if name != FRESHNESS)
    assert found["trades", FRESHNESS].metadata["instruments"].value == 1

    table = load_table(open_catalog(lakehouse.settings), lakehouse.settings, trades)
    bad = trade_row(make_trade("BTC-USDT.SIM", 7, now_ms), (0, 99)) | {"raw_offset": 99, "price": Decimal(0)}
    table.append(pa.Table.from_pylist([bad], schema=trades.arrow_schema))
    second = run(lakehouse, instance, "quality")
    assert second.success, "bad data is a result, not a crash"
    failed = {key: item for key, item in checks(second).items() if not item.passed and key[1] != FRESHNESS}
    assert set(failed) == {("trades", "one_row_per_trade"), ("trades", "values_are_in_range")}
    unique = failed["trades", "one_row_per_trade"]
    assert unique.severity is dg.AssetCheckSeverity.ERROR
    assert (unique.metadata["found"].value, unique.metadata["rows"].value) == (1, 21)
    assert unique.metadata["examples"].value == [{"venue": "SIM", "symbol": "BTCUSDT", "trade_id": "7", "times": 2}]


def test_freshness_warns_of_one_late_instrument_and_is_an_error_when_all_are(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    trades = lakehouse.contracts["trades"]
    # Ahead of the clock, so that it stays fresh however slowly this runs.
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    land_trades(lakehouse.settings, trades, [make_trade("BTC-USDT.SIM", 1, now_ms - 60_000)])
    late = checks(run(lakehouse, instance, "quality"))["trades", FRESHNESS]
    land_trades(lakehouse.settings, trades, [make_trade("ETH-USDT.SIM", 2, now_ms + 600_000)])
    some = checks(run(lakehouse, instance, "quality"))["trades", FRESHNESS]
    assert (late.passed, late.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert (some.passed, some.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert list(some.metadata["late_s"].value) == ["BTC-USDT.SIM"]
    # A day on, with a row of the one only, the other is not late any more but gone, and is named for that.
    land_trades(lakehouse.settings, trades, [make_trade("ETH-USDT.SIM", 3, now_ms + 25 * 3_600_000)])
    gone = checks(run(lakehouse, instance, "quality"))["trades", FRESHNESS]
    assert (gone.passed, gone.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert (gone.metadata["late_s"].value, list(gone.metadata["gone_s"].value)) == ({}, ["BTC-USDT.SIM"])
    assert "No row of these for a day, though others have some: BTC-USDT.SIM (0 h)" in (gone.description or "")


def test_retention_gap_fails_the_check_of_its_table_until_it_is_accepted(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    settings, contracts = lakehouse.settings, lakehouse.contracts
    gap = replace(GAP, consumer=f"{settings.namespace}.trades", detail="what happened, and what to do")
    group = replace(GAP, consumer_kind=ConsumerKind.GROUP, consumer="parser")
    assert "check_retention_gaps" in {node.name for node in job(lakehouse, "quality").nodes}
    only = dg.define_asset_job("gaps", selection=dg.AssetSelection.checks(retention_gap_checks(contracts)))
    step = dg.Definitions(asset_checks=[retention_gap_checks(contracts)], jobs=[only])
    gaps = with_platform(step, settings, contracts).resolve_job_def("gaps")
    record_gaps(settings, contracts, [gap, group])
    found = {table: item for (table, _), item in checks(gaps.execute_in_process(instance=instance)).items()}
    assert set(found) == {table_key(item).path[-1] for item in contracts.with_table if item.topic} | {"pipeline_gaps"}
    assert {table for table, item in found.items() if not item.passed} == {"trades", "pipeline_gaps"}
    said = found["trades"].description or ""
    assert said == f"table market.trades: trades-3[10,20): {gap.detail}"
    assert found["pipeline_gaps"].metadata["open"].value == 2
    record_gaps(settings, contracts, [replace(gap, state=GapState.ACCEPTED), replace(group, state=GapState.ACCEPTED)])
    again = checks(gaps.execute_in_process(instance=instance))
    assert all(item.passed for item in again.values())
    assert again["trades", NO_OPEN_GAP].metadata["accepted"].value == 1


def test_quality_with_a_table_missing_fails_that_step_clearly_and_checks_the_others(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    open_catalog(lakehouse.settings).drop_table((lakehouse.settings.namespace, "bars"))
    result = run(lakehouse, instance, "quality")
    assert not result.success
    assert failures(result) == {
        "check_bars": "table market.bars does not exist: `streamforge contracts apply` creates it"
    }
    assert "trades" in {table for table, _ in checks(result)}


def test_bars_of_an_hour_are_landed_once_and_the_next_run_commits_nothing(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    land_trades(lakehouse.settings, lakehouse.contracts["trades"], market())
    outcomes = []
    for _ in range(2):
        result = run(lakehouse, instance, "bars_backfill", partition_key=KEY)
        assert result.success
        [event] = result.asset_materializations_for_node("backfills__bars")
        assert event.partition == KEY
        outcomes.append({name: value.value for name, value in event.metadata.items()})
    first, second = outcomes
    assert (first["committed"], first["bars_missing"], first["bars_equal"]) == (True, first["bars_built"], 0)
    assert first["bars_built"] > 30
    assert (second["committed"], second["bars_equal"]) == (False, first["bars_built"])
    assert second["content_hash"] == second["content_hash_before"] == first["content_hash"]
    assert instance.get_materialized_partitions(BARS_BACKFILL_KEY) == {KEY}


def test_bars_of_a_range_of_hours_are_one_run_and_one_table_snapshot(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    land_trades(lakehouse.settings, lakehouse.contracts["trades"], market())
    tags = {"dagster/asset_partition_range_start": KEY, "dagster/asset_partition_range_end": NEXT_KEY}
    result = run(lakehouse, instance, "bars_backfill", tags=tags)
    assert result.success
    events = result.asset_materializations_for_node("backfills__bars")
    assert {event.partition for event in events} == {KEY, NEXT_KEY}
    bars = load_table(open_catalog(lakehouse.settings), lakehouse.settings, lakehouse.contracts["bars"])
    assert len(bars.metadata.snapshots) == 1
    assert {row["replay_epoch"] for row in bars.scan().to_arrow().to_pylist()} == {1}


def test_bars_of_a_partition_key_that_is_none_are_refused_before_anything_runs(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    for key in ("2026-01-05", "2023-01-01-00:00", "now"):
        with pytest.raises(dg.DagsterUnknownPartitionError, match=f"Could not find a partition with key `{key}`"):
            job(lakehouse, "bars_backfill").execute_in_process(instance=instance, partition_key=key)
    assert not instance.get_runs()


def test_bars_backfill_with_the_trades_table_missing_says_what_to_do(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    open_catalog(lakehouse.settings).drop_table((lakehouse.settings.namespace, "trades"))
    result = run(lakehouse, instance, "bars_backfill", partition_key=KEY)
    assert failures(result) == {
        "backfills__bars": "table market.trades does not exist: `streamforge contracts apply` creates it"
    }


def test_schedules_ask_for_the_hours_that_ended_and_for_the_newest_rows(
    lakehouse: Platform, instance: dg.DagsterInstance
) -> None:
    merged = with_platform(definitions(lakehouse.contracts), lakehouse.settings, lakehouse.contracts)
    repository = merged.get_repository_def()
    at = HOUR.replace(minute=20) + timedelta(hours=6)
    with dg.build_schedule_context(
        instance=instance, scheduled_execution_time=at, repository_def=repository
    ) as context:
        mend = repository.get_schedule_def("bars_backfill_schedule").evaluate_tick(context)
        quality = repository.get_schedule_def("quality_schedule").evaluate_tick(context)
    # Trades of six hours ago that landed late are mended still: the run that is asked for does it.
    land_trades(lakehouse.settings, lakehouse.contracts["trades"], market())
    [hours] = mend.run_requests or ()
    assert hours.partition_key is None
    mended = run(lakehouse, instance, "bars_backfill", tags=dict(hours.tags))
    assert mended.success
    keys = [(HOUR + timedelta(hours=back)).strftime("%Y-%m-%d-%H:%M") for back in range(6)]
    events = mended.asset_materializations_for_node("backfills__bars")
    assert {event.partition for event in events} == set(keys)
    assert all(event.metadata["committed"].value for event in events)
    [asked] = quality.run_requests or ()
    assert dg.validate_run_config(repository.get_job("quality"), asked.run_config)
    newest = {step["config"]["newest_hours"] for step in asked.run_config["ops"].values()}
    assert newest == {24.0}
    assert set(asked.run_config["ops"]) == {
        f"check_{table_key(item).path[-1]}" for item in lakehouse.contracts.with_table
    }
