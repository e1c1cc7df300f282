"""Forecasts of a trained model: bars in, volatility of each instrument's next interval out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pyarrow as pa

from streamforge.gnn.features import features_of
from streamforge.gnn.graph import graphs_of
from streamforge.gnn.panel import panel_of

if TYPE_CHECKING:
    from streamforge.gnn.training import TrainedModel


class InstrumentForecast(msgspec.Struct, frozen=True):
    """Volatility that is expected of one instrument in one interval.

    Args:
        ts_start_ns: start of the interval that is forecast: the end of the last interval that was used.
        volatility: Parkinson's, a fraction of the price over the interval.
    """

    instrument: str
    ts_start_ns: int
    volatility: float


def forecast(model: TrainedModel, bars: pa.Table) -> list[InstrumentForecast]:
    """Forecast the interval after the last complete one in `bars`, of each instrument whose features are known.

    The result depends on nothing but `bars`: their order, and what lies further back than the model looks, change
    nothing (apart from rounding).

    Args:
        model: what to forecast with.
        bars: see `panel_of`; bars finer than the model's intervals are put together.
    """
    history = model.recipe.history_intervals
    panel = panel_of(bars, interval_ns=model.interval_ns, max_intervals=history)
    if len(panel.ts_start_ns) == 0:
        return []
    features = features_of(panel, model.recipe.features)
    graphs = graphs_of(features, model.recipe.graph)
    last = np.array([len(panel.ts_start_ns) - 1], dtype=np.int64)
    [predicted] = model.predict(features, graphs, last)
    ts_start_ns = int(features.label_start_ns[-1])
    return [
        InstrumentForecast(instrument, ts_start_ns, math.exp(value))
        for instrument, value in zip(features.instruments, predicted, strict=True)
        if math.isfinite(value)
    ]
