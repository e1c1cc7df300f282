"""Replays as values: what a range may look like, which rows it means, which tables it knows."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pytest
from pyiceberg.expressions.visitors import bind

from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.remake import lineage_of
from streamforge.lakehouse.replay_plan import RAW_COLUMNS, SOURCE_COLUMNS, Counts, parse_offsets
from streamforge.lakehouse.replay_ranges import parse_time, time_column
from streamforge.offsets import OffsetRange
from streamforge.settings import Settings


@pytest.fixture
def contracts() -> Contracts:
    return load_contracts(Settings(_env_file=None).contracts_dir)  # type: ignore[call-arg]


@pytest.mark.parametrize("text", ["", "5", "0:5", "0:5-", "a:1-2", "0:1-2-3", "-1:0-5", "0:1_0-20", "0:3-3", "0:4-3"])
def test_parse_offsets_bad_text_is_refused_and_shown(text: str) -> None:
    with pytest.raises(ConfigurationError, match="offsets"):
        parse_offsets([text], "raw-trades")


def test_parse_offsets_are_half_open() -> None:
    (found,) = parse_offsets([" 3:10-20 "], "raw-trades")
    assert found == OffsetRange("raw-trades", 3, 10, 20)
    assert len(found) == 10


@pytest.mark.parametrize(
    ("table", "source", "columns", "time"),
    [
        ("trades", "raw-trades", RAW_COLUMNS, "ts_event"),
        ("raw_trades", "raw-trades", SOURCE_COLUMNS, "ts_receive"),
        ("raw_depth", "raw-depth", SOURCE_COLUMNS, "ts_receive"),
        ("bars", "bars", SOURCE_COLUMNS, "ts_start"),
        ("market_gaps", "market-gaps", SOURCE_COLUMNS, "ts_detected"),
    ],
)
def test_lineage_of_each_table(
    contracts: Contracts, table: str, source: str, columns: tuple[str, ...], time: str
) -> None:
    lineage = lineage_of(contracts, table)
    assert (lineage.source.id, lineage.columns, time_column(lineage)) == (source, columns, time)
    assert set(lineage.columns[1:]) <= set(lineage.compared.names), "identity is compared"
    assert "commit_id" not in lineage.compared.names


def test_every_table_that_a_topic_feeds_has_a_lineage(contracts: Contracts) -> None:
    for contract in contracts.with_table:
        if contract.topic is not None:
            assert lineage_of(contracts, contract.id).contract is contract


def test_lineage_of_a_table_without_a_topic_is_refused(contracts: Contracts) -> None:
    with pytest.raises(ConfigurationError, match="commits is not fed from a topic"):
        lineage_of(contracts, "commits")


def test_filter_of_thousands_of_scattered_ranges_can_be_bound_to_a_table(contracts: Contracts) -> None:
    # One dead letter in two: a tree as deep as there are ranges cannot be walked.
    lineage = lineage_of(contracts, "trades")
    ranges = [OffsetRange("raw-trades", 0, start, start + 1) for start in range(0, 6_000, 2)]
    bound = bind(lineage.contract.iceberg_schema, lineage.row_filter(1, ranges), case_sensitive=True)
    assert str(bound).count("raw_offset") >= len(ranges)


def test_within_row_without_identity_came_from_nowhere(contracts: Contracts) -> None:
    lineage = lineage_of(contracts, "bars")
    rows = pa.table({name: pa.array([None, 1], pa.int64()) for name in SOURCE_COLUMNS})
    found = lineage.within(rows, 1, [OffsetRange("bars", 1, 0, 10)])
    assert found.tolist() == [False, True]


def test_counts_doubles_in_the_table_count_as_gone() -> None:
    counts = Counts(now=5, after=4, equal=2, changed=1)
    assert (counts.added, counts.gone) == (1, 2)


def test_parse_time_reads_any_offset_as_utc() -> None:
    assert parse_time("2026-11-24T07:00:00+01:00") == datetime(2026, 11, 24, 6, tzinfo=UTC)
    assert parse_time("2026-11-24T06:00:00Z").tzinfo is UTC


@pytest.mark.parametrize(("text", "says"), [("2026-11-24T06:00:00", "offset from UTC"), ("noon", "ISO 8601")])
def test_parse_time_naive_or_no_time_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        parse_time(text)
