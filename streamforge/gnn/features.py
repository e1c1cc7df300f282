"""Features: what is known of each instrument when an interval ends, and the label that comes after.

Row t holds what the bars up to and with interval t say. Its label is the log volatility of interval t + 1.
Nothing of interval t + 1 or later is in row t: a property test changes the future and compares.

A limit: a bar is read as its latest revision says, also where that revision came long after interval t (a late trade,
a replay). A forecast made live saw the revision of its time, so where bars were mended, training and walk forward
know them better than a live forecast could.

Source: Corsi, "A Simple Approximate Long-Memory Model of Realized Volatility" (2009), for means over several
horizons; Alizadeh, Brandt, Diebold, "Range-Based Estimation of Stochastic Volatility Models" (2002), for the
log range as the thing to model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

from streamforge.gnn.panel import BoolArray, FloatArray, IntArray, Panel

_DAY_NS = 86_400_000_000_000

_RETURN_LIMIT = 8.0
"""Returns in units of volatility are cut here: one broken print must not carry a fit."""


class FeatureConfig(msgspec.Struct, frozen=True):
    """How features are made.

    Args:
        windows: intervals that log volatility is averaged over; the first is 1.
        full_window: a mean needs half of its window's values, but never more than half of so many: an instrument
            can be forecast long before its longest window is full.
    """

    windows: tuple[int, ...] = (1, 6, 24, 168)
    full_window: int = 6

    @property
    def history_intervals(self) -> int:
        """Return the intervals that a row looks back, with its own."""
        return max(self.windows) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the features, in their order."""
        own = [f"volatility_{window}" for window in self.windows]
        return (*own, "return_1", "abs_return_1", "volume_1", "market_volatility_1", "day_sin", "day_cos")

    @property
    def har_names(self) -> tuple[str, ...]:
        """Return the features that the HAR model uses: the means of log volatility."""
        return self.names[: len(self.windows)]


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Features and labels of N instruments at T times.

    Args:
        known: whether all features of an instrument are there; a row that is not known is neither trained
            on nor forecast.

    Shapes:
        ts_start_ns (T,) starts of the intervals that the features end with; values (T, N, F);
        labels (T, N), NaN where the next interval is unknown; known (T, N); log_volatility (T, N).
    """

    instruments: tuple[str, ...]
    interval_ns: int
    names: tuple[str, ...]
    ts_start_ns: IntArray
    values: FloatArray
    labels: FloatArray
    known: BoolArray
    log_volatility: FloatArray

    @property
    def label_start_ns(self) -> IntArray:
        """Return the start of the interval that each row's label is of: the end of the features."""
        return self.ts_start_ns + self.interval_ns

    @property
    def labelled(self) -> BoolArray:
        """Return where features and label are known, (T, N)."""
        return self.known & np.isfinite(self.labels)

    def columns(self, names: tuple[str, ...]) -> list[int]:
        """Return the places of features in the last axis of `values`."""
        return [self.names.index(name) for name in names]


def features_of(panel: Panel, config: FeatureConfig) -> FeatureSet:
    """Make features and labels of a panel."""
    log_volatility = panel.log_volatility
    means = [
        trailing_mean(log_volatility, window, least=max(1, min(window, config.full_window) // 2))
        for window in config.windows
    ]
    returns = np.full_like(panel.close, np.nan)
    returns[1:] = np.diff(np.log(panel.close), axis=0)
    # Without the bar before, the return is not known; 0 is what is expected of it.
    scaled = np.nan_to_num(returns / np.exp(means[0 if len(means) == 1 else 1]), nan=0.0)
    scaled = np.clip(scaled, -_RETURN_LIMIT, _RETURN_LIMIT)
    usual_volume = trailing_mean(panel.log_volume, max(config.windows), least=1)
    volume = np.nan_to_num(panel.log_volume - usual_volume, nan=0.0)
    day_sin, day_cos = _time_of_day(panel)
    shape = log_volatility.shape
    columns = [
        *means,
        scaled,
        np.abs(scaled),
        volume,
        np.broadcast_to(_mean_of_known(log_volatility)[:, None], shape),
        np.broadcast_to(day_sin[:, None], shape),
        np.broadcast_to(day_cos[:, None], shape),
    ]
    values = np.stack(columns, axis=-1)
    labels = np.full_like(log_volatility, np.nan)
    labels[:-1] = log_volatility[1:]
    return FeatureSet(
        instruments=panel.instruments,
        interval_ns=panel.interval_ns,
        names=config.names,
        ts_start_ns=panel.ts_start_ns,
        values=values,
        labels=labels,
        known=np.isfinite(values).all(axis=-1),
        log_volatility=log_volatility,
    )


def trailing_mean(values: FloatArray, window: int, *, least: int) -> FloatArray:
    """Return the mean over the last `window` rows with this one; NaN where fewer than `least` are finite."""
    if window == 1:
        return values.copy()
    padded = np.concatenate([np.full((window - 1, values.shape[1]), np.nan), values])
    views = np.lib.stride_tricks.sliding_window_view(np.nan_to_num(padded, nan=0.0), window, axis=0)
    counts = np.lib.stride_tricks.sliding_window_view(np.isfinite(padded), window, axis=0).sum(axis=-1)
    means: FloatArray = np.where(counts >= least, views.sum(axis=-1) / np.maximum(counts, 1), np.nan)
    return means


def _mean_of_known(values: FloatArray) -> FloatArray:
    """Return the mean over instruments of each row; NaN where none has a value."""
    counts = np.isfinite(values).sum(axis=1)
    means: FloatArray = np.where(counts > 0, np.nan_to_num(values, nan=0.0).sum(axis=1) / np.maximum(counts, 1), np.nan)
    return means


def _time_of_day(panel: Panel) -> tuple[FloatArray, FloatArray]:
    """Return sine and cosine of the time of day of the interval that is forecast."""
    angle = (panel.ts_start_ns + panel.interval_ns) % _DAY_NS * (2 * math.pi / _DAY_NS)
    return np.sin(angle), np.cos(angle)
