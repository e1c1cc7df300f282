"""Replay from the UI: make the rows of a source range again and replace exactly those, beside the live writer.

The job `replay` takes offsets, times or partition keys in its launchpad and starts as a dry run over the last hour;
`replay_hours` and `replay_days` take Dagster's partitions, so that a backfill covers many. All call the function
below `streamforge replay`. A second replay of a range changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import dagster as dg
from pydantic import Field

from assets.catalogue import PLATFORM_RESOURCE, platform_of
from assets.failures import clear_failures
from orchestration.tables import HOURLY
from streamforge.contracts import Contracts
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.raw_table import parts_from_table
from streamforge.lakehouse.replay import WAIT_S, preview, replay
from streamforge.lakehouse.replay_plan import merged_ranges, parse_offsets
from streamforge.lakehouse.replay_ranges import (
    parse_time,
    ranges_by_event_time,
    ranges_by_produce_time,
    ranges_of_log,
)
from streamforge.lakehouse.replay_target import Progress, Target, open_target
from streamforge.offsets import OffsetRange, total_records
from streamforge.spark.replay import EngineChoice, choose_engine

DAILY = dg.DailyPartitionsDefinition(start_date=HOURLY.start.strftime("%Y-%m-%d"), timezone="UTC", end_offset=1)
"""Days of event time, today included."""

TABLE_TAG = "streamforge/table"
"""Tag of a run or backfill that names another table than the configuration."""

_KEY_FORMS = {"%Y-%m-%d": timedelta(days=1), HOURLY.fmt: timedelta(hours=1)}
_Window = tuple[datetime, datetime]


class TimeKind(StrEnum):
    """Which time is meant: the table's own, or when Kafka was given the record."""

    event = "event"
    produce = "produce"


class Asked(dg.Config):
    """What every replay is asked for."""

    table: str = Field(
        default="trades",
        description="Table whose rows are made again: trades, bars, market_gaps, raw_trades or raw_depth.",
    )
    dry_run: bool = Field(default=True, description="Only say what would change.")
    time: TimeKind = Field(
        default=TimeKind.event, description="event: the table's own time; produce: when Kafka was given the record."
    )
    engine: EngineChoice = Field(
        default=EngineChoice.AUTO, description="Where rows are made again; AUTO: in Spark from 5 million offsets on."
    )
    wait_s: float = Field(
        default=WAIT_S,
        ge=0,
        description="Longest wait until the live path has landed the range, seconds; not in a dry run.",
    )


class AskedRanges(Asked):
    """Which source ranges; where none of the four is given, the last minutes are meant."""

    last_minutes: float = Field(
        default=60.0, gt=0, description="This many minutes until now, where nothing else is asked."
    )
    offsets: list[str] = Field(
        default=[],
        description="PARTITION:START-END, END excluded, for instance 3:1000-2000; of the topic of the rows' source.",
    )
    from_time: str = Field(default="", description="Start of a window, ISO 8601 with offset: 2026-11-24T06:00:00Z.")
    to_time: str = Field(default="", description="End of the window, excluded.")
    partition_keys: list[str] = Field(default=[], description="Days or hours (UTC): 2026-11-24 or 2026-11-24-06:00.")
    everything: bool = Field(default=False, description="All that Kafka holds of the source topic.")


class AskedPartition(Asked):
    """What a replay of partitions is asked for; it changes nothing that is equal already."""

    dry_run: bool = Field(default=False, description="Only say what would change.")


@dataclass(frozen=True, slots=True)
class Wish:
    """What finds the ranges, and whether finding none is an answer (a quiet hour) or a mistake."""

    find: Callable[[Target], Sequence[OffsetRange]]
    may_be_empty: bool


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return the replay jobs."""
    del contracts
    return dg.Definitions(
        jobs=[
            replay_job,
            _partitioned("replay_hours", HOURLY, "Replay hours of event time; a backfill covers many."),
            _partitioned("replay_days", DAILY, "Replay days of event time; a backfill covers many."),
        ]
    )


@dg.op(name="replay_ranges", required_resource_keys={PLATFORM_RESOURCE})
def replay_ranges(context: dg.OpExecutionContext, config: AskedRanges) -> None:
    """Make the rows of source ranges again and replace those that differ, in one table snapshot."""
    with clear_failures():
        run_replay(context, config, wish_of(config, datetime.now(UTC)))


@dg.op(name="replay_partition", required_resource_keys={PLATFORM_RESOURCE})
def replay_partition(context: dg.OpExecutionContext, config: AskedPartition) -> None:
    """Make the rows of one partition's time again and replace those that differ, in one table snapshot."""
    window = context.partition_time_window
    with clear_failures():
        run_replay(context, config, Wish(_in_windows(config.time, [(window.start, window.end)]), may_be_empty=True))


@dg.job(
    name="replay",
    executor_def=dg.in_process_executor,
    config=dg.RunConfig(ops={replay_ranges.name: AskedRanges()}),
    description=__doc__,
)
def replay_job() -> None:
    """Replay what the launchpad asks for."""
    replay_ranges()


def _partitioned(name: str, partitions: dg.TimeWindowPartitionsDefinition, text: str) -> dg.JobDefinition:
    @dg.job(
        name=name,
        executor_def=dg.in_process_executor,
        partitions_def=partitions,
        config=dg.RunConfig(ops={replay_partition.name: AskedPartition()}),
        description=f"{text} Of the table `trades`, or of the one that the tag `{TABLE_TAG}` names.",
    )
    def job() -> None:
        replay_partition()

    return job


