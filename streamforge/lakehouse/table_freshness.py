"""Freshness of a table, told by the table itself: when each row's commit was made, minus the row's own times.

Every row names its commit, and every commit has a time: in the table's snapshots, or in the table `commits`
once its snapshot has expired. So freshness is known afterwards, of all rows, without anyone having watched.
The commit's time is its snapshot's, taken when all files are written and just before the commit is sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from streamforge.contract_model import Contract, Contracts
from streamforge.lakehouse.catalog import load_table
from streamforge.lakehouse.commit import COMMIT_ID_KEY, KIND_KEY, refresh, table_name
from streamforge.lakehouse.rows import COMMIT_ID
from streamforge.settings import Settings

_COMMITS_CONTRACT = "commits"
_RECEIVED_COLUMNS = ("ts_receive_ns", "ts_detected_ns")
_EVENT_COLUMNS = ("ts_event_ns", "ts_end_ns")
_NS_PER_MS = 1_000_000
_WRITER = "write"

Ages = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Ages of rows at their commit, in seconds."""

    rows: int
    p50_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class TableAges:
    """How old a table's rows were when the writer committed them, in milliseconds.

    Args:
        table: the table's name.
        rows: rows in the table, those of replays included.
        commits: commits of the writer that brought rows.
        received: since our receipt (or since a gap was noticed); empty where the table has no such time.
        event: since the venue's time (or the end of a bar).
    """

    table: str
    rows: int
    commits: int
    received: Ages
    event: Ages


def quantiles(ages: Ages) -> Quantiles | None:
    """Return the quantiles of ages in milliseconds; None without rows."""
    if not len(ages):
        return None
    p50_ms, p99_ms = np.quantile(ages, [0.5, 0.99], method="higher")
    return Quantiles(len(ages), float(p50_ms) / 1e3, float(p99_ms) / 1e3, float(ages.max()) / 1e3)


def read_ages(catalog: Catalog, settings: Settings, contracts: Contracts, contract: Contract) -> TableAges:
    """Read the ages of all rows of the contract's table that the writer landed.

    Rows that a replay brought are counted in `rows` only: they are as old as the replay is late.

    Raises:
        ConfigurationError: the table does not exist.
    """
    table = refresh(load_table(catalog, settings, contract))
    names = {item.name for item in contract.fields}
    # Without a freshness target it is history, or about the future: its times say nothing of the line.
    asked = (_RECEIVED_COLUMNS, _EVENT_COLUMNS) if contract.freshness_s is not None else ((), ())
    columns = [next((name for name in candidates if name in names), None) for candidates in asked]
    rows = table.scan(selected_fields=(COMMIT_ID, *(name for name in columns if name is not None))).to_arrow()
    times_ms = commit_times_ms(table, load_table(catalog, settings, contracts[_COMMITS_CONTRACT]))
    landed_ms, is_live = _landed_ms(rows[COMMIT_ID], times_ms)
    received, event = (
        np.empty(0, np.int64) if name is None else _ages(rows[name], landed_ms, is_live) for name in columns
    )
    commits = len(pc.unique(rows[COMMIT_ID].filter(pa.array(is_live))))
    return TableAges(table_name(table), rows.num_rows, commits, received, event)


def commit_times_ms(table: Table, commits: Table) -> Mapping[str, int]:
    """Return the time of each of the writer's commits to `table` by commit id, milliseconds since 1970 UTC.

    Args:
        table: the table.
        commits: the table `commits`, which keeps what has expired.
    """
    archived = commits.scan(selected_fields=("table_name", "ts_committed", "summary")).to_arrow().to_pylist()
    made = [
        (json.loads(row["summary"]), int(row["ts_committed"].timestamp() * 1000))
        for row in archived
        if row["table_name"] == table_name(table)
    ]
    made += [
        (snapshot.summary.additional_properties if snapshot.summary else {}, snapshot.timestamp_ms)
        for snapshot in table.metadata.snapshots
    ]
    return {summary[COMMIT_ID_KEY]: time_ms for summary, time_ms in made if summary.get(KIND_KEY) == _WRITER}


def _landed_ms(commit_ids: pa.ChunkedArray[Any], times_ms: Mapping[str, int]) -> tuple[Ages, npt.NDArray[np.bool_]]:
    """Return each row's commit time, and whether the writer made that commit."""
    encoded: Any = pc.dictionary_encode(commit_ids.combine_chunks())
    known = np.array([times_ms.get(name, -1) for name in encoded.dictionary.to_pylist()], np.int64)
    landed_ms = known[encoded.indices.to_numpy()] if len(known) else np.empty(0, np.int64)
    return landed_ms, landed_ms >= 0


def _ages(times_ns: pa.ChunkedArray[Any], landed_ms: Ages, is_live: npt.NDArray[np.bool_]) -> Ages:
    ages: Ages = (landed_ms - times_ns.to_numpy() // _NS_PER_MS)[is_live]
    return ages
