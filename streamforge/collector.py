"""Python's garbage collector in the always-on processes.

A fetch makes tens of thousands of short-lived lists and tuples, none of them in a cycle. With Python's own
threshold of 700 the collector looks through them again and again and finds nothing; `benchmarks/README.md` has the
figures. It still runs, so a cycle does not stay for ever.
"""

from __future__ import annotations

import gc

YOUNG_THRESHOLD = 100_000
OLDER_THRESHOLD = 20


def calm_collector() -> None:
    """Freeze what the start has made, and look for cycles a hundred times less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_THRESHOLD, OLDER_THRESHOLD, OLDER_THRESHOLD)
