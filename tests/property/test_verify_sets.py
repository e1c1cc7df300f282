"""The sets that `verify` compares agree with Python's own."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamforge.intervals import size, subtract, union
from streamforge.lakehouse.identities import WINDOW, Spill, Tally, compare_bucket, within
from streamforge.lakehouse.verify_ledger import IdSets, Stream, compare_ids

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda p: (p[0], p[0] + p[1])), max_size=12)
PLACES = st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 5, WINDOW - 1, WINDOW, 3 * WINDOW]), st.integers(0, 2))
ROWS = st.lists(st.tuples(PLACES, st.integers(0, 1)), max_size=40)


def _numbers(intervals: list[tuple[int, int]]) -> set[int]:
    return {number for first, last in intervals for number in range(first, last + 1)}


@given(INTERVALS)
def test_union_is_the_set_in_order_without_touching_intervals(intervals: list[tuple[int, int]]) -> None:
    merged = union(intervals)
    assert _numbers(merged) == _numbers(intervals)
    assert size(merged) == len(_numbers(intervals))
    assert all(before[1] + 1 < after[0] for before, after in pairwise(merged))


@given(INTERVALS, INTERVALS)
def test_subtract_is_the_difference(numbers: list[tuple[int, int]], taken: list[tuple[int, int]]) -> None:
    assert _numbers(subtract(union(numbers), union(taken))) == _numbers(numbers) - _numbers(taken)


@settings(deadline=None)
@given(expected=ROWS, actual=ROWS, buffer_rows=st.sampled_from([0, 3, 1000]))
def test_comparison_counts_like_multisets(
    tmp_path_factory: pytest.TempPathFactory,
    expected: list[tuple[tuple[int, int, int], int]],
    actual: list[tuple[tuple[int, int, int], int]],
    buffer_rows: int,
) -> None:
    wanted = dict(expected)
    sides = []
    for rows in (list(wanted.items()), actual):
        spill = Spill(_folder(tmp_path_factory), buffer_rows=buffer_rows)
        for part in (rows[::2], rows[1::2]):
            columns = np.array([[*place, value] for place, value in part], np.int64).reshape(-1, 4).T
            spill.add(columns[0], columns[1], columns[2], columns[3].astype(np.uint64))
        sides.append(spill)
    tally = Tally()
    for bucket in sorted(sides[0].buckets() | sides[1].buckets()):
        compare_bucket(tally, bucket, sides[0].take(bucket), sides[1].take(bucket))
    found = Counter(place for place, _ in actual)
    assert tally.records == len(wanted)
    assert tally.rows == len(actual)
    assert tally.lost == len(wanted.keys() - found.keys())
    assert tally.unexpected == len(found.keys() - wanted.keys())
    assert tally.doubled == sum(count - 1 for count in found.values())
    assert tally.different == len({p for p, value in actual if p in wanted and wanted[p] != value})
    assert tally.is_clean is (not any(tally.examples.values()))
    for kind, places in tally.examples.items():
        assert 0 < len(places) <= getattr(tally, kind)


def test_rows_are_cut_by_offset_and_named_by_place(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill", buffer_rows=0)
    offsets = np.array([WINDOW, WINDOW + 1, WINDOW + 2], np.int64)
    spill.add(np.full(3, 7, np.int64), offsets, np.array([0, 1, 2], np.int64), np.zeros(3, np.uint64))
    [bucket] = spill.buckets()
    rows = within(spill.take(bucket), bucket, WINDOW + 1, WINDOW + 2)
    assert [bucket.place(int(key)) for key in rows["key"]] == [f"7:{WINDOW + 1}:1"]


@given(INTERVALS, INTERVALS, INTERVALS)
def test_every_sent_id_is_counted_once(
    sent: list[tuple[int, int]], raw: list[tuple[int, int]], gaps: list[tuple[int, int]]
) -> None:
    stream = Stream("BTCUSDT", "trade")
    sets = [IdSets() for _ in range(4)]
    for target, intervals in zip(sets, (sent, [], raw, gaps), strict=True):
        for first, last in intervals:
            target.add(stream, first, last)
    found = compare_ids(*sets)
    ids, held, covered = _numbers(sent), _numbers(raw), _numbers(gaps)
    last_raw = max(held, default=-1)
    missing = ids - held
    assert (found.sent, found.in_raw, found.explained) == (len(ids), len(ids & held), len(missing & covered))
    assert found.unexplained == len({number for number in missing - covered if number <= last_raw})
    assert found.after_last_raw == len({number for number in missing - covered if number > last_raw})


def _folder(factory: pytest.TempPathFactory) -> Path:
    return factory.mktemp("spill") / "files"
