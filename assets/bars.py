"""Bars of past hours, built again from the table of trades and mended where they differ.

The live bars come from the bars processor; this asset is the batch path beside it, with the same pure function. A
partition is one hour of event time (UTC). Where the table `bars` already says the same, by content hash, nothing is
committed. What is missing or different lands as revisions of a higher replay epoch, in one table snapshot, while the
writer goes on. Bars that a late trade may still correct are left to the stream and counted as still open.

Choose hours in the launchpad or start a backfill over many: a run takes up to a day of them. Hours of trades that a
replay has changed are built again by themselves: the asset `replayed_trades` marks them.
"""

import warnings
from typing import Any

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE, platform_of, table_key
from assets.failures import clear_failures
from streamforge.contracts import Contracts
from streamforge.lakehouse.bars_backfill import BackfillReport, Window, backfill_bars

BACKFILLS = "backfills"
BARS_BACKFILL_KEY = dg.AssetKey([BACKFILLS, "bars"])
REPLAYED_KEY = dg.AssetKey([BACKFILLS, "replayed_trades"])
HOURS_A_RUN = 24

# Only a request forgets a mark: the end of a run that began before the replay does not, so that an hour which is marked
# while its bars are being built is built once more. An hour whose run failed is tried again later.
_MARKED = dg.AutomationCondition.any_deps_updated().allow(dg.AssetSelection.assets(REPLAYED_KEY))
_FORGOTTEN = dg.AutomationCondition.newly_requested() | dg.AutomationCondition.initial_evaluation()
_TO_REPEAT = dg.AutomationCondition.execution_failed() & dg.AutomationCondition.cron_tick_passed("*/30 * * * *")
_FOLLOW_REPLAYS = ((_MARKED.since(_FORGOTTEN) | _TO_REPEAT) & ~dg.AutomationCondition.in_progress()).with_label(
    "a replay changed this hour's trades, or its last run failed"
)
_SHOWN_COUNTS = ("built", "equal", "missing", "different", "still_open", "without_trades")


def replayed_trades(contracts: Contracts, partitions: dg.TimeWindowPartitionsDefinition) -> dg.AssetSpec:
    """Return the external asset whose partitions are the hours that replays of `trades` changed."""
    return dg.AssetSpec(
        REPLAYED_KEY,
        description="Hours of event time in which a replay, a redrive or a rebuild has changed rows of `trades`, from "
        "this UI or from the command line. A sensor reads them from the table's snapshots; the bars of just those "
        "hours are then built again.",
        deps=[table_key(contracts["trades"])],
        partitions_def=partitions,
        group_name=BACKFILLS,
        owners=[f"team:{contracts['trades'].owner}"],
        kinds={"iceberg"},
    )


def bars_backfill(contracts: Contracts, partitions: dg.TimeWindowPartitionsDefinition) -> dg.AssetsDefinition:
    """Return the asset of the mended bars, sliced by `partitions` of event time."""
    bars, trades = contracts["bars"], contracts["trades"]

    def bars_backfill(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        settings, known = platform_of(context.op_execution_context)
        with clear_failures():
            window = Window.of(*context.partition_time_window)
            report = backfill_bars(settings, known, window)
        _tell(context, report)
        return dg.MaterializeResult(metadata=_metadata(report))

    with warnings.catch_warnings():
        # The backfill policy is beta in Dagster 1.13, which is pinned below 1.14; a test runs it for real.
        warnings.simplefilter("ignore", dg.BetaWarning)
        decorate = dg.asset(
            key=BARS_BACKFILL_KEY,
            description=__doc__,
            deps=[table_key(trades), table_key(bars), REPLAYED_KEY],
            automation_condition=_FOLLOW_REPLAYS,
            partitions_def=partitions,
            backfill_policy=dg.BackfillPolicy.multi_run(HOURS_A_RUN),
            retry_policy=dg.RetryPolicy(max_retries=2, delay=5),
            required_resource_keys={PLATFORM_RESOURCE},
            group_name=BACKFILLS,
            owners=[f"team:{bars.owner}"],
            kinds={"python", "iceberg"},
        )
    return decorate(bars_backfill)


def _tell(context: dg.AssetExecutionContext, report: BackfillReport) -> None:
    plan = report.plan
    what = f"landed {plan.rows.num_rows} bars" if report.committed else "every bar is already equal"
    context.log.info("%s: %s", plan.window, what)
    if plan.still_open:
        context.log.warning("%s: %d bars may still change and are left to the stream", plan.window, plan.still_open)
    if plan.without_trades:
        context.log.warning("%s: %d bars have no trade in the table trades", plan.window, plan.without_trades)
    if plan.refused:
        context.log.warning("%s: %d trades do not fit into their bars", plan.window, plan.refused)


def _metadata(report: BackfillReport) -> dict[str, Any]:
    plain = report.as_dict()
    return {
        **{f"bars_{name}": plain[f"bars_{name}"] for name in _SHOWN_COUNTS},
        "committed": report.committed is not None,
        "table_snapshot": str(plain["committed_snapshot_id"] or "none"),
        "trades_table_snapshot": str(plain["trades_snapshot_id"]),
        "content_hash": plain["content_hash_built"],
        "content_hash_before": plain["content_hash_now"],
        "window": str(report.plan.window),
        "wall_s": plain["wall_s"],
    }
