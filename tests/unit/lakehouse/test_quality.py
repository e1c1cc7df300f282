"""Quality rules of contracts: each of them passes on good rows and fails on a planted bad one."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.table import Table

from streamforge.contract_model import Contract, QualityRule
from streamforge.contracts import load_contracts
from streamforge.errors import CommitError, ConfigurationError
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.lakehouse.instrument_freshness import has_freshness, instrument_freshness
from streamforge.lakehouse.quality import IN_RANGE, REQUIRED, RuleResult, Severity, check_rules, rules_of
from streamforge.settings import Settings
from tests.bars_support import trade_row
from tests.pipeline_support import START_MS, make_trade

BTC, ETH = "BTC-USDT.SIM", "ETH-USDT.SIM"
CONTRACTS = load_contracts(Settings(_env_file=None).contracts_dir)  # type: ignore[call-arg]
TRADES = CONTRACTS["trades"]
HOUR_MS = 3_600_000


@pytest.fixture
def table(tmp_path: Path) -> Table:
    settings = Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]
    return ensure_table(open_catalog(settings), settings, TRADES)


def row(number: int, *, instrument: str = BTC, ms: int = 0, **other: Any) -> dict[str, Any]:
    """Return a good row of `trades`, but for what `other` says."""
    return trade_row(make_trade(instrument, number, START_MS + ms), (0, number)) | other


def land(table: Table, *rows: dict[str, Any], contract: Contract = TRADES) -> None:
    table.append(pa.Table.from_pylist(list(rows), schema=contract.arrow_schema))


def results(table: Table, *names: str, contract: Contract = TRADES, newest_h: float | None = None) -> list[RuleResult]:
    rules = [rule for rule in rules_of(contract) if not names or rule.name in names]
    assert rules
    return list(check_rules(table, contract, rules, newest_h=newest_h))


def with_rule(**overrides: Any) -> Contract:
    rule = QualityRule(
        id="mine",
        field=None,
        metric=None,
        query=None,
        arguments={},
        operator="mustBe",
        expected=0,
        severity="error",
        description="",
    )
    return dataclasses.replace(TRADES, quality=(dataclasses.replace(rule, **overrides),))


def test_every_rule_of_every_contract_runs_on_an_empty_table_and_passes(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]
    catalog = open_catalog(settings)
    for contract in CONTRACTS.with_table:
        found = list(check_rules(ensure_table(catalog, settings, contract), contract, rules_of(contract)))
        assert {result.rule.name for result in found} >= {rule.id.replace("-", "_") for rule in contract.quality}
        assert REQUIRED in {result.rule.name for result in found}
        assert all(result.passed and result.rows == 0 for result in found), contract.id


def test_good_rows_pass_every_rule(table: Table) -> None:
    land(table, *(row(number) for number in range(50)))
    land(
        table,
        *(
            row(number, instrument=ETH) | {"raw_offset": 100 + number, "source_offset": 100 + number}
            for number in range(50)
        ),
    )
    found = results(table)
    assert [result.rule.name for result in found if not result.passed] == []
    assert {result.rows for result in found} == {100}


@pytest.mark.parametrize(
    ("bad", "broken"),
    [
        ({"price": Decimal(0)}, IN_RANGE),
        ({"size": Decimal(-1)}, IN_RANGE),
        ({"aggressor_side": "NONE"}, IN_RANGE),
        ({"raw_index": -1}, IN_RANGE),
        ({"ts_receive_ns": 1}, "event_not_after_receipt"),
        ({"trade_id": "3"}, "one_row_per_trade"),
        ({"raw_offset": 3}, "one_row_per_raw_event"),
        ({"source_offset": 3}, "one_row_per_source"),
    ],
)
def test_planted_bad_row_fails_its_rule_and_no_other(table: Table, bad: dict[str, Any], broken: str) -> None:
    land(table, *(row(number) for number in range(10)))
    land(table, row(10) | bad)
    failed = [result for result in results(table) if not result.passed]
    assert [(result.rule.name, result.found, result.rows) for result in failed] == [(broken, 1, 11)]
    [example] = failed[0].examples
    shown = {name: value for name, value in bad.items() if name in example}
    assert shown
    assert {name: example[name] for name in shown} == shown
    if broken not in ("one_row_per_raw_event", "one_row_per_source"):
        assert example["trade_id"] == bad.get("trade_id", "10"), "the primary key says which row it is"


def test_null_in_a_required_field_fails(table: Table) -> None:
    land(table, row(1), row(2))
    [task] = table.scan().plan_files()
    path = task.file.file_path.removeprefix("file://")
    # PyIceberg writes no such file: here it is as a careless program leaves it, where every field may be null.
    good = pq.read_table(path)
    optional = pa.schema([item.with_nullable(nullable=True) for item in good.schema])
    rows = [each | {"instrument": None} if each["trade_id"] == "2" else each for each in good.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=optional), path)
    [result] = results(table, REQUIRED)
    assert (result.passed, result.found, result.rows) == (False, 1, 2)
    assert result.examples[0]["trade_id"] == "2"
    assert result.examples[0]["instrument"] is None


def test_rows_that_no_typed_record_carried_are_no_duplicates_of_each_other(table: Table) -> None:
    none = {"source_epoch": None, "source_partition": None, "source_offset": None, "source_index": None}
    land(table, row(1) | none, row(2) | none)
    assert all(result.passed for result in results(table))


def test_three_rows_of_one_key_are_two_too_many_and_the_key_is_shown(table: Table) -> None:
    land(table, *(row(number) | {"trade_id": "7"} for number in range(3)))
    [result] = results(table, "one_row_per_trade")
    assert result.found == 2
    assert result.examples == ({"venue": "SIM", "symbol": "BTCUSDT", "trade_id": "7", "times": 3},)


def test_only_the_newest_hours_are_checked_where_that_is_asked(table: Table) -> None:
    land(table, row(1, price=Decimal(0)), row(2, ms=HOUR_MS), row(3, ms=5 * HOUR_MS))
    [whole], [newest] = results(table, IN_RANGE), results(table, IN_RANGE, newest_h=4.5)
    assert (whole.passed, whole.rows) == (False, 3)
    assert (newest.passed, newest.rows) == (True, 2)


def test_severity_and_operator_are_the_contracts(table: Table) -> None:
    land(table, row(1))
    severities = {rule.name: rule.severity for rule in rules_of(TRADES)}
    assert severities["one_row_per_trade"] is Severity.ERROR
    assert severities["event_not_after_receipt"] is Severity.WARNING
    for operator, expected, passes in (("mustBeGreaterThan", 0, True), ("mustBeBetween", [2, 3], False)):
        contract = with_rule(metric="rowCount", operator=operator, expected=expected)
        assert [result.passed for result in results(table, "mine", contract=contract)] == [passes]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"metric": "freshness", "arguments": {"properties": ["price"]}}, "duplicateValues, nullValues, rowCount"),
        ({"metric": "duplicateValues", "arguments": {"properties": ["no_such"]}}, "no_such"),
        ({"metric": "duplicateValues"}, "arguments.properties"),
        ({"metric": "rowCount", "operator": "mustBeLike"}, "mustBeLike"),
    ],
)
def test_rule_that_cannot_be_measured_is_refused_with_its_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"quality rule mine.*{said}"):
        rules_of(with_rule(**wrong))


def test_sql_that_cannot_run_names_contract_and_rule(table: Table) -> None:
    land(table, row(1))
    with pytest.raises(ConfigurationError, match=r"contract trades .*quality rule mine.*cannot be run"):
        results(table, "mine", contract=with_rule(query="SELECT COUNT(*) FROM {table} WHERE nonsense > 1"))


def test_file_that_is_gone_is_an_error_and_no_result(table: Table) -> None:
    land(table, row(1))
    [task] = table.scan().plan_files()
    Path(task.file.file_path.removeprefix("file://")).unlink()
    with pytest.raises(CommitError, match="cannot be read"):
        results(table, "one_row_per_trade")


def test_freshness_is_by_event_time_of_each_instrument(table: Table) -> None:
    land(table, row(1), row(2, ms=8_000), row(3, instrument=ETH, ms=1_000))
    # Landed later, but of an older event: it makes nothing fresher.
    land(table, row(4, instrument=ETH, ms=500))
    found = instrument_freshness(table, TRADES, (START_MS + 12_000) * 10**6)
    assert found.ages_s == {BTC: 4.0, ETH: 11.0}
    assert (found.late, found.all_late) == ({ETH: 11.0}, False)
    assert instrument_freshness(table, TRADES, (START_MS + 60_000) * 10**6).all_late


def test_freshness_names_instruments_that_are_gone_for_a_week_and_then_forgets_them(table: Table) -> None:
    last_ms = 8 * 24 * HOUR_MS
    gone = {"DAY-USDT.SIM": 24 * HOUR_MS + 1, "WEEK-USDT.SIM": 7 * 24 * HOUR_MS}
    others = {ETH: 24 * HOUR_MS, "OLD-USDT.SIM": 7 * 24 * HOUR_MS + 1}
    back = gone | others | {BTC: 0}
    # A file each, so that a file without a row of the last day is looked at too.
    for number, (name, ms) in enumerate(back.items()):
        land(table, row(number, instrument=name, ms=last_ms - ms))
    found = instrument_freshness(table, TRADES, (START_MS + last_ms + 1_000) * 10**6)
    assert set(found.ages_s) == {BTC, ETH}
    assert list(found.gone_s.items()) == [(name, ms / 1_000 + 1) for name, ms in gone.items()]
    assert (set(found.late), found.all_late) == ({ETH}, False), "who is gone is not late too"


def test_freshness_does_not_judge_ledgers() -> None:
    judged = {contract.id for contract in CONTRACTS.with_table if has_freshness(contract)}
    assert {"trades", "bars", "raw-trades"} <= judged
    assert "market-gaps" not in judged


def test_freshness_of_an_empty_table_is_nothing(table: Table) -> None:
    found = instrument_freshness(table, TRADES, 0)
    assert (found.ages_s, found.all_late) == ({}, True)
