"""Sets of whole numbers as sorted, disjoint, not touching intervals `[first, last]`, both inclusive. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the numbers that lie in any of `intervals`, which may overlap and stand in any order."""
    merged: list[Interval] = []
    for first, last in sorted(intervals):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def subtract(numbers: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """Return the numbers of one set that are not in the other; both as `union` gives them."""
    left: list[Interval] = []
    index = 0
    for first, last in numbers:
        start = first
        while index < len(taken) and taken[index][1] < start:
            index += 1
        at = index
        while at < len(taken) and taken[at][0] <= last:
            if start < taken[at][0]:
                left.append((start, taken[at][0] - 1))
            start = max(start, taken[at][1] + 1)
            at += 1
        if start <= last:
            left.append((start, last))
    return left


def size(numbers: Iterable[Interval]) -> int:
    """Return how many numbers the set has."""
    return sum(last - first + 1 for first, last in numbers)
