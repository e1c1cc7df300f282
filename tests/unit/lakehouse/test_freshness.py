"""Freshness quantiles over commits, and the times in a snapshot's summary."""

from __future__ import annotations

import pyarrow as pa
import pytest

from streamforge.lakehouse.freshness import LatencyHistogram, time_summary

NOW_NS = 1_700_000_000_000_000_000


def test_quantiles_over_two_commits_are_within_two_percent() -> None:
    histogram = LatencyHistogram()
    histogram.add(pa.chunked_array([[NOW_NS - 1_000_000_000] * 98]), NOW_NS)
    histogram.add(pa.chunked_array([[NOW_NS - 5_000_000_000] * 2]), NOW_NS)
    assert histogram.quantile_s(0.5) == pytest.approx(1.0, rel=0.02)
    assert histogram.quantile_s(0.99) == pytest.approx(5.0, rel=0.02)


def test_clock_that_runs_behind_counts_as_fresh_and_extremes_do_not_fail() -> None:
    histogram = LatencyHistogram()
    histogram.add(pa.chunked_array([pa.array([NOW_NS + 10**12, 0, NOW_NS], pa.int64())]), NOW_NS)
    assert histogram.quantile_s(0.5) == pytest.approx(0.0001, rel=0.02)


def test_no_rows_have_no_quantile() -> None:
    assert LatencyHistogram().quantile_s(0.5) is None


def test_time_summary_has_least_and_greatest_of_the_columns_that_are_there() -> None:
    rows = pa.table({"ts_receive_ns": pa.array([5, 3, 4], pa.int64())})
    assert time_summary(rows) == {"streamforge.ts-receive-ns-min": "3", "streamforge.ts-receive-ns-max": "5"}
    assert time_summary(rows.slice(0, 0)) == {}
