"""Build the bars of a window of event time again from the table `trades`; land those that the table has wrong.

    build      `bars_of` over the window's trades: the function that the stream's bars are held to
    final      only bars that the stream cannot correct any more: the watermark of their trades, as far as these
               are landed, has passed the bar's end and the allowed lateness. An earlier rebuild would beat the
               stream's own correction, since revisions order by (replay epoch, revision)
    compare    with the latest revision of each bar, by the content hash without the revision's number
    commit     what is missing or different becomes revision 0 of the next replay epoch, in one table snapshot;
               where every bar is equal there is no commit

It reads and writes tables only. The commit is compared and set like that of a replay and leaves the writer's positions
alone. A replay, or another backfill, that landed since the plan makes it plan again. A bar whose trades are not in
the table stays and is counted: tables say nothing of trades that they no longer hold.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import msgspec
import pyarrow as pa
from confluent_kafka import Message
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from streamforge import faults
from streamforge.contract_model import Contract, Contracts
from streamforge.errors import ConfigurationError, DataQualityError
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.content_hash import ContentHash, content_schema, row_hashes
from streamforge.lakehouse.protocol import PREFIX
from streamforge.lakehouse.remake import SentRecord
from streamforge.lakehouse.replay import PLANS_MAX, StalePlanError
from streamforge.lakehouse.replay_plan import SOURCE_COLUMNS
from streamforge.lakehouse.replay_run import REPLAY_EPOCH_KEY, replay_epoch
from streamforge.lakehouse.replay_target import Progress, files_with, read_file, silent, storage_errors
from streamforge.lakehouse.rows import RowDecoder, finish_rows
from streamforge.lakehouse.trades_window import latest_events, trades_between, within
from streamforge.market.bars import INTERVAL_NS, BarRules, bars_of, latest_revision
from streamforge.market.records import Bar
from streamforge.processes import user_at_host
from streamforge.settings import Settings
from streamforge.times import iso_text, to_ns

BACKFILL_STEPS = (
    "backfill.planned",
    "backfill.data_written",
    "backfill.commit_staged",
    "backfill.commit_sent",
)
"""Kill points in the order in which a backfill passes them; tests kill the process at each."""

KIND = "backfill"
WINDOW_KEY = f"{PREFIX}backfilled-window"

_TRADES, _BARS = "trades", "bars"
_KEY = ("instrument", "interval", "ts_start_ns")
_REVISION = ("replay_epoch", "revision")

Key = tuple[str, str, int]
Hash = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Window:
    """Event time `[start_ns, end_ns)`, both on full minutes, so that it holds whole bars only."""

    start_ns: int
    end_ns: int

    @classmethod
    def of(cls, start: datetime, end: datetime) -> Window:
        """Return the window between two times that know their offset from UTC.

        Raises:
            ConfigurationError: it is empty, or an edge would cut a bar.
        """
        window = cls(to_ns(start), to_ns(end))
        if window.start_ns >= window.end_ns:
            msg = f"the window from {start.isoformat()} to {end.isoformat()} holds nothing: its start must be first"
            raise ConfigurationError(msg)
        for name, edge_ns in (("start", window.start_ns), ("end", window.end_ns)):
            if edge_ns % INTERVAL_NS:
                msg = f"the window's {name} cuts a bar: expected a full minute (UTC), found {iso_text(edge_ns)}"
                raise ConfigurationError(msg)
        return window

    def __str__(self) -> str:
        return f"[{iso_text(self.start_ns)}, {iso_text(self.end_ns)})"


@dataclass(frozen=True, slots=True)
class BarsPlan:
    """What the window's bars are, and what they should be.

    Args:
        trades_snapshot_id: table snapshot of `trades` that they were built from.
        replay_epoch: replays and backfills that `bars` counts now; the rows to land are of the next one.
        rows: bars to land, without what only the commit knows.
        equal: final bars that the table has right.
        missing: final bars that it lacks.
        different: final bars of which its latest revision says something else.
        still_open: bars with trades that the stream may still correct; they are left to it.
        without_trades: bars of the table that have no trade in `trades`; they stay.
        refused: trades with which a sum would not fit.
        hash_built: of the final bars that were built.
        hash_now: of the same bars as the table has them.
    """

    window: Window
    trades_snapshot_id: int | None
    bars_snapshot_id: int | None
    replay_epoch: int
    rows: pa.Table
    equal: int
    missing: int
    different: int
    still_open: int
    without_trades: int
    refused: int
    hash_built: ContentHash
    hash_now: ContentHash

    @property
    def changes(self) -> bool:
        """Return whether there is something to land."""
        return self.rows.num_rows > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for a report."""
        return {
            "table": _BARS,
            "window_start": iso_text(self.window.start_ns),
            "window_end": iso_text(self.window.end_ns),
            "changes": self.changes,
            "bars_built": self.equal + self.missing + self.different,
            "bars_equal": self.equal,
            "bars_missing": self.missing,
            "bars_different": self.different,
            "bars_still_open": self.still_open,
            "bars_without_trades": self.without_trades,
            "trades_refused": self.refused,
            "content_hash_built": str(self.hash_built),
            "content_hash_now": str(self.hash_now),
            "trades_snapshot_id": self.trades_snapshot_id,
            "bars_snapshot_id": self.bars_snapshot_id,
            "replay_epoch": self.replay_epoch + 1 if self.changes else None,
        }


