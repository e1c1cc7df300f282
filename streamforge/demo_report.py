"""The report of a demo as values: what was sent, what landed, what it shows. Nothing here reads or prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from streamforge.lakehouse.table_freshness import Quantiles, TableAges, quantiles


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification says of one table: rows that are missing, and rows that are there too often."""

    table: str
    lost: int
    doubled: int


@dataclass(frozen=True, slots=True)
class TableFigures:
    """One table of the report; `received` and `event` are ages at commit, since receipt and since the event."""

    table: str
    rows: int
    commits: int
    lost: int
    doubled: int
    received: Quantiles | None
    event: Quantiles | None


@dataclass(frozen=True, slots=True)
class ReplayFigures:
    """One replay of a range that had landed already: it must find nothing to change.

    Args:
        table: whose rows were made again.
        ranges: offsets of the raw topic that were read again.
        rows: rows that were made.
        committed: whether it made a table snapshot.
        hash_before: content hash of the whole table before.
        hash_after: and after.
    """

    table: str
    ranges: Sequence[str]
    rows: int
    committed: bool
    hash_before: str
    hash_after: str

    @property
    def changed_nothing(self) -> bool:
        """Return whether the table says what it said before, by the same table snapshot."""
        return not self.committed and self.hash_before == self.hash_after


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything a demo found out.

    Args:
        events_produced: messages that the markets' ledgers say they sent.
        live_s: seconds in which the markets sent them.
        wall_s: seconds of the whole demo.
        tables: by contract order.
        freshness: ages at commit since receipt, over all rows of all tables that have a receipt.
        event_freshness: since the venue's time.
        replay: None where the demo did not come so far.
        problems: what went wrong, one sentence each; empty when all is well.
        phases: seconds that each phase took, in order.
        files: where things lie, by what they are.
    """

    events_produced: int
    live_s: float
    wall_s: float
    tables: Sequence[TableFigures]
    freshness: Quantiles | None
    event_freshness: Quantiles | None
    replay: ReplayFigures | None
    problems: Sequence[str]
    phases: Mapping[str, float]
    files: Mapping[str, str]

    @property
    def rows_landed(self) -> int:
        """Return the rows of all tables."""
        return sum(item.rows for item in self.tables)

    @property
    def lost(self) -> int:
        """Return how many rows are missing, over all tables."""
        return sum(item.lost for item in self.tables)

    @property
    def doubled(self) -> int:
        """Return how many rows are there too often, over all tables."""
        return sum(item.doubled for item in self.tables)

    @property
    def events_per_s(self) -> float:
        """Return the mean rate of messages while the markets were open."""
        return self.events_produced / self.live_s if self.live_s else 0.0

    @property
    def ok(self) -> bool:
        """Return whether nothing was lost, doubled, changed by the replay, or went wrong."""
        return not (self.problems or self.lost or self.doubled)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, as `demo-report.json` holds it."""
        return {
            "ok": self.ok,
            "events_produced": self.events_produced,
            "rows_landed": self.rows_landed,
            "lost": self.lost,
            "doubled": self.doubled,
            "freshness_p50_s": self.freshness.p50_s if self.freshness else None,
            "freshness_p99_s": self.freshness.p99_s if self.freshness else None,
            "event_freshness_p50_s": self.event_freshness.p50_s if self.event_freshness else None,
            "event_freshness_p99_s": self.event_freshness.p99_s if self.event_freshness else None,
            "events_per_s": round(self.events_per_s, 1),
            "live_s": round(self.live_s, 3),
            "wall_s": round(self.wall_s, 3),
            "tables": {item.table: {k: v for k, v in asdict(item).items() if k != "table"} for item in self.tables},
            "replay": None
            if self.replay is None
            else asdict(self.replay) | {"changed_nothing": self.replay.changed_nothing},
            "problems": list(self.problems),
            "phases_s": {name: round(seconds, 3) for name, seconds in self.phases.items()},
            "files": dict(self.files),
        }


def make_report(
    *,
    events_produced: int,
    live_s: float,
    wall_s: float,
    ages: Sequence[TableAges],
    verdicts: Sequence[Verdict],
    replay: ReplayFigures | None,
    problems: Sequence[str],
    phases: Mapping[str, float],
    files: Mapping[str, str],
) -> DemoReport:
    """Put the report together and add the problems that its own figures tell.

    A table without a verdict, and a verdict without a table, are problems: what nobody compared is not proven.
    """
    by_table = {item.table: item for item in verdicts}
    tables = [
        TableFigures(
            table=item.table,
            rows=item.rows,
            commits=item.commits,
            lost=by_table[item.table].lost if item.table in by_table else 0,
            doubled=by_table[item.table].doubled if item.table in by_table else 0,
            received=quantiles(item.received),
            event=quantiles(item.event),
        )
        for item in ages
    ]
    received = [item for item in ages if len(item.received)]
    return DemoReport(
        events_produced=events_produced,
        live_s=live_s,
        wall_s=wall_s,
        tables=tables,
        freshness=quantiles(np.concatenate([item.received for item in received])) if received else None,
        event_freshness=quantiles(np.concatenate([item.event for item in received])) if received else None,
        replay=replay,
        problems=[*problems, *_problems(events_produced, ages, by_table, replay)],
        phases=phases,
        files=files,
    )


def _problems(
    events_produced: int, ages: Sequence[TableAges], verdicts: Mapping[str, Verdict], replay: ReplayFigures | None
) -> list[str]:
    found = [f"{item.table} was not verified" for item in ages if item.table not in verdicts]
    found += [f"{name} was verified and cannot be read" for name in verdicts.keys() - {item.table for item in ages}]
    found += [f"{item.table}: {item.lost} rows are lost" for item in verdicts.values() if item.lost]
    found += [f"{item.table}: {item.doubled} rows are doubled" for item in verdicts.values() if item.doubled]
    if not events_produced:
        found.append("the market sent nothing")
    if replay is not None and not replay.changed_nothing:
        found.append(
            f"the replay of {', '.join(replay.ranges)} changed {replay.table}: content hash {replay.hash_before} "
            f"before, {replay.hash_after} after"
        )
    return found
