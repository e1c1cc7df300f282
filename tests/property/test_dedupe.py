"""The interval set against a plain set of ids."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamforge.errors import DecodeError
from streamforge.market.dedupe import MAX_INTERVALS, SeenIds, Verdict

IDS = st.lists(st.integers(0, 60), max_size=200)
MANY_IDS = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 100), max_size=100)


@given(IDS)
def test_seen_ids_unbounded_tell_new_from_duplicate_like_a_set(ids: list[int]) -> None:
    seen, plain = SeenIds(max_intervals=None), set[int]()
    for number in ids:
        expected = Verdict.DUPLICATE if number in plain else Verdict.NEW
        assert seen.add(number) is expected
        plain.add(number)
    assert {n for start, end in seen.intervals() for n in range(start, end)} == plain


@given(MANY_IDS, st.integers(1, 5))
def test_seen_ids_bounded_never_call_an_id_new_twice_nor_a_new_one_duplicate(ids: list[int], bound: int) -> None:
    seen, plain = SeenIds(max_intervals=bound), set[int]()
    for number in ids:
        floor = seen.floor
        verdict = seen.add(number)
        if verdict is Verdict.TOO_OLD:
            assert number < floor
            continue
        assert verdict is (Verdict.DUPLICATE if number in plain else Verdict.NEW)
        plain.add(number)
        intervals = list(seen.intervals())
        assert len(intervals) <= bound
        assert all(a[1] < b[0] for a, b in itertools.pairwise(intervals))


@given(MANY_IDS, st.integers(1, 5))
def test_seen_ids_survive_their_text(ids: list[int], bound: int) -> None:
    seen = SeenIds.of(ids, max_intervals=bound)
    back = SeenIds.from_text(seen.to_text(), max_intervals=bound)
    assert back == seen
    assert [back.add(number) for number in ids] == [seen.add(number) for number in ids]


@given(IDS, IDS)
def test_seen_ids_copy_leaves_the_first_as_it_was(ids: list[int], more: list[int]) -> None:
    seen = SeenIds.of(ids)
    text = seen.to_text()
    copy = seen.copy()
    for number in more:
        copy.add(number)
    assert seen.to_text() == text


@pytest.mark.parametrize("text", ["", "[]", "{}", "[0,1]", "[0,5,5]", "[0,1,4,3,9]", "[7,1,2]", '["a"]', "null"])
def test_seen_ids_of_a_bad_text_are_refused(text: str) -> None:
    with pytest.raises(DecodeError):
        SeenIds.from_text(text)


def test_seen_ids_without_a_bound_forget_nothing() -> None:
    ids = range(0, 4 * MAX_INTERVALS, 2)
    seen = SeenIds.of(reversed(ids), max_intervals=None).copy()
    assert seen.floor == 0
    assert len(list(seen.intervals())) == 2 * MAX_INTERVALS
    assert {seen.add(number) for number in ids} == {Verdict.DUPLICATE}
    assert SeenIds.from_text(seen.to_text(), max_intervals=None) == seen
    assert SeenIds.of(ids).floor > 0, "the test has more gaps than are kept by default"