@dataclass(frozen=True, slots=True)
class BackfillReport:
    """What a backfill did; without `committed` every bar was equal already, and nothing was written."""

    plan: BarsPlan
    committed: commit.Committed | None
    commit_id: str
    plans: int
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            **self.plan.as_dict(),
            "committed": self.committed is not None,
            "committed_snapshot_id": self.committed.snapshot_id if self.committed else None,
            "commit_id": self.commit_id,
            "plans": self.plans,
            "wall_s": round(self.wall_s, 3),
        }


@dataclass(frozen=True, slots=True)
class _Built:
    """Bars that may be landed, and what was left out."""

    bars: Sequence[Bar]
    still_open: frozenset[Key]
    refused: int


def plan_bars(settings: Settings, contracts: Contracts, window: Window, *, progress: Progress = silent) -> BarsPlan:
    """Return what a backfill of `window` would do now; change nothing.

    Raises:
        ConfigurationError: a table does not exist.
        CommitError: a table cannot be read.
    """
    return _Backfill(settings, contracts, window, progress).plan()


def backfill_bars(
    settings: Settings,
    contracts: Contracts,
    window: Window,
    *,
    progress: Progress = silent,
    monotonic_s: Callable[[], float] = time.monotonic,
) -> BackfillReport:
    """Land the bars of `window` that the table lacks or has wrong, in one table snapshot beside the live writer.

    Args:
        settings: which catalog, and what is late for a bar.
        contracts: all of them.
        window: of event time.
        progress: hears how far it is.
        monotonic_s: clock for durations, seconds.

    Raises:
        ConfigurationError: a table does not exist.
        CommitError: a table cannot be read or written, or others always changed it first; nothing was changed.
        CommitUnknownError: the commit may have landed; a second backfill finds out.
    """
    started_s = monotonic_s()
    work = _Backfill(settings, contracts, window, progress)
    for plans in range(1, PLANS_MAX + 1):
        plan = work.plan()
        faults.step("backfill.planned")
        if not plan.changes:
            return BackfillReport(plan, None, "", plans, monotonic_s() - started_s)
        commit_id = uuid.uuid4().hex
        files = work.write(plan, commit_id)
        faults.step("backfill.data_written")
        try:
            committed = commit_bars(work.bars_table(), plan, files, commit_id)
        except StalePlanError:
            if plans == PLANS_MAX:
                raise
            continue
        return BackfillReport(plan, committed, commit_id, plans, monotonic_s() - started_s)
    raise AssertionError  # pragma: no cover - the loop returns or raises


def commit_bars(table: Table, plan: BarsPlan, files: Sequence[DataFile], commit_id: str) -> commit.Committed:
    """Commit the bars that `plan` found, as one table snapshot.

    Raises:
        StalePlanError: a replay or another backfill came between; nothing landed.
        HistoryRolledBackError: the table was moved back by a person.
        CommitUnknownError: the outcome could not be found out.
    """

    def decide(view: commit.TableView) -> Mapping[str, str]:
        commit.check_not_rolled_back(view)
        found = replay_epoch(view.table)
        if found != plan.replay_epoch:
            msg = f"table {commit.table_name(table)}: planned on replay {plan.replay_epoch}, found {found}: plan again"
            raise StalePlanError(msg)
        return {REPLAY_EPOCH_KEY: str(plan.replay_epoch + 1)}

    window = {
        "start": iso_text(plan.window.start_ns),
        "end": iso_text(plan.window.end_ns),
        "trades_snapshot_id": plan.trades_snapshot_id,
    }
    summary = {
        commit.KIND_KEY: KIND,
        commit.COMMIT_ID_KEY: commit_id,
        commit.OWNER_KEY: user_at_host(),
        WINDOW_KEY: json.dumps(window),
    }
    return commit.commit_snapshot(table, decide=decide, added=files, summary=summary, steps="backfill.commit")


