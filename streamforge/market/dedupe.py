"""The set of venue ids seen of one instrument, as intervals: a venue's ids run in a row, so the set is small."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from enum import StrEnum

import msgspec

from streamforge.errors import DecodeError

MAX_INTERVALS = 1_000


class Verdict(StrEnum):
    """What an id is to the set."""

    NEW = "new"
    DUPLICATE = "duplicate"
    TOO_OLD = "too_old"


class SeenIds:
    """Ids seen, as half-open intervals `[start, end)` in rising order, and a floor.

    The set is bounded: with more than `max_intervals` the lowest is forgotten and the floor rises to its
    end. An id below the floor may have been seen or not: it is `too_old`, and never a silent duplicate.
    With None for `max_intervals` nothing is ever forgotten.
    """

    __slots__ = ("_ends", "_floor", "_max_intervals", "_starts")

    def __init__(self, *, max_intervals: int | None = MAX_INTERVALS) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._floor = 0
        self._max_intervals = max_intervals

    @classmethod
    def of(cls, ids: Iterable[int], *, max_intervals: int | None = MAX_INTERVALS) -> SeenIds:
        """Return the set of `ids`."""
        seen = cls(max_intervals=max_intervals)
        for number in ids:
            seen.add(number)
        return seen

    @classmethod
    def from_text(cls, text: str, *, max_intervals: int | None = MAX_INTERVALS) -> SeenIds:
        """Return the set that `to_text` wrote.

        Raises:
            DecodeError: it is not such a text.
        """
        try:
            floor, *bounds = msgspec.json.decode(text, type=list[int])
        except (msgspec.MsgspecError, ValueError) as error:
            raise DecodeError("bad_state", f"expected [floor, start, end, ...], found {text[:100]!r}") from error
        if len(bounds) % 2 or any(a >= b for a, b in zip([floor - 1, *bounds], bounds, strict=False)):
            raise DecodeError("bad_state", f"expected rising interval bounds above the floor, found {text[:100]!r}")
        seen = cls(max_intervals=max_intervals)
        seen._floor, seen._starts, seen._ends = floor, bounds[::2], bounds[1::2]
        return seen

    def to_text(self) -> str:
        """Return the set as compact JSON: `[floor, start, end, start, end, ...]`."""
        bounds = [self._floor]
        for start, end in zip(self._starts, self._ends, strict=True):
            bounds += (start, end)
        return msgspec.json.encode(bounds).decode()

    def copy(self) -> SeenIds:
        """Return a set of its own with the same ids."""
        other = SeenIds(max_intervals=self._max_intervals)
        other._starts, other._ends, other._floor = self._starts.copy(), self._ends.copy(), self._floor
        return other

    def add(self, number: int) -> Verdict:
        """Add an id and return what it was: new, seen before, or below what is remembered."""
        ends = self._ends
        if ends and number == ends[-1]:
            ends[-1] += 1
            return Verdict.NEW
        if number < self._floor:
            return Verdict.TOO_OLD
        starts = self._starts
        index = bisect_right(starts, number)
        if index and number < ends[index - 1]:
            return Verdict.DUPLICATE
        joins_before = index > 0 and ends[index - 1] == number
        joins_after = index < len(starts) and starts[index] == number + 1
        if joins_before and joins_after:
            ends[index - 1] = ends.pop(index)
            del starts[index]
        elif joins_before:
            ends[index - 1] += 1
        elif joins_after:
            starts[index] -= 1
        else:
            starts.insert(index, number)
            ends.insert(index, number + 1)
            self._forget()
        return Verdict.NEW

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yield the intervals `[start, end)` in rising order."""
        return zip(self._starts, self._ends, strict=True)

    @property
    def floor(self) -> int:
        """Return the first id about which the set can tell."""
        return self._floor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SeenIds):
            return NotImplemented
        return (self._floor, self._starts, self._ends) == (other._floor, other._starts, other._ends)

    def __hash__(self) -> int:
        return hash(self.to_text())

    def __repr__(self) -> str:
        return f"SeenIds({self.to_text()})"

    def _forget(self) -> None:
        if self._max_intervals is None:
            return
        while len(self._starts) > self._max_intervals:
            del self._starts[0]
            self._floor = self._ends.pop(0)
