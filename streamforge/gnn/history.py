"""Bars for models, read from a table snapshot: `bars`, which we made of trades, or `venue-bars`, from history.

Whoever reads says which of the two it was. The snapshot is named before it is read, so that expiry keeps it while
a model trains; the name falls away when a version has its own, or after a day.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import And, EqualTo, GreaterThanOrEqual
from pyiceberg.table import Table

from streamforge.contracts import Contract, Contracts
from streamforge.errors import NotEnoughDataError, TableMissingError
from streamforge.gnn.panel import PANEL_COLUMNS, REVISION_COLUMNS
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.replay_plan import compare_with
from streamforge.lakehouse.replay_target import storage_errors
from streamforge.lakehouse.tags import remove_tag, set_tag
from streamforge.settings import Settings

READING_TAG = "training-"
MODEL_TAG = "model-volatility-"
_READING_MAX_AGE_S = 86_400


class BarsSource(StrEnum):
    """Which bars a model is made from; values are contract ids, but for `AUTO`: the one with more intervals."""

    AUTO = "auto"
    BARS = "bars"
    VENUE_BARS = "venue-bars"


@dataclass(frozen=True, slots=True)
class BarsView:
    """Bars of one length in one table snapshot, not read yet.

    Args:
        contract_id: of the table.
        table: the table.
        snapshot_id: the table snapshot.
        interval: length of the bars, as the table says it.
        interval_ns: the same.
        intervals: how many different intervals there are.
        last_start_ns: start of the latest bar.
    """

    contract_id: str
    table: Table
    snapshot_id: int
    interval: str
    interval_ns: int
    intervals: int
    last_start_ns: int


def find_bars(
    settings: Settings, contracts: Contracts, source: BarsSource, *, interval_ns: int | None = None
) -> BarsView:
    """Look which bars there are and choose the length that has the most intervals.

    Args:
        settings: where the tables are.
        contracts: theirs.
        source: which bars.
        interval_ns: only bars of this length; None takes any.

    Raises:
        NotEnoughDataError: there are none; says where it looked.
    """
    wanted = [BarsSource.BARS, BarsSource.VENUE_BARS] if source is BarsSource.AUTO else [source]
    catalog = open_catalog(settings)
    found = [
        view
        for item in wanted
        if item.value in contracts
        for view in _views(catalog, settings, contracts[item.value])
        if interval_ns in {None, view.interval_ns}
    ]
    if not found:
        msg = (
            f"there are no bars in {' or '.join(item.value for item in wanted)}, 0 intervals found: let the platform "
            "run, or load history: `streamforge load history`"
        )
        raise NotEnoughDataError(msg)
    return max(found, key=lambda view: view.intervals)


def read_bars(view: BarsView, *, max_intervals: int) -> pa.Table:
    """Read the latest intervals of a view: all revisions of the columns that a panel needs.

    Raises:
        CommitError: a data file cannot be read.
    """
    names = [*PANEL_COLUMNS, *REVISION_COLUMNS]
    columns = [name for name in names if name in view.table.schema().column_names]
    since_ns = view.last_start_ns - (max_intervals - 1) * view.interval_ns
    rows = And(
        compare_with(EqualTo, "interval", view.interval),
        compare_with(GreaterThanOrEqual, "ts_start_ns", since_ns),
    )
    scan = view.table.scan(row_filter=rows, selected_fields=tuple(columns), snapshot_id=view.snapshot_id)
    with storage_errors(view.table, "read"):
        read: pa.Table = scan.to_arrow()
    return read


def pin_reading(view: BarsView, name: str) -> str:
    """Keep a view's table snapshot from expiry while a model is made of it; forget readings of yesterday.

    Returns:
        The tag; when it was set is in its name.

    Raises:
        CommitError: the snapshot has expired already.
    """
    now_s = int(time.time())
    tag = f"{READING_TAG}{now_s}-{name}"
    set_tag(view.table, tag, view.snapshot_id, max_age_ms=_READING_MAX_AGE_S * 1_000)
    for other in view.table.metadata.refs:
        since_s, _, _ = other.removeprefix(READING_TAG).partition("-")
        if other.startswith(READING_TAG) and since_s.isdigit() and int(since_s) < now_s - _READING_MAX_AGE_S:
            remove_tag(view.table, other)
    return tag


def keep_reading(settings: Settings, contracts: Contracts, contract_id: str, snapshot_id: int, tag: str) -> None:
    """Set the tag of a reading again, where it is gone by now.

    Raises:
        CommitError: the snapshot has expired meanwhile: read again.
    """
    set_tag(
        load_table(open_catalog(settings), settings, contracts[contract_id]),
        tag,
        snapshot_id,
        max_age_ms=_READING_MAX_AGE_S * 1_000,
    )


def pin_artifact(settings: Settings, contracts: Contracts, contract_id: str, snapshot_id: int, artifact_id: str) -> str:
    """Keep the table snapshot that an artifact was trained on from expiry, for good; return the tag.

    Raises:
        CommitError: the snapshot has expired already.
    """
    tag = f"{MODEL_TAG}{artifact_id}"
    set_tag(load_table(open_catalog(settings), settings, contracts[contract_id]), tag, snapshot_id)
    return tag


def release_reading(settings: Settings, contracts: Contracts, contract_id: str, tag: str) -> None:
    """Let go of a reading."""
    remove_tag(load_table(open_catalog(settings), settings, contracts[contract_id]), tag)


def _views(catalog: Catalog, settings: Settings, contract: Contract) -> Iterator[BarsView]:
    try:
        table = load_table(catalog, settings, contract)
    except TableMissingError:
        return
    snapshot = table.current_snapshot()
    if snapshot is None:
        return
    fields = ("interval", "ts_start_ns", "ts_end_ns")
    with storage_errors(table, "read"):
        times = table.scan(selected_fields=fields, snapshot_id=snapshot.snapshot_id).to_arrow()
    intervals = times["interval"].to_numpy()
    for interval in np.unique(intervals):
        chosen = times.filter(pa.array(intervals == interval))
        starts_ns = np.unique(chosen["ts_start_ns"].to_numpy())
        yield BarsView(
            contract_id=contract.id,
            table=table,
            snapshot_id=snapshot.snapshot_id,
            interval=str(interval),
            interval_ns=int(chosen["ts_end_ns"][0].as_py()) - int(chosen["ts_start_ns"][0].as_py()),
            intervals=len(starts_ns),
            last_start_ns=int(starts_ns[-1]),
        )
