"""Find the fewest faults that still show a failure: delta debugging, as of Zeller and Hildebrandt (2002), section 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.chaos.schedule import Fault


def shrink(faults: Sequence[Fault], fails: Callable[[Sequence[Fault]], bool], *, tries: int) -> list[Fault]:
    """Return fewer faults that fail as well.

    Timing is not repeated, so a part that passes may fail another time: what is left is short, not always shortest.

    Args:
        faults: that failed.
        fails: runs a part and returns whether it fails too.
        tries: most runs.
    """
    left, parts = list(faults), 2
    while len(left) > 1 and tries > 0:
        size = -(-len(left) // parts)
        chunks = [left[start : start + size] for start in range(0, len(left), size)]
        rests = [[item for item in left if item not in chunk] for chunk in chunks]
        for candidate in [*chunks, *(rests if parts > 2 else [])]:
            tries -= 1
            if fails(candidate):
                parts = 2 if candidate in chunks else max(parts - 1, 2)
                left = candidate
                break
            if tries == 0:
                break
        else:
            if parts >= len(left):
                break
            parts = min(2 * parts, len(left))
    return left
