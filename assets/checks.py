"""The contracts' quality rules as asset checks of the tables, and how fresh each instrument is."""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE, platform_of, table_key
from assets.failures import clear_failures
from streamforge.contracts import Contract, Contracts
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.instrument_freshness import (
    REMEMBERED_NS,
    WATCHED_NS,
    InstrumentFreshness,
    has_freshness,
    instrument_freshness,
)
from streamforge.lakehouse.quality import RuleResult, Severity, check_rules, rules_of

FRESHNESS = "instruments_are_fresh"
NEWEST_HOURS = "newest_hours"

_SEVERITIES = {
    Severity.ERROR: dg.AssetCheckSeverity.ERROR,
    Severity.WARNING: dg.AssetCheckSeverity.WARN,
}
_CONFIG = {
    NEWEST_HOURS: dg.Field(
        dg.Noneable(float),
        default_value=None,
        is_required=False,
        description="Check only rows of so many hours before the table's newest event; null: every row. "
        "Freshness does not depend on it.",
    )
}


def table_checks(contracts: Contracts) -> list[dg.AssetChecksDefinition]:
    """Return the checks of every table, one step for each table so that an absent one hides no other."""
    return [_checks(contract) for contract in contracts.with_table]


def _checks(contract: Contract) -> dg.AssetChecksDefinition:
    asset = table_key(contract)
    # Named again in the step: the contracts of the run are those that count, with their topic prefix.
    specs = [
        dg.AssetCheckSpec(
            name=rule.name,
            asset=asset,
            description=rule.description,
            metadata={"severity": rule.severity.value, "columns": ", ".join(rule.columns)},
        )
        for rule in rules_of(contract)
    ]
    if has_freshness(contract):
        description = (
            f"The newest row of each instrument is at most {contract.freshness_s:g} s old, by event time. Some late: "
            "a warning, their market may be quiet. All late: an error. One that is gone, without a row for a day, is a "
            f"warning that names it, for {REMEMBERED_NS // WATCHED_NS} days: who was delisted is known by then."
        )
        specs.append(dg.AssetCheckSpec(name=FRESHNESS, asset=asset, description=description))

    @dg.multi_asset_check(
        name=f"check_{asset.path[-1]}",
        specs=specs,
        can_subset=True,
        required_resource_keys={PLATFORM_RESOURCE},
        config_schema=_CONFIG,
        description=f"Check the table of contract {contract.id} against its rules.",
    )
    def check(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        settings, known = platform_of(context.op_execution_context)
        wanted = {key.name for key in context.selected_asset_check_keys}
        newest_h = context.op_execution_context.op_config[NEWEST_HOURS]
        with clear_failures():
            current = known[contract.id]
            table = load_table(open_catalog(settings), settings, current)
            rules = [rule for rule in rules_of(current) if rule.name in wanted]
            for result in check_rules(table, current, rules, newest_h=newest_h):
                yield _result(asset, result)
            if FRESHNESS in wanted:
                yield _freshness(asset, instrument_freshness(table, current, time.time_ns()))

    return check


def _result(asset: dg.AssetKey, result: RuleResult) -> dg.AssetCheckResult:
    rule = result.rule
    metadata: dict[str, Any] = {
        "found": result.found,
        "expected": f"{rule.operator} {rule.expected}",
        "rows": result.rows,
    }
    if result.examples:
        metadata["examples"] = dg.MetadataValue.json([_plain(row) for row in result.examples])
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=rule.name,
        passed=result.passed,
        severity=_SEVERITIES[rule.severity],
        description=None if result.passed else f"{rule.description} Found {result.found} in {result.rows} rows.",
        metadata=metadata,
    )


def _freshness(asset: dg.AssetKey, found: InstrumentFreshness) -> dg.AssetCheckResult:
    late = found.late
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=FRESHNESS,
        passed=not late and not found.gone_s and bool(found.ages_s),
        severity=dg.AssetCheckSeverity.ERROR if found.all_late else dg.AssetCheckSeverity.WARN,
        description=_unfresh(found),
        metadata={
            "target_s": found.target_s,
            "instruments": len(found.ages_s),
            "instruments_late": len(late),
            "instruments_gone": len(found.gone_s),
            "oldest_s": max(found.ages_s.values(), default=None),
            "late_s": dg.MetadataValue.json(late),
            "gone_s": dg.MetadataValue.json(dict(found.gone_s)),
        },
    )


def _unfresh(found: InstrumentFreshness) -> str | None:
    if not found.ages_s:
        return "The table has no rows."
    if not found.gone_s:
        return None
    named = ", ".join(f"{name} ({age_s / 3_600:.0f} h)" for name, age_s in found.gone_s.items())
    return (
        f"No row of these for a day, though others have some: {named}. Are they delisted? Else look whether the loader "
        "still captures them (`streamforge status`) and whether they are dead letters (`streamforge dlq list`)."
    )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example as JSON can hold it: decimals and times as text, bytes as what Python shows."""
    plain: dict[str, Any] = json.loads(json.dumps(row, default=str))
    return plain
