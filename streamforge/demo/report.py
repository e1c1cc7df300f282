"""The report of a demo as values: what was sent, what landed, what it shows. Nothing here reads or prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from streamforge.contract_model import Contracts
from streamforge.demo.jobs import JobFigures
from streamforge.lakehouse.table_freshness import Quantiles, TableAges, quantiles
from streamforge.lakehouse.verify import Comparison
from streamforge.lakehouse.verify_ledger import LedgerComparison


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification says of one table.

    Args:
        lost: rows that are missing.
        doubled: rows that are there too often.
        different: rows that say something else than their record, or that no record explains.
        not_landed: offsets that the table has still to pass.
    """

    table: str
    lost: int
    doubled: int
    different: int = 0
    not_landed: int = 0


@dataclass(frozen=True, slots=True)
class LedgerFigures:
    """What became of the ids that the markets' ledgers say were sent.

    Args:
        sent: ids that were handed to a connection.
        in_raw: those that the raw topics have.
        in_gaps: those that they lack and a published gap covers.
        lost: those that they lack without a word.
    """

    sent: int
    in_raw: int
    in_gaps: int
    lost: int


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
class ModelFigures:
    """The model that was trained through Dagster, and what it did.

    Args:
        history_rows: candles that were loaded for it.
        version: in the registry.
        is_champion: whether it beat every baseline and forecasts.
        rmse: error of log volatility in the walk forward, by model.
        forecasts: rows of `predictions` that landed.
    """

    history_rows: int
    version: str
    is_champion: bool
    rmse: Mapping[str, float]
    forecasts: int


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
        ledger: ids sent against ids captured; None where the demo did not come so far.
        replay: None where the demo did not come so far.
        runs: what Dagster ran, in order; empty where it is not installed.
        models: None where none were asked for.
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
    ledger: LedgerFigures | None
    replay: ReplayFigures | None
    runs: Sequence[JobFigures]
    models: ModelFigures | None
    problems: Sequence[str]
    phases: Mapping[str, float]
    files: Mapping[str, str]

    @property
    def rows_landed(self) -> int:
        """Return the rows of all tables."""
        return sum(item.rows for item in self.tables)

    @property
    def lost(self) -> int:
        """Return how many rows are missing, over all tables, and how many sent ids never reached raw."""
        return sum(item.lost for item in self.tables) + (self.ledger.lost if self.ledger else 0)

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
            "ledger": None if self.ledger is None else asdict(self.ledger),
            "replay": None
            if self.replay is None
            else asdict(self.replay) | {"changed_nothing": self.replay.changed_nothing},
            "models": None if self.models is None else asdict(self.models),
            "dagster": [item.as_dict() for item in self.runs],
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
    ledger: LedgerFigures | None,
    replay: ReplayFigures | None,
    runs: Sequence[JobFigures],
    models: ModelFigures | None = None,
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
        ledger=ledger,
        replay=replay,
        runs=runs,
        models=models,
        problems=[
            *problems,
            *_problems(events_produced, ages, by_table, ledger, replay),
            *(problem for item in runs for problem in item.problems()),
        ],
        phases=phases,
        files=files,
    )


def verdicts(comparisons: Iterable[Comparison], namespace: str, contracts: Contracts) -> list[Verdict]:
    """Return one verdict a table: the worst of its comparisons, so that nothing is counted twice."""
    found: dict[str, Verdict] = {}
    for item in comparisons:
        table = contracts.of_table(item.table).table
        name = f"{namespace}.{table.name if table else item.table}"
        known, tally = found.get(name, Verdict(name, 0, 0)), item.tally
        found[name] = Verdict(
            table=name,
            lost=max(known.lost, tally.lost),
            doubled=max(known.doubled, tally.doubled),
            different=max(known.different, tally.different + tally.unexpected),
            not_landed=max(known.not_landed, item.not_landed),
        )
    return list(found.values())


def ledger_figures(comparisons: Iterable[LedgerComparison]) -> LedgerFigures:
    """Return the sum over the markets; after a clean stop an id behind the last captured one is lost too."""
    found = list(comparisons)
    return LedgerFigures(
        sent=sum(item.sent for item in found),
        in_raw=sum(item.in_raw for item in found),
        in_gaps=sum(item.explained for item in found),
        lost=sum(item.unexplained + item.after_last_raw for item in found),
    )


def _problems(
    events_produced: int,
    ages: Sequence[TableAges],
    verdicts: Mapping[str, Verdict],
    ledger: LedgerFigures | None,
    replay: ReplayFigures | None,
) -> list[str]:
    found = [f"{item.table} was not verified" for item in ages if item.table not in verdicts]
    found += [f"{name} was verified and cannot be read" for name in verdicts.keys() - {item.table for item in ages}]
    found += [f"{item.table}: {item.lost} rows are lost" for item in verdicts.values() if item.lost]
    found += [f"{item.table}: {item.doubled} rows are doubled" for item in verdicts.values() if item.doubled]
    found += [
        f"{item.table}: {item.different} rows are not what was sent" for item in verdicts.values() if item.different
    ]
    found += [f"{item.table}: {item.not_landed} offsets did not land" for item in verdicts.values() if item.not_landed]
    if ledger is not None and ledger.lost:
        found.append(f"{ledger.lost} ids that the market sent are neither in raw nor in a published gap")
    if not events_produced:
        found.append("the market sent nothing")
    if replay is not None and not replay.changed_nothing:
        found.append(
            f"the replay of {', '.join(replay.ranges)} changed {replay.table}: content hash {replay.hash_before} "
            f"before, {replay.hash_after} after"
        )
    return found
