"""Memory in the always-on processes: Python's garbage collector, and where Arrow takes its memory from.

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


def plain_arrow_memory() -> None:
    """Have Arrow take its memory from the C library, as Python does.

    Its own pool (mimalloc) gives pages back to the system after each fetch and takes them again with the next,
    beside the pages that Python keeps: a quarter more CPU and a third more memory for the writer (ADR 0086).
    """
    import pyarrow as pa  # noqa: PLC0415 - not every process has Arrow loaded

    pa.set_memory_pool(pa.system_memory_pool())
