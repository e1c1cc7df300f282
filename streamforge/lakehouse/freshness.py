"""Freshness of committed rows: commit time minus receive or event time, as quantiles to within 2 %."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EVENT_COLUMN = "ts_event_ns"
RECEIVE_COLUMN = "ts_receive_ns"

_BUCKETS_PER_E = 50
_FLOOR_MS = 0.1
_NS_PER_MS = 1e6


@dataclass(slots=True)
class LatencyHistogram:
    """Counts latencies in buckets of 2 %, so that quantiles over many commits need no rows.

    Latencies below 0.1 ms, negative ones of clocks that disagree included, count as 0.1 ms.
    """

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, times_ns: pa.ChunkedArray[Any], now_ns: int) -> None:
        """Count the ages of `times_ns` at `now_ns`."""
        ages_ms: Any = pc.divide(
            pc.subtract(pa.scalar(now_ns), times_ns).cast(pa.float64(), safe=False), pa.scalar(_NS_PER_MS)
        )
        logs = pc.ln(pc.max_element_wise(ages_ms, pa.scalar(_FLOOR_MS)))
        buckets = pc.round(pc.multiply(logs, float(_BUCKETS_PER_E))).cast(pa.int32())
        for item in pc.value_counts(buckets).to_pylist():
            self.counts[item["values"]] += item["counts"]

    def quantile_s(self, q: float) -> float | None:
        """Return the latency in seconds below which the share `q` of rows lies; None without rows."""
        total = sum(self.counts.values())
        if not total:
            return None
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= q * total:
                return round(math.exp(bucket / _BUCKETS_PER_E) / 1e3, 6)
        return None  # pragma: no cover


def time_summary(rows: pa.Table) -> dict[str, str]:
    """Return least and greatest receive and event time of rows, for the summary of their table snapshot."""
    summary = {}
    for column in (RECEIVE_COLUMN, EVENT_COLUMN):
        if column in rows.column_names and rows.num_rows:
            bounds: Any = pc.min_max(rows[column]).as_py()
            name = column.replace("_", "-")
            summary[f"streamforge.{name}-min"] = str(bounds["min"])
            summary[f"streamforge.{name}-max"] = str(bounds["max"])
    return summary
