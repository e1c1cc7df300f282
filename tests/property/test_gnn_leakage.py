"""No future in the past: whatever happens after time t, no feature and no graph at t changes.

Labels are the one thing that does look ahead, and they begin where their features end.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given, settings
from hypothesis import strategies as st

from streamforge.gnn.baselines import linear
from streamforge.gnn.evaluation import WalkConfig, blocks_of
from streamforge.gnn.features import FeatureSet, features_of
from streamforge.gnn.graph import MarketGraphs
from streamforge.gnn.panel import panel_of
from streamforge.gnn.training import fit_and_stop_rows, scaling_of
from tests.models_support import FIRST_NS, HOUR_NS, RECIPE, made_of, make_bars

INTERVALS = 300


@cache
def _bars() -> pa.Table:
    return make_bars(intervals=INTERVALS)


@cache
def _made() -> tuple[FeatureSet, MarketGraphs]:
    return made_of(_bars())


def _changed_after(bars: pa.Table, row: int, *, seed: int, keep_ratio: float) -> pa.Table:
    """Return bars whose values after the end of `row` are others, some of them gone."""
    random = np.random.default_rng(seed)
    later = bars["ts_start_ns"].to_numpy() > FIRST_NS + row * HOUR_NS
    factors = np.where(later, np.exp(random.normal(0.0, 3.0, bars.num_rows)), 1.0)
    for name in ("high", "close", "volume"):
        values = pc.cast(bars[name], pa.float64()).to_numpy() * factors
        exact = pc.if_else(pa.array(later), pc.cast(pa.array(np.round(values, 9)), pa.decimal128(38, 18)), bars[name])
        bars = bars.set_column(bars.column_names.index(name), name, exact)
    return bars.filter(pa.array(~later | (random.random(bars.num_rows) < keep_ratio)))


@settings(max_examples=25, deadline=None)
@given(row=st.integers(30, INTERVALS - 2), seed=st.integers(0, 2**16), keep_ratio=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_changed_future_changes_no_feature_and_no_graph(row: int, seed: int, keep_ratio: float) -> None:
    features, graphs = _made()
    others, other_graphs = made_of(_changed_after(_bars(), row, seed=seed, keep_ratio=keep_ratio))
    assert others.ts_start_ns[: row + 1].tolist() == features.ts_start_ns[: row + 1].tolist()
    np.testing.assert_array_equal(others.values[: row + 1], features.values[: row + 1])
    np.testing.assert_array_equal(others.known[: row + 1], features.known[: row + 1])
    # The labels up to the row before are bars up to this row.
    np.testing.assert_array_equal(others.labels[:row], features.labels[:row])
    for name in ("neighbours", "weights"):
        now, then = getattr(other_graphs, name), getattr(graphs, name)
        np.testing.assert_array_equal(now[other_graphs.graph_of_row[: row + 1]], then[graphs.graph_of_row[: row + 1]])


def test_the_change_reaches_what_comes_after() -> None:
    """The property above would hold of features that look at nothing."""
    features, graphs = _made()
    others, other_graphs = made_of(_changed_after(_bars(), 200, seed=1, keep_ratio=1.0))
    assert not np.array_equal(others.values[201], features.values[201])
    assert not np.array_equal(others.labels[200], features.labels[200])
    last = (graphs.graph_of_row[-1], other_graphs.graph_of_row[-1])
    assert not np.array_equal(graphs.weights[last[0]], other_graphs.weights[last[1]])


def test_labels_begin_where_features_end() -> None:
    features, graphs = _made()
    np.testing.assert_array_equal(features.label_start_ns, features.ts_start_ns + HOUR_NS)
    np.testing.assert_array_equal(features.labels[:-1], features.log_volatility[1:])
    assert np.isnan(features.labels[-1]).all()
    assert (graphs.made_ns[graphs.graph_of_row] <= features.label_start_ns).all()


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 120))
def test_where_the_data_begin_changes_nothing_once_the_history_is_full(start: int) -> None:
    """A live window gives the same as the whole history: the graph's places on the time axis are fixed."""
    features, graphs = _made()
    later = _bars().filter(pc.greater_equal(_bars()["ts_start_ns"], FIRST_NS + start * HOUR_NS))
    others, other_graphs = made_of(later)
    full = RECIPE.history_intervals
    rows = np.arange(len(others.ts_start_ns))[full - 1 :]
    # Not exactly: the first return is unknown where its bar before was cut off, and sums round differently.
    np.testing.assert_allclose(others.values[rows], features.values[rows + start], atol=1e-9)
    np.testing.assert_array_equal(
        other_graphs.neighbours[other_graphs.graph_of_row[rows]], graphs.neighbours[graphs.graph_of_row[rows + start]]
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_tested_rows_change_nothing_that_is_fitted(seed: int) -> None:
    """Scaling and models of a block come from its training rows, whatever the test rows are."""
    features, _ = _made()
    block = blocks_of(np.flatnonzero(features.labelled.any(axis=1)), WalkConfig(least_train=60))[0]
    edge = int(block.train_rows[-1]) + 1
    others = features_of(panel_of(_changed_after(_bars(), edge, seed=seed, keep_ratio=1.0)), RECIPE.features)
    fit_rows, _ = fit_and_stop_rows(features, block.train_rows, RECIPE.training.validation_ratio)
    assert scaling_of(others, fit_rows) == scaling_of(features, fit_rows)
    early = block.train_rows[:20]
    fitted = [linear(each, block.train_rows, each.names)(early) for each in (features, others)]
    np.testing.assert_array_equal(fitted[0], fitted[1])
