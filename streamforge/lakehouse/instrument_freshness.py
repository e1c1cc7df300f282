"""How old the newest row of each instrument is, by event time: what a person calls fresh.

It is read from the table, so rows that a replay or a backfill brings late make nothing fresher than it is. An
instrument without a row in the day before the table's newest event is gone: its age is not judged, but it is named
for a week, since no table tells a market that was closed from one that is no longer captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyiceberg.expressions import GreaterThanOrEqual
from pyiceberg.table import Table

from streamforge.contract_model import Contract
from streamforge.lakehouse.column_bounds import greatest
from streamforge.lakehouse.observation import event_column
from streamforge.lakehouse.replay_plan import compare_with
from streamforge.lakehouse.replay_target import files_with, read_file

INSTRUMENT = "instrument"
WATCHED_NS = 24 * 3_600 * 10**9
REMEMBERED_NS = 7 * WATCHED_NS
"""How long before the table's newest event an instrument's last row may lie for it to be named as gone."""

_FINDINGS = "ts_detected_ns"


@dataclass(frozen=True, slots=True)
class InstrumentFreshness:
    """Age of the newest row of each instrument, in seconds; none where the table has no rows.

    Args:
        target_s: what the contract promises.
        gone_s: the same of the instruments that are gone, the latest to go first.
    """

    target_s: float
    ages_s: Mapping[str, float]
    gone_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def late(self) -> dict[str, float]:
        """Return the instruments whose newest row is older than the target, the oldest first."""
        found = {name: age_s for name, age_s in self.ages_s.items() if age_s > self.target_s}
        return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))

    @property
    def all_late(self) -> bool:
        """Return whether no instrument is fresh: then it is the table that is late, not a quiet market."""
        return len(self.late) == len(self.ages_s)


def has_freshness(contract: Contract) -> bool:
    """Return whether the age of a table's newest row says something.

    It does where the contract has a target and rows keep coming. A ledger of findings is quiet when all is well.
    """
    names = {item.name for item in contract.fields}
    return contract.freshness_s is not None and event_column(contract) is not None and _FINDINGS not in names


def instrument_freshness(table: Table, contract: Contract, now_ns: int) -> InstrumentFreshness:
    """Return how old each instrument's newest row is at `now_ns`; a table without instruments counts as one.

    Raises:
        CommitError: the table cannot be read.
    """
    column = event_column(contract)
    newest_ns = greatest(table, column) if column is not None else None
    if column is None or newest_ns is None:
        return InstrumentFreshness(contract.freshness_s or 0.0, {})
    by_instrument = INSTRUMENT in table.schema().column_names
    condition = compare_with(GreaterThanOrEqual, column, newest_ns - REMEMBERED_NS)
    newest: dict[str, int] = {}
    for task in files_with(table, condition):
        rows = read_file(table, task, (INSTRUMENT, column) if by_instrument else (column,), condition)
        if not rows.num_rows:
            continue
        if not by_instrument:
            rows = rows.append_column(INSTRUMENT, pa.array([contract.id] * rows.num_rows, pa.string()))
        grouped = rows.group_by(INSTRUMENT).aggregate([(column, "max")])
        found: list[dict[str, Any]] = grouped.to_pylist()
        newest |= {row[INSTRUMENT]: max(row[f"{column}_max"], newest.get(row[INSTRUMENT], 0)) for row in found}
    latest_first = sorted(newest.items(), key=lambda item: item[1], reverse=True)
    ages_s = {name: round((now_ns - event_ns) / 1e9, 3) for name, event_ns in latest_first}
    gone = {name for name, event_ns in latest_first if event_ns < newest_ns - WATCHED_NS}
    return InstrumentFreshness(
        contract.freshness_s or 0.0,
        {name: age_s for name, age_s in ages_s.items() if name not in gone},
        {name: age_s for name, age_s in ages_s.items() if name in gone},
    )
