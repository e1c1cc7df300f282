"""Rows of one table partition are written as they are; the files are those that PyIceberg makes when it looks.

In each of them the rows lie in source order, whatever the order in which topic-partitions were fetched.
"""

from __future__ import annotations

import uuid
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.io.pyarrow import _dataframe_to_data_files
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from streamforge.contracts import load_contracts
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.lakehouse.manifests import write_data_files
from streamforge.lakehouse.protocol import SourceIdentity
from streamforge.lakehouse.rows import RowDecoder, finish_rows, raw_topic_ids
from streamforge.lakehouse.table_writer import TableWriter
from streamforge.settings import Settings
from tests.kafka_records import Record
from tests.writer_support import trade_value

CONTRACTS = load_contracts(Path(__file__).resolve().parents[3] / "contracts")
DAY_NS = 86_400 * 10**9
START_NS = 1_700_000_000_000_000_000
FACTS = ("partition", "record_count", "value_counts", "null_value_counts", "lower_bounds", "upper_bounds")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    settings = Settings(_env_file=None, home=tmp_path_factory.mktemp("home"))  # type: ignore[call-arg]
    return ensure_table(open_catalog(settings), settings, CONTRACTS["trades"])


def rows_of(*times_ns: int) -> pa.Table:
    records: Any = [Record(trade_value(n, ts_event_ns=ns), offset=n) for n, ns in enumerate(times_ns)]
    rows = RowDecoder(CONTRACTS["trades"]).decode(records).rows[0]
    epochs = dict.fromkeys(raw_topic_ids(rows), 1)
    return finish_rows(CONTRACTS["trades"], rows, commit_id="commit", source_epoch=1, raw_epochs=epochs)


def facts(files: list[DataFile]) -> list[list[str]]:
    return sorted([str(getattr(item, name)) for name in FACTS] for item in files)


@pytest.mark.parametrize(
    "times_ns",
    [
        (START_NS,),
        (START_NS, START_NS + 1),
        (DAY_NS * 20_000, DAY_NS * 20_001 - 1),
        (DAY_NS * 20_000 - 1, DAY_NS * 20_000),
        (START_NS, START_NS + DAY_NS, START_NS),
    ],
)
def test_files_are_those_of_pyiceberg_and_hold_all_rows(table: Table, times_ns: tuple[int, ...]) -> None:
    rows = rows_of(*times_ns)
    written = write_data_files(table, rows)
    expected = _dataframe_to_data_files(table.metadata, rows, table.io, uuid.uuid4())
    assert facts(written) == facts(list(expected))
    offsets: list[Any] = []
    for item in written:
        offsets += pq.read_table(item.file_path.removeprefix("file://"), partitioning=None)["source_offset"].to_pylist()
    assert sorted(offsets) == list(range(len(times_ns)))


def test_writers_files_are_in_source_order_after_fetches_that_were_not(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]
    table = ensure_table(open_catalog(settings), settings, CONTRACTS["trades"])
    writer = TableWriter(CONTRACTS["trades"], table, owner="a", deadline_s=20)
    writer.claim(SourceIdentity("trades", "topic-id", "cluster-id"), dict.fromkeys((2, 0, 1), 0))
    given = [(2, 0), (0, 0), (2, 1), (1, 0), (0, 1)], [(1, 1), (0, 2), (1, 2), (2, 2), (0, 3)]
    for places in given:
        writer.take([_trade(*place) for place in places], {partition: offset + 1 for partition, offset in places})
    landed = writer.commit()
    assert landed is not None
    files = [item.file for item in landed.committed.table.scan().plan_files()]
    assert len(files) == 2, "one of each day"
    found = [source_places(item) for item in files]
    assert found == [sorted(places) for places in found]
    assert sorted(chain(*found)) == sorted(chain(*given))


def _trade(partition: int, offset: int) -> Any:
    """Return a record that falls on another day than those at the offsets before and after it."""
    value = trade_value(offset, ts_event_ns=START_NS + offset % 2 * DAY_NS)
    return Record(value, offset=offset, partition=partition)


def source_places(file: DataFile) -> list[tuple[int, int]]:
    rows = pq.read_table(file.file_path.removeprefix("file://"), partitioning=None)
    return list(zip(*(rows[name].to_pylist() for name in ("source_partition", "source_offset")), strict=True))
