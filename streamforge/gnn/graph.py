"""Market graphs: who moves with whom, by rolling correlation of log volatility, past data only.

A graph holds for `every` intervals. Graphs are made at fixed places of the time axis (multiples of `every`
intervals since 1970), never relative to where the data begin, so that training and inference see the same
graph at the same time. The graph that a row t uses was made from rows up to t at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from streamforge.gnn.features import FeatureSet
from streamforge.gnn.panel import FloatArray, IntArray

NO_NEIGHBOUR = -1


class GraphConfig(msgspec.Struct, frozen=True):
    """How graphs are made.

    Args:
        window: intervals that a correlation is taken over.
        every: intervals between two graphs.
        neighbours: edges into each instrument, from those that correlate most.
        least: intervals that an instrument must have within the window to have edges.
    """

    window: int = 168
    every: int = 24
    neighbours: int = 5
    least: int = 48

    @property
    def history_intervals(self) -> int:
        """Return the intervals that the graph of a row looks back, with the row's own."""
        return self.window + self.every


@dataclass(frozen=True, slots=True)
class MarketGraphs:
    """G graphs of N instruments, and which of them holds in each of T rows.

    Args:
        made_ns: end of the last interval that each graph is made from.
        graph_of_row: index of the graph of each row.
        neighbours: instruments with edges into each instrument, `NO_NEIGHBOUR` where there are fewer.
        weights: their correlations, 0 where there is no neighbour.

    Shapes:
        made_ns (G,); graph_of_row (T,); neighbours and weights (G, N, K).
    """

    made_ns: IntArray
    graph_of_row: IntArray
    neighbours: IntArray
    weights: FloatArray

    @property
    def edges(self) -> int:
        """Return the number of edges of all graphs."""
        return int((self.neighbours != NO_NEIGHBOUR).sum())


def graphs_of(features: FeatureSet, config: GraphConfig) -> MarketGraphs:
    """Make the graphs of all rows of `features`."""
    numbers = (features.ts_start_ns // features.interval_ns + 1) // config.every
    kept, graph_of_row = np.unique(numbers, return_inverse=True)
    found = [
        _graph(features.log_volatility[_window(features, int(number), config)], config)
        if len(features.instruments) > 1
        else _no_graph(len(features.instruments), config)
        for number in kept
    ]
    shape = (0, len(features.instruments), config.neighbours)
    return MarketGraphs(
        made_ns=kept * config.every * features.interval_ns,
        graph_of_row=graph_of_row.astype(np.int64),
        neighbours=np.stack([item[0] for item in found]) if found else np.empty(shape, np.int64),
        weights=np.stack([item[1] for item in found]) if found else np.empty(shape),
    )


def _window(features: FeatureSet, number: int, config: GraphConfig) -> slice:
    """Return the rows that graph `number` is made from: those that end at its time or before."""
    end_ns = number * config.every * features.interval_ns
    end = int(np.searchsorted(features.ts_start_ns, end_ns))
    return slice(max(0, end - config.window), end)


def _graph(log_volatility: FloatArray, config: GraphConfig) -> tuple[IntArray, FloatArray]:
    present = np.isfinite(log_volatility)
    enough = present.sum(axis=0) >= min(config.least, config.window)
    correlation = _correlation(log_volatility, present)
    correlation[~enough, :] = correlation[:, ~enough] = 0.0
    np.fill_diagonal(correlation, 0.0)
    strength = np.abs(correlation)
    count = min(config.neighbours, len(strength) - 1)
    order = np.argsort(-strength, axis=1, kind="stable")[:, :count]
    weights = np.take_along_axis(correlation, order, axis=1)
    neighbours, padded = _no_graph(len(strength), config)
    neighbours[:, :count] = np.where(weights != 0.0, order, NO_NEIGHBOUR)
    padded[:, :count] = weights
    return neighbours, padded


def _correlation(values: FloatArray, present: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> FloatArray:
    """Return correlations over the window; a missing value counts as the instrument's mean."""
    counts = np.maximum(present.sum(axis=0), 1)
    means = np.where(present, values, 0.0).sum(axis=0) / counts
    centred = np.where(present, values - means, 0.0)
    norms = np.sqrt((centred**2).sum(axis=0))
    scaled = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    correlation: FloatArray = scaled.T @ scaled
    return correlation


def _no_graph(instruments: int, config: GraphConfig) -> tuple[IntArray, FloatArray]:
    shape = (instruments, config.neighbours)
    return np.full(shape, NO_NEIGHBOUR, np.int64), np.zeros(shape)
