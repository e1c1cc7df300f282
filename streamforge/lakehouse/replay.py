"""Replay: re-run source ranges and replace exactly the rows that came from them, beside the live writer.

    barrier    everything of the ranges is landed (`barrier.py`)
    plan       the ranges' rows as they are, and as the re-run makes them; where they are equal, that is all
    write      new data files: the re-made rows, and the other rows of the files that are replaced, as they are
    commit     one table snapshot removes the replaced files and adds the new ones

The commit is compared and set like the writer's, and leaves the writer's positions alone. When another commit
was faster only manifests are written again. It is planned again, from the barrier on, when a file to be replaced
is gone, or when another replay came between (a replay counts itself in a table property that each compares: two
replays of a range without rows remove no common file, and would both add theirs), or when a commit brought a
trade that the plan adds (the live parser, which lacked it, took the venue's repetition). `streamforge reconcile`,
which sets positions back, counts as a replay.

Memory: one data file, one list of source records, the rows of one new file (`FILE_ROWS`, `FILE_BYTES`), and
60 bytes for each row of the ranges, and the ids of rows that are added. The source is read twice, to plan and to write.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from streamforge import faults
from streamforge.contract_model import Contracts
from streamforge.errors import CommitConflictError, DataQualityError
from streamforge.lakehouse import commit
from streamforge.lakehouse.barrier import BarrierState
from streamforge.lakehouse.protocol import PREFIX, encode_raw_topics
from streamforge.lakehouse.remake import MakeRemake
from streamforge.lakehouse.replay_plan import Plan
from streamforge.lakehouse.replay_run import IN_PROCESS, REPLAY_EPOCH_KEY, Engine, replay_epoch
from streamforge.lakehouse.replay_target import Progress, Target, files_since, open_target, read_file, silent
from streamforge.market.parsing import TOO_OLD_TO_DEDUPE
from streamforge.offsets import OffsetRange
from streamforge.processes import user_at_host
from streamforge.settings import Settings

REPLAY_STEPS = (
    "replay.landed",
    "replay.planned",
    "replay.data_written",
    "replay.commit_staged",
    "replay.commit_sent",
)
"""Kill points in the order in which a replay passes them; tests kill the process at each."""

REPLAYED_RANGES_KEY = f"{PREFIX}replayed-ranges"
KIND = "replay"
WAIT_S = 120.0
PLANS_MAX = 10


class StalePlanError(CommitConflictError):
    """The table is no longer what the plan was made on: plan again."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay did.

    Args:
        plan: the last plan that was made.
        barrier: how the live path stood when it was passed.
        committed: the commit that landed; None: the rows were equal already, and nothing was written.
        commit_id: ours; the re-made rows carry it. Empty without a commit.
        files_added: data files that the commit brought.
        plans: plans that were made; more than one: the table changed under the first.
        wall_s: seconds from the start to the end, the wait for the barrier included.
        engine: where the rows were made again.
    """

    plan: Plan
    barrier: BarrierState
    committed: commit.Committed | None
    commit_id: str
    files_added: int
    plans: int
    wall_s: float
    engine: str = IN_PROCESS.name

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        landed = self.committed
        return {
            **self.plan.as_dict(),
            "barrier": self.barrier.as_dict(),
            "committed": landed is not None,
            "committed_snapshot_id": landed.snapshot_id if landed else None,
            "commit_id": self.commit_id,
            "commit_attempts": landed.attempts if landed else 0,
            "files_added": self.files_added,
            "plans": self.plans,
            "wall_s": round(self.wall_s, 3),
            "engine": self.engine,
        }


def preview(
    settings: Settings,
    contracts: Contracts,
    table_name: str,
    ranges: Sequence[OffsetRange],
    *,
    recompute: MakeRemake | None = None,
    engine: Engine = IN_PROCESS,
    progress: Progress = silent,
) -> tuple[Plan, BarrierState]:
    """Return what a replay of `ranges` would do now, and how far its barrier is; change nothing.

    Where the barrier is not reached the plan is provisional: rows under way are missing in it.

    Raises:
        StreamForgeError: as for `replay`, without the commit.
    """
    target = open_target(settings, contracts, table_name, recompute)
    checked = target.checked(ranges)
    state = target.barrier(checked).look()
    return engine.plan(target, target.load(), checked, progress), state


def replay(
    settings: Settings,
    contracts: Contracts,
    table_name: str,
    ranges: Sequence[OffsetRange],
    *,
    recompute: MakeRemake | None = None,
    engine: Engine = IN_PROCESS,
    wait_s: float = WAIT_S,
    progress: Progress = silent,
    monotonic_s: Callable[[], float] = time.monotonic,
) -> ReplayReport:
    """Replace the rows that came from `ranges` by those that the re-run makes, in one table snapshot.

    Args:
        settings: which cluster and catalog.
        contracts: all of them.
        table_name: table name or contract id.
        ranges: of the source topic: the raw topic for `trades`, else the table's own.
        recompute: makes the re-run instead of the one in `remake.RECIPES`.
        engine: where the rows are compared and made again; the barrier and the commit are here in any case.
        wait_s: longest wait for the barrier, seconds.
        progress: hears how far it is.
        monotonic_s: clock for durations, seconds.

    Raises:
        ConfigurationError: no such table, no range, or one that is not of its source topic.
        RetentionGapError: a range starts below the log start.
        PermanentSourceError: a range ends beyond the log, or the source topic is absent.
        RetryableSourceError: the barrier was not reached within `wait_s`, or the broker does not answer.
        DataQualityError: the re-run forgot ids, so that rows which are there would go.
        CommitError: the table cannot be read, or others always changed it first; nothing was changed.
        CommitUnknownError: the commit may have landed; a second replay finds out.
    """
    started_s = monotonic_s()
    target = open_target(settings, contracts, table_name, recompute)
    checked = target.checked(ranges)
    for plans in range(1, PLANS_MAX + 1):
        table, barrier = _landed(target, checked, wait_s, progress)
        faults.step("replay.landed")
        plan = engine.plan(target, table, checked, progress)
        faults.step("replay.planned")
        if not plan.changes:
            return ReplayReport(plan, barrier, None, "", 0, plans, monotonic_s() - started_s, engine.name)
        _check_nothing_forgotten(plan)
        commit_id = uuid.uuid4().hex
        files = engine.write(target, table, plan, commit_id, progress)
        faults.step("replay.data_written")
        progress("commit", 0, 1)
        try:
            committed = commit_plan(target, table, plan, files, commit_id)
        except (commit.FilesGoneError, StalePlanError):
            if plans == PLANS_MAX:
                raise
            continue
        progress("commit", 1, 1)
        wall_s = monotonic_s() - started_s
        return ReplayReport(plan, barrier, committed, commit_id, len(files), plans, wall_s, engine.name)
    raise AssertionError  # pragma: no cover - the loop returns or raises


def commit_plan(
    target: Target, table: Table, plan: Plan, files: Sequence[DataFile], commit_id: str
) -> commit.Committed:
    """Commit the replacement that `plan` describes, as one table snapshot.

    Raises:
        FilesGoneError: a file to be replaced is gone; nothing landed.
        StalePlanError: another replay, or a row that the plan adds, came between; nothing landed.
        HistoryRolledBackError: the table was moved back by a person.
        CommitUnknownError: the outcome could not be found out.
    """
    landed = _LandedSince(target, plan)

    def decide(view: commit.TableView) -> Mapping[str, str]:
        commit.check_not_rolled_back(view)
        found = (replay_epoch(view.table), target.epoch_in(view.state))
        if found != (plan.replay_epoch, plan.epoch):
            msg = (
                f"table {plan.table}: planned on replay and source epoch {plan.replay_epoch, plan.epoch}, found {found}"
            )
            raise StalePlanError(msg)
        landed.check(view.table)
        properties = {REPLAY_EPOCH_KEY: str(plan.replay_epoch + 1)}
        if not target.lineage.is_direct:
            properties |= encode_raw_topics({target.source.topic_id: plan.epoch})
        return properties

    return commit.commit_snapshot(
        table,
        decide=decide,
        added=files,
        removed=[each.task.file for each in plan.touched],
        summary=_summary(plan, commit_id),
        steps="replay.commit",
    )


class _LandedSince:
    """Looks in what landed since the plan for rows that the plan adds; every table snapshot is read once."""

    def __init__(self, target: Target, plan: Plan) -> None:
        self._columns = target.remake.history_columns
        self._plan = plan
        self._seen_snapshot_id = plan.snapshot_id

    def check(self, table: Table) -> None:
        """Raise `StalePlanError` when one is there, or when what is there cannot be known any more."""
        added = self._plan.added
        if added is None or not added.num_rows:
            return
        tasks = files_since(table, self._seen_snapshot_id)
        if tasks is None:
            msg = f"table {self._plan.table}: table snapshot {self._seen_snapshot_id}, planned on, is gone"
            raise StalePlanError(msg)
        text = pa.schema([(name, pa.large_string()) for name in self._columns])
        for task in tasks:
            rows = read_file(table, task, self._columns, AlwaysTrue()).select(self._columns).cast(text)
            again = rows.join(added.cast(text), keys=list(self._columns), join_type="left semi")
            if again.num_rows:
                examples = ", ".join(" ".join(map(str, row.values())) for row in again.slice(0, 3).to_pylist())
                msg = (
                    f"table {self._plan.table}: {again.num_rows} rows that the replay adds landed meanwhile from other "
                    f"records, such as {examples}. Nothing was changed; replay again"
                )
                raise StalePlanError(msg)
        self._seen_snapshot_id = table.metadata.current_snapshot_id


def _check_nothing_forgotten(plan: Plan) -> None:
    """Refuse a plan that takes rows away because the re-run could not tell their ids from duplicates."""
    forgotten = plan.dropped.get(TOO_OLD_TO_DEDUPE, 0)
    if forgotten and plan.counts.gone:
        msg = (
            f"{plan.table}: the re-run refused {forgotten} trades as {TOO_OLD_TO_DEDUPE}, and {plan.counts.gone} rows "
            "that are there would go. Nothing was changed; a re-run must remember every id of the table"
        )
        raise DataQualityError(msg)


def _landed(
    target: Target, ranges: Sequence[OffsetRange], wait_s: float, progress: Progress
) -> tuple[Table, BarrierState]:
    """Wait at the barrier and return the table behind it.

    Positions only grow, except in `streamforge reconcile`, which raises the replay epoch: then the wait is repeated.
    """
    while True:
        before = replay_epoch(target.load())
        state = target.barrier(ranges).wait(wait_s, on_look=lambda state: _tell(state, progress))
        table = target.load()
        if replay_epoch(table) == before:
            return table, state


def _summary(plan: Plan, commit_id: str) -> dict[str, str]:
    ranges: dict[str, list[list[int]]] = {}
    for each in plan.ranges:
        ranges.setdefault(str(each.partition), []).append([each.start, each.end])
    source = {"topic": plan.ranges[0].topic, "epoch": plan.epoch, "ranges": ranges}
    return {
        commit.KIND_KEY: KIND,
        commit.COMMIT_ID_KEY: commit_id,
        commit.OWNER_KEY: user_at_host(),
        REPLAYED_RANGES_KEY: json.dumps(source, separators=(",", ":")),
    }


def _tell(state: BarrierState, progress: Progress) -> None:
    needed = sum(each.needed for each in state.conditions)
    progress("barrier", needed - sum(each.behind for each in state.conditions), needed)
