"""The pure part of a replay against plain Python: ranges as sets of offsets, the row index as a dictionary."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamforge.contracts import load_contracts
from streamforge.lakehouse.content_hash import ContentHash, row_hashes
from streamforge.lakehouse.remake import lineage_of
from streamforge.lakehouse.replay_plan import (
    SOURCE_COLUMNS,
    Comparison,
    RowIndex,
    gaps_between,
    index_columns,
    merged_ranges,
    parse_offsets,
)
from streamforge.offsets import OffsetRange
from streamforge.settings import Settings

CONTRACTS = load_contracts(Settings(_env_file=None).contracts_dir)  # type: ignore[call-arg]
LINEAGE = lineage_of(CONTRACTS, "trades")
SCHEMA = LINEAGE.contract.arrow_schema
TOPIC = "raw-trades"
HORIZON = 40
# How long drawing takes is the machine's affair.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=80)

RANGE = st.tuples(st.integers(0, 2), st.integers(0, HORIZON), st.integers(0, HORIZON)).map(
    lambda item: OffsetRange(TOPIC, item[0], min(item[1:]), max(item[1:]))
)
RANGES = st.lists(RANGE, max_size=6)
IDENTITY = st.tuples(st.integers(1, 2), st.integers(0, 2), st.integers(0, HORIZON - 1), st.integers(0, 3))


def offsets(ranges: Any, *, below: int = HORIZON) -> set[tuple[int, int]]:
    return {(each.partition, n) for each in ranges for n in range(each.start, min(each.end, below))}


def row(identity: tuple[int, int, int, int], size: int = 0, typed: int | None = 0) -> dict[str, Any]:
    values: dict[str, Any] = {
        field.name: {"string": "x", "large_string": "x"}.get(str(field.type), 1) for field in SCHEMA
    }
    values |= dict(zip(LINEAGE.columns, identity, strict=True), size=size)
    return values | dict.fromkeys(SOURCE_COLUMNS, typed)


def rows(items: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(items, schema=SCHEMA)


def index_of(items: list[dict[str, Any]]) -> RowIndex:
    table = rows(items)
    parts = [table.slice(start, 3) for start in range(0, len(items), 3)]
    hashes = [row_hashes(part, LINEAGE.compared) for part in parts]
    return RowIndex(LINEAGE, [part.select(index_columns(LINEAGE)) for part in parts], hashes)


@relaxed
@given(RANGES)
def test_merged_ranges_hold_the_same_offsets_once_and_apart(ranges: list[OffsetRange]) -> None:
    merged = merged_ranges(ranges)
    assert offsets(merged) == offsets(ranges)
    assert sum(map(len, merged)) == len(offsets(ranges))
    assert merged_ranges(merged) == merged
    for one, other in pairwise(merged):
        assert (one.partition, one.end) < (other.partition, other.start)


@relaxed
@given(RANGES)
def test_gaps_and_ranges_together_are_everything_once(ranges: list[OffsetRange]) -> None:
    merged = merged_ranges(ranges)
    gaps = gaps_between(merged)
    everything = {(each.partition, n) for each in merged for n in range(HORIZON)}
    assert offsets(gaps) | offsets(merged) == everything
    assert not offsets(gaps) & offsets(merged)


@relaxed
@given(st.lists(IDENTITY, max_size=20), RANGES, st.integers(1, 2))
def test_within_picks_exactly_the_rows_of_the_ranges(
    identities: list[tuple[int, int, int, int]], ranges: list[OffsetRange], epoch: int
) -> None:
    found = LINEAGE.within(rows([row(each) for each in identities]), epoch, ranges)
    assert found.tolist() == [
        each[0] == epoch and (each[1], each[2]) in offsets(ranges, below=HORIZON) for each in identities
    ]


@relaxed
@given(st.lists(IDENTITY, max_size=25, unique=True), st.lists(IDENTITY, max_size=25, unique=True), st.data())
def test_comparison_counts_what_a_dictionary_counts(
    now: list[tuple[int, int, int, int]], after: list[tuple[int, int, int, int]], data: st.DataObject
) -> None:
    there = {(1, *each[1:]): data.draw(st.integers(0, 1)) for each in now}
    made = {(1, *each[1:]): data.draw(st.integers(0, 1)) for each in after}
    comparison = Comparison(LINEAGE, index_of([row(each, size) for each, size in there.items()]))
    for partition in range(3):  # as the re-run comes: one topic-partition after the other, in offset order
        items = [row(each, made[each], None) for each in sorted(made) if each[1] == partition]
        comparison.add(rows(items), {"seen": len(items)})
    counts = comparison.counts()
    assert (counts.now, counts.after) == (len(there), len(made))
    assert counts.equal == sum(there.get(each) == size for each, size in made.items())
    assert counts.changed == sum(each in there and there[each] != size for each, size in made.items())
    assert counts.added == len(made.keys() - there.keys())
    assert counts.gone == len(there.keys() - made.keys())
    assert comparison.dropped["seen"] == len(made)
    hash_now = ContentHash.of_rows(row_hashes(rows([row(e, s) for e, s in there.items()]), LINEAGE.compared))
    assert (hash_now == comparison.hash_after) == (there == made)


@relaxed
@given(st.lists(IDENTITY, max_size=20, unique=True), st.lists(IDENTITY, min_size=1, max_size=20, unique=True))
def test_typed_positions_are_those_of_the_row_with_the_same_raw_identity(
    known: list[tuple[int, int, int, int]], asked: list[tuple[int, int, int, int]]
) -> None:
    places = {(1, *each[1:]): number for number, each in enumerate(known)}
    index = index_of([row(each, typed=number) for each, number in places.items()])
    wanted = [(1, 0, *each[2:]) for each in asked]  # a re-run comes from one topic-partition at a time
    table = rows([row(each) for each in wanted])
    positions = index.typed_positions(index.find(LINEAGE, table))
    expected = [places.get(each) for each in wanted]
    for name in SOURCE_COLUMNS:
        assert positions[name].to_pylist() == expected


@relaxed
@given(st.lists(RANGE.filter(len), max_size=5))
def test_offsets_as_text_are_read_back(ranges: list[OffsetRange]) -> None:
    assert parse_offsets([f"{each.partition}:{each.start}-{each.end}" for each in ranges], TOPIC) == ranges