def wish_of(config: AskedRanges, now: datetime) -> Wish:
    """Return what the configuration asks for.

    Raises:
        ConfigurationError: it asks for more than one, or what it asks for cannot be read.
    """
    has_window = bool(config.from_time or config.to_time)
    asked = [bool(config.offsets), has_window, bool(config.partition_keys), config.everything]
    if sum(asked) > 1:
        msg = "ask for one of: offsets, from_time with to_time, partition_keys, everything"
        raise ConfigurationError(msg)
    if config.offsets:
        texts = list(config.offsets)
        parse_offsets(texts, "")
        return Wish(lambda target: parse_offsets(texts, target.source.topic), may_be_empty=False)
    if config.everything:
        return Wish(ranges_of_log, may_be_empty=True)
    if config.partition_keys:
        windows = [window_of(key) for key in config.partition_keys]
    elif has_window:
        windows = [_window(config.from_time, config.to_time)]
    else:
        windows = [(now - timedelta(minutes=config.last_minutes), now)]
    return Wish(_in_windows(config.time, windows), may_be_empty=True)


def window_of(key: str) -> _Window:
    """Return the time that a daily or hourly partition key stands for.

    Raises:
        ConfigurationError: it is neither.
    """
    for form, length in _KEY_FORMS.items():
        try:
            start = datetime.strptime(key, form).replace(tzinfo=UTC)
        except ValueError:
            continue
        return start, start + length
    msg = f"a partition key is a day or an hour in UTC, 2026-11-24 or 2026-11-24-06:00, found {key!r}"
    raise ConfigurationError(msg)


def run_replay(context: dg.OpExecutionContext, config: Asked, wish: Wish) -> None:
    """Find the ranges, replay or preview them, and put plan and report into the run's metadata.

    Raises:
        StreamForgeError: as for `streamforge.lakehouse.replay.replay`.
    """
    settings, contracts = platform_of(context)
    table = context.run.tags.get(TABLE_TAG, config.table)
    target = open_target(settings, contracts, table)
    ranges = tuple(wish.find(target))
    if not ranges and wish.may_be_empty:
        context.log.info("no record of %s is meant: nothing to replay", target.source.topic)
        context.add_output_metadata({"table": table, "source_records": 0, "changes": False, "committed": False})
        return
    hear = _progress(context)
    engine = choose_engine(config.engine, settings, ranges, from_table=parts_from_table(target, ranges))
    if config.dry_run:
        plan, barrier = preview(settings, contracts, table, ranges, engine=engine, progress=hear)
        result = plan.as_dict() | {"barrier": barrier.as_dict(), "committed": False, "engine": engine.name}
    else:
        report = replay(settings, contracts, table, ranges, engine=engine, wait_s=config.wait_s, progress=hear)
        result = report.as_dict()
    context.log.info(_sentence(result, dry_run=config.dry_run))
    context.add_output_metadata(_metadata(result, ranges, dry_run=config.dry_run))


def _in_windows(kind: TimeKind, windows: Sequence[_Window]) -> Callable[[Target], Sequence[OffsetRange]]:
    find = ranges_by_event_time if kind is TimeKind.event else ranges_by_produce_time

    def find_all(target: Target) -> Sequence[OffsetRange]:
        return merged_ranges(each for start, end in windows for each in find(target, start, end))

    return find_all


def _window(from_time: str, to_time: str) -> _Window:
    if not (from_time and to_time):
        msg = "a time window needs both from_time and to_time"
        raise ConfigurationError(msg)
    start, end = parse_time(from_time), parse_time(to_time)
    if start >= end:
        msg = f"the window from {from_time} to {to_time} holds nothing: from_time must be before to_time"
        raise ConfigurationError(msg)
    return start, end


def _progress(context: dg.OpExecutionContext) -> Progress:
    """Log each stage when it begins: the run's log is no place for a progress bar."""
    begun: set[str] = set()

    def hear(stage: str, _done: int, total: int) -> None:
        if stage not in begun:
            begun.add(stage)
            context.log.info("%s: %s records", stage, f"{total:,}")

    return hear


def _sentence(result: dict[str, Any], *, dry_run: bool) -> str:
    name = result["table"]
    if dry_run:
        return f"{name}: a replay would {'replace rows' if result['changes'] else 'change nothing'}"
    if not result["committed"]:
        return f"{name}: every row is already equal, nothing was changed"
    return f"{name}: replaced in table snapshot {result['committed_snapshot_id']} (commit {result['commit_id']})"


def _metadata(result: dict[str, Any], ranges: Sequence[OffsetRange], *, dry_run: bool) -> dict[str, Any]:
    """Return figures that the UI can draw one by one, and the whole report."""
    shown = ("table", "rows_now", "rows_after", "rows_equal", "rows_changed", "rows_added", "rows_gone", "engine")
    return {
        **{name: result[name] for name in (*shown, "changes", "committed", "hash_now", "hash_after")},
        "dry_run": dry_run,
        "source_records": total_records(ranges),
        "barrier_reached": result["barrier"]["reached"],
        "report": dg.MetadataValue.json(result),
    }
