"""Trouble with catalog, warehouse and tables, as others make it: no code of ours takes part but the names of tables."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pyiceberg.table import Table
from sqlalchemy.engine import make_url

from streamforge.contracts import Contracts
from streamforge.errors import RetryableSourceError, StreamForgeError
from streamforge.lakehouse.barrier import group_offsets
from streamforge.lakehouse.catalog import CATALOG_ERRORS, load_table, open_catalog
from streamforge.lakehouse.kafka_reader import topic_partitions
from streamforge.log_reader import log_starts
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from tests.chaos.scene import NotReachedError
from tests.chaos.schedule import Fault

_LOCK_TIMEOUT_S = 60.0
_SHORTEST_RANGE_ROWS = 20
_FAILURES: tuple[type[Exception], ...] = (*CATALOG_ERRORS, StreamForgeError)


def put_warehouse_behind_a_link(settings: Settings) -> None:
    """Make the folder of the warehouse a link, so that it can be hidden and shown in one step."""
    warehouse, folder = _warehouse(settings)
    folder.mkdir(parents=True)
    warehouse.symlink_to(folder)
    warehouse.with_name("nothing").write_bytes(b"")


def hide_warehouse(settings: Settings, hold: Callable[[], None]) -> None:
    """Hide the warehouse while `hold` runs: every access gets an error of the file system."""
    warehouse, folder = _warehouse(settings)
    _point(warehouse, warehouse.with_name("nothing"))
    try:
        hold()
    finally:
        _point(warehouse, folder)


def lock_catalog(settings: Settings, hold: Callable[[], None]) -> None:
    """Hold SQLite's write lock while `hold` runs."""
    database = make_url(settings.resolved_catalog_uri).database
    assert database is not None
    with closing(sqlite3.connect(database, timeout=_LOCK_TIMEOUT_S, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            hold()
        finally:
            connection.execute("ROLLBACK")


def foreign_commits(settings: Settings, contracts: Contracts, fault: Fault) -> None:
    """Append nothing, once or a few times in a row, to a table, as another program would."""
    with _as_others_fare():
        table = _table(settings, contracts, fault)
        for _ in range(fault.passage):
            table.refresh()
            table.append(table.schema().as_arrow().empty_table())


def expire_snapshots(settings: Settings, contracts: Contracts, fault: Fault) -> None:
    """Expire all table snapshots but the current one, as another program would."""
    with _as_others_fare():
        table = _table(settings, contracts, fault)
        named = {ref.snapshot_id for ref in table.metadata.refs.values()}
        old = [item.snapshot_id for item in table.snapshots() if item.snapshot_id not in named]
        if old:
            table.maintenance.expire_snapshots().by_ids(old).commit()


def range_to_replay(settings: Settings, contracts: Contracts, choice: random.Random) -> str | None:
    """Return a range of `raw-trades` that the parser has passed, as `streamforge replay --offsets` wants it."""
    try:
        partitions = topic_partitions(settings, [topic_of(contracts, "raw-trades").name])
        passed = group_offsets(settings, f"{settings.topic_prefix}parser", partitions)
        starts = log_starts(settings, partitions)
    except RetryableSourceError:
        return None  # the broker is away
    long = sorted(item for item, end in passed.items() if end - starts[item] > _SHORTEST_RANGE_ROWS)
    if not long:
        return None
    item = choice.choice(long)
    first, last = sorted(choice.sample(range(starts[item], passed[item]), 2))
    return f"{item.partition}:{first}-{last + 1}"


@contextmanager
def _as_others_fare() -> Iterator[None]:
    """Let another program fail: the writer was faster, or the catalog or the warehouse is away just now."""
    try:
        yield
    except _FAILURES as error:
        raise NotReachedError from error


def _table(settings: Settings, contracts: Contracts, fault: Fault) -> Table:
    return load_table(open_catalog(settings), settings, contracts[fault.target.removeprefix("table ")])


def _warehouse(settings: Settings) -> tuple[Path, Path]:
    return settings.home_path / "warehouse", settings.home_path / "warehouse-files"


def _point(link: Path, target: Path) -> None:
    fresh = link.with_name(f".{link.name}")
    fresh.symlink_to(target)
    fresh.replace(link)
