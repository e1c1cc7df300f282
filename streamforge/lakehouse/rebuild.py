"""Rebuild: a table made anew from everything that its source still holds, up to a barrier, in one table snapshot.

It is a replay over all of it: new files first, then one overwrite on `main`, so readers see the old table or the new
one. The table's uuid and properties stay, and with them the writer's positions; the writer goes on beside it. Rows
whose source records nobody has any more (an earlier topic, a gap of the raw table) are left as they are. A table that
is already what its source gives gets no table snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator

from streamforge.contract_model import Contracts
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.barrier import BarrierState
from streamforge.lakehouse.kafka_reader import log_ranges
from streamforge.lakehouse.pipeline_gaps import gaps_of_table, read_ledger
from streamforge.lakehouse.raw_table import has_raw_table
from streamforge.lakehouse.remake import MakeRemake
from streamforge.lakehouse.replay import WAIT_S, ReplayReport, preview, replay
from streamforge.lakehouse.replay_parts import ByTopicPartition
from streamforge.lakehouse.replay_plan import Plan, merged_ranges
from streamforge.lakehouse.replay_target import Progress, Target, open_target, silent
from streamforge.offsets import OffsetRange, without
from streamforge.settings import Settings


def rebuild(
    settings: Settings,
    contracts: Contracts,
    table_name: str,
    *,
    recompute: MakeRemake | None = None,
    wait_s: float = WAIT_S,
    progress: Progress = silent,
) -> ReplayReport:
    """Make a table anew from all that its source holds now, in one table snapshot.

    Args:
        settings: which cluster and catalog.
        contracts: all of them.
        table_name: table name or contract id.
        recompute: makes the re-run instead of the one in `remake.RECIPES`.
        wait_s: longest wait until the live path has landed all of it, seconds.
        progress: hears how far it is.

    Raises:
        StreamForgeError: as for `replay`.
    """
    ranges = _ranges(settings, contracts, table_name)
    return replay(
        settings,
        contracts,
        table_name,
        ranges,
        recompute=recompute,
        engine=ByTopicPartition(),
        wait_s=wait_s,
        progress=progress,
    )


def preview_rebuild(
    settings: Settings, contracts: Contracts, table_name: str, *, progress: Progress = silent
) -> tuple[Plan, BarrierState]:
    """Return what a rebuild would do now, and how far its barrier is; change nothing.

    Raises:
        StreamForgeError: as for `replay`, without the commit.
    """
    ranges = _ranges(settings, contracts, table_name)
    return preview(settings, contracts, table_name, ranges, engine=ByTopicPartition(), progress=progress)


def everything(target: Target) -> tuple[OffsetRange, ...]:
    """Return all that the source topic has had, where Kafka or the raw table still has it.

    Raises:
        CommitError: the ledger of gaps cannot be read.
        RetryableSourceError: the broker does not answer.
    """
    logs = log_ranges(target.settings, [target.source.topic])
    two_sources = has_raw_table(target.lineage)
    whole = [
        OffsetRange(each.topic, each.partition, 0 if two_sources else log.log_start, log.stable_end)
        for each, log in logs.items()
    ]
    return merged_ranges(without(whole, _raw_gaps(target)))


def _raw_gaps(target: Target) -> Iterator[OffsetRange]:
    """Yield what the raw table never had; Kafka does not have it either."""
    if target.ledger is None or not has_raw_table(target.lineage):
        return
    source = target.source
    for gap in gaps_of_table(read_ledger(target.settings, target.ledger), target.settings, target.lineage.source):
        if gap.topic_id == source.topic_id:
            yield OffsetRange(source.topic, gap.source_partition, gap.start_offset, gap.end_offset)


def _ranges(settings: Settings, contracts: Contracts, table_name: str) -> tuple[OffsetRange, ...]:
    target = open_target(settings, contracts, table_name)
    ranges = everything(target)
    if not ranges:
        msg = f"nothing to rebuild {table_name} from: {target.source.topic} holds no record"
        raise ConfigurationError(msg)
    return ranges
