"""What follows a replay: the hours of trades that it changed are marked, and Dagster builds their bars again.

The mark is read from the table's snapshots, so that a replay from the command line or from Spark is followed as one
from the UI is. What is built is the asset's own condition (`assets/bars.py`): declarative automation, no run is asked
for here.
"""

from datetime import UTC, datetime

import dagster as dg

from assets.bars import BARS_BACKFILL_KEY, REPLAYED_KEY, replayed_trades
from assets.catalogue import PLATFORM_RESOURCE
from orchestration.tables import HOURLY
from streamforge.contracts import Contracts
from streamforge.errors import StreamForgeError
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.changed_hours import changed_hours, newest_sequence_number

_SENSOR_INTERVAL_S = 30
_TIME_COLUMN = "ts_event_ns"
_NS_PER_S = 1_000_000_000


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return the marked hours, the sensor that marks them, and the one that has their bars built."""
    return dg.Definitions(
        assets=[replayed_trades(contracts, HOURLY)],
        sensors=[
            hours_that_replays_changed,
            dg.AutomationConditionSensorDefinition(
                "bars_follow_replays",
                target=dg.AssetSelection.assets(BARS_BACKFILL_KEY),
                default_status=dg.DefaultSensorStatus.RUNNING,
                minimum_interval_seconds=_SENSOR_INTERVAL_S,
                description="Has the bars of those hours built again in which a replay has changed trades.",
            ),
        ],
    )


@dg.sensor(
    minimum_interval_seconds=_SENSOR_INTERVAL_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    required_resource_keys={PLATFORM_RESOURCE},
)
def hours_that_replays_changed(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Mark the hours of `trades` that say something else since a replay, a redrive or a rebuild.

    The first look only remembers where the table stands. Without a table or a catalog nothing is known, and the next
    look goes on from where the last one was.
    """
    platform = context.resources.platform
    contract = platform.contracts["trades"]
    try:
        table = load_table(open_catalog(platform.settings), platform.settings, contract)
        if context.cursor is None:
            return dg.SensorResult(
                skip_reason="the first look: replays from now on are followed",
                cursor=str(newest_sequence_number(table)),
            )
        found = changed_hours(table, contract, time_column=_TIME_COLUMN, after=int(context.cursor))
    except StreamForgeError as error:
        return dg.SkipReason(f"nothing is known of the trades: {error}")
    said = f"no replay has changed trades up to sequence number {found.sequence_number}"
    if not found.is_complete:
        said = (
            f"table snapshots after sequence number {context.cursor} have expired: a replay may have been missed. If "
            f"there was one, start a backfill of {BARS_BACKFILL_KEY.to_user_string()} over its hours"
        )
        context.log.warning(said)
    metadata = {"table_snapshots": [str(each) for each in found.replays]}
    hours = [datetime.fromtimestamp(each // _NS_PER_S, UTC) for each in found.hours_ns]
    known = [each for each in hours if each >= HOURLY.start]
    if len(known) < len(hours):
        context.log.warning("hours before %s are no partitions and are left alone", HOURLY.start)
    return dg.SensorResult(
        skip_reason=None if known else said,
        asset_events=[
            dg.AssetMaterialization(REPLAYED_KEY, partition=each.strftime(HOURLY.fmt), metadata=metadata)
            for each in known
        ],
        cursor=str(found.sequence_number),
    )
