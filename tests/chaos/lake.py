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
from streamforge.errors import StreamForgeError
from streamforge.lakehouse.catalog import CATALOG_ERRORS, load_table, open_catalog
from streamforge.lakehouse.commit import view_of
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


def range_to_replay(settings: Settings, contracts: Contracts, choice: random.Random) -> str:
    """Return a range of `raw-trades` that has landed, as `streamforge replay --offsets` wants it.

    The table is asked and not the consumer group: librdkafka ends the process where the broker dies meanwhile.

    Raises:
        NotReachedError: no topic-partition has landed enough, or the table cannot be read just now.
    """
    with _as_others_fare():
        contract = contracts["raw-trades"]
        state = view_of(load_table(open_catalog(settings), settings, contract)).state
        landed = state.next_offsets(state.epoch_of(topic_of(contracts, contract.id).name) or 0)
    long = sorted(partition for partition, end in landed.items() if end > _SHORTEST_RANGE_ROWS)
    if not long:
        raise NotReachedError
    partition = choice.choice(long)
    first, last = sorted(choice.sample(range(landed[partition]), 2))
    return f"{partition}:{first}-{last + 1}"


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
