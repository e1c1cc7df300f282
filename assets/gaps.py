"""Retention gaps as a check of each table: offsets that Kafka removed before we had them, and nobody has accepted."""

from collections.abc import Iterator, Sequence

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE, platform_of, table_key
from assets.failures import clear_failures
from streamforge.contracts import Contract, Contracts
from streamforge.lakehouse.pipeline_gaps import LEDGER_ID, gaps_of_table, read_gaps
from streamforge.retention_gaps import GapState, PipelineGap, open_gaps

NO_OPEN_GAP = "no_open_retention_gap"

_OF_A_TABLE = "Kafka's retention has removed nothing before this table had it, or a person has accepted the loss."
_OF_ALL = "No table and no processor has a retention gap that nobody has accepted."


def retention_gap_checks(contracts: Contracts) -> dg.AssetChecksDefinition:
    """Return one step that checks every table which a topic feeds, and the ledger for all, processors included."""
    landed = [item for item in contracts.with_table if item.topic is not None]
    specs = [dg.AssetCheckSpec(NO_OPEN_GAP, asset=table_key(item), description=_OF_A_TABLE) for item in landed]
    specs.append(dg.AssetCheckSpec(NO_OPEN_GAP, asset=table_key(contracts[LEDGER_ID]), description=_OF_ALL))

    @dg.multi_asset_check(
        name="check_retention_gaps",
        specs=specs,
        can_subset=True,
        required_resource_keys={PLATFORM_RESOURCE},
        description="Look in the table pipeline_gaps for gaps that nobody has accepted.",
    )
    def check(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        settings, known = platform_of(context.op_execution_context)
        wanted = {key.asset_key for key in context.selected_asset_check_keys}
        with clear_failures():
            gaps = read_gaps(settings, known)
            for contract in (*landed, known[LEDGER_ID]):
                if table_key(contract) in wanted:
                    of_it = gaps if contract.id == LEDGER_ID else gaps_of_table(gaps, settings, known[contract.id])
                    yield _result(contract, of_it)

    return check


def _result(contract: Contract, gaps: Sequence[PipelineGap]) -> dg.AssetCheckResult:
    still_open = open_gaps(gaps)
    said = "\n".join(f"{gap}: {gap.detail}" for gap in still_open)
    return dg.AssetCheckResult(
        asset_key=table_key(contract),
        check_name=NO_OPEN_GAP,
        passed=not still_open,
        severity=dg.AssetCheckSeverity.ERROR,
        description=said or None,
        metadata={
            "open": len(still_open),
            "accepted": sum(gap.state is GapState.ACCEPTED for gap in gaps),
            "gaps": dg.MetadataValue.json([str(gap) for gap in still_open]),
        },
    )