class _Backfill:
    """The passes of one backfill over its window."""

    def __init__(self, settings: Settings, contracts: Contracts, window: Window, progress: Progress) -> None:
        self._settings = settings
        self._trades, self._bars = contracts[_TRADES], contracts[_BARS]
        self._window = window
        self._progress = progress
        self._catalog = open_catalog(settings)

    def bars_table(self) -> Table:
        return load_table(self._catalog, self._settings, self._bars)

    def plan(self) -> BarsPlan:
        # The order matters: what is in `bars` is never older than what it is compared with.
        trades = load_table(self._catalog, self._settings, self._trades)
        built = _build(trades, self._window, self._settings.bar_rules, self._progress)
        bars = self.bars_table()
        following = replay_epoch(bars) + 1
        rows = _rows(self._bars, built.bars, following)
        compared = pa.schema([item for item in content_schema(self._bars) if item.name not in _REVISION])
        wanted, found = _hashes(rows, compared), _hashes(_latest(bars, self._bars, self._window), compared)
        verdicts = [
            "missing" if key not in found else "equal" if found[key] == made else "different"
            for key, made in wanted.items()
        ]
        counts = Counter(verdicts)
        return BarsPlan(
            window=self._window,
            trades_snapshot_id=trades.metadata.current_snapshot_id,
            bars_snapshot_id=bars.metadata.current_snapshot_id,
            replay_epoch=following - 1,
            rows=rows.filter(pa.array([verdict != "equal" for verdict in verdicts], pa.bool_())),
            equal=counts["equal"],
            missing=counts["missing"],
            different=counts["different"],
            still_open=len(built.still_open),
            without_trades=len(found.keys() - wanted.keys() - built.still_open),
            refused=built.refused,
            hash_built=_sum(wanted.values()),
            hash_now=_sum(found[key] for key in wanted if key in found),
        )

    def write(self, plan: BarsPlan, commit_id: str) -> list[DataFile]:
        nothing = {
            name: pa.nulls(plan.rows.num_rows, self._bars.arrow_schema.field(name).type) for name in SOURCE_COLUMNS
        }
        rows = plan.rows
        for name, column in nothing.items():
            rows = rows.append_column(name, column)
        finished = finish_rows(self._bars, rows, commit_id=commit_id, source_epoch=0, raw_epochs={})
        table = self.bars_table()
        with storage_errors(table, "written"):
            return commit.write_data_files(table, finished)


def _build(trades: Table, window: Window, rules: BarRules, progress: Progress) -> _Built:
    """Build the window's bars, and set aside those that the stream may still correct."""
    bars: list[Bar] = []
    refused = 0
    total_s = (window.end_ns - window.start_ns) // 10**9
    for piece in trades_between(trades, window.start_ns, window.end_ns):
        rebuilt = bars_of(piece)
        bars += rebuilt.bars
        refused += len(rebuilt.refusals)
        progress("build", (bars[-1].ts_end_ns - window.start_ns) // 10**9 if bars else 0, total_s)
    slack_ns = rules.out_of_orderness_ns + rules.allowed_lateness_ns
    partitions = sorted({bar.trades_partition for bar in bars})
    latest = latest_events(trades, partitions, window.start_ns, window.end_ns + slack_ns)
    final, still_open = [], set()
    for bar in bars:
        if latest.get(bar.trades_partition, 0) - slack_ns >= bar.ts_end_ns:
            final.append(bar)
        else:
            still_open.add((bar.instrument, bar.interval, bar.ts_start_ns))
    return _Built(final, frozenset(still_open), refused)


def _rows(contract: Contract, bars: Iterable[Bar], epoch: int) -> pa.Table:
    """Return bars as rows, decoded from the bytes that the processor would have sent."""
    sent = [SentRecord(msgspec.structs.replace(bar, replay_epoch=epoch), 0, index) for index, bar in enumerate(bars)]
    decoded = RowDecoder(contract).decode(cast("list[Message]", sent))
    if decoded.refused:
        first = decoded.refused[0]
        msg = f"{len(decoded.refused)} rebuilt bars are no rows of {contract.id}: {first.reason}: {first.detail}"
        raise DataQualityError(msg)
    rows = decoded.rows.get(0, contract.arrow_schema.empty_table())
    return rows.drop_columns([name for name in SOURCE_COLUMNS if name in rows.column_names])


def _latest(table: Table, contract: Contract, window: Window) -> pa.Table:
    """Return the latest revision of each bar of the window."""
    condition = within("ts_start", window.start_ns, window.end_ns)
    parts = [read_file(table, task, contract.arrow_schema.names, condition) for task in files_with(table, condition)]
    return latest_revision(
        pa.concat_tables([contract.arrow_schema.empty_table(), *(p.cast(contract.arrow_schema) for p in parts)])
    )


def _hashes(rows: pa.Table, compared: pa.Schema) -> dict[Key, Hash]:
    """Return the hash of each bar by its key, in the order of `rows`."""
    keys = zip(*(rows[name].to_pylist() for name in _KEY), strict=True)
    return dict(zip(cast("Iterable[Key]", keys), map(tuple, row_hashes(rows, compared).T.tolist()), strict=True))


def _sum(hashes: Iterable[Hash]) -> ContentHash:
    return sum((ContentHash(1, item) for item in hashes), ContentHash())
