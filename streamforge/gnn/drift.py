"""Drift: are recent features still those that a model was trained on?

For each feature the population stability index (PSI) between the deciles of the training and the recent values.
A textbook bound (0.25) alone would always be passed: slow features stay in a few deciles for days. So a training
is also looked at in stretches as long as the recent one, and a feature has drifted when its PSI is beyond the bound
and, by a margin, beyond every stretch of the training.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from streamforge.gnn.features import FeatureSet
from streamforge.gnn.panel import FloatArray, IntArray

REFERENCE_FILE = "drift.json"
PSI_BOUND = 0.25
_SKIPPED = ("day_sin", "day_cos")
_EMPTY_RATIO = 1e-4
_STRETCHES_A_LENGTH = 12
_SEEN_MARGIN = 1.25


class FeatureReference(msgspec.Struct, frozen=True):
    """What the training values of one feature looked like.

    Args:
        edges: inner edges of the bins, the deciles.
        ratios: part of the values in each bin.
        limit: PSI beyond which recent values have drifted.
    """

    edges: tuple[float, ...]
    ratios: tuple[float, ...]
    limit: float


class DriftReference(msgspec.Struct, frozen=True):
    """What recent features are compared with.

    Args:
        recent_intervals: length of the recent stretch.
        features: by name.
    """

    recent_intervals: int
    features: Mapping[str, FeatureReference]


class FeatureDrift(msgspec.Struct, frozen=True):
    """PSI of one feature, and what it may be."""

    psi: float
    limit: float

    @property
    def drifted(self) -> bool:
        """Return whether it is more than it may be."""
        return self.psi > self.limit


def reference_of(features: FeatureSet, rows: IntArray, *, recent_intervals: int) -> DriftReference:
    """Describe the features of the training rows."""
    last = len(rows) - recent_intervals
    # Overlapping, and the last one with them: what the training ended with is no drift the moment after.
    starts = [*range(0, last, max(1, recent_intervals // _STRETCHES_A_LENGTH)), last]
    found = {}
    for name in features.names:
        if name in _SKIPPED:
            continue
        values = _values(features, rows, name)
        edges = np.unique(np.quantile(values, np.linspace(0.1, 0.9, 9)))
        ratios = _ratios(values, edges)
        seen = [psi(ratios, _ratios(_values(features, rows[i : i + recent_intervals], name), edges)) for i in starts]
        found[name] = FeatureReference(
            edges=tuple(edges.tolist()), ratios=tuple(ratios.tolist()), limit=max(PSI_BOUND, _SEEN_MARGIN * max(seen))
        )
    return DriftReference(recent_intervals, found)


def drift_of(features: FeatureSet, reference: DriftReference) -> dict[str, FeatureDrift]:
    """Compare the latest rows with the training; empty where there are fewer rows than the reference asks for."""
    rows = np.flatnonzero(features.known.any(axis=1))[-reference.recent_intervals :]
    if len(rows) < reference.recent_intervals:
        return {}
    found = {}
    for name, expected in reference.features.items():
        recent = _ratios(_values(features, rows, name), np.array(expected.edges))
        found[name] = FeatureDrift(psi(np.array(expected.ratios), recent), expected.limit)
    return found


def psi(expected: FloatArray, found: FloatArray) -> float:
    """Return the population stability index of two distributions over the same bins."""
    first, second = np.maximum(expected, _EMPTY_RATIO), np.maximum(found, _EMPTY_RATIO)
    return float(((second - first) * np.log(second / first)).sum())


def _values(features: FeatureSet, rows: IntArray, name: str) -> FloatArray:
    [column] = features.columns((name,))
    return features.values[rows][..., column][features.known[rows]]


def _ratios(values: FloatArray, edges: FloatArray) -> FloatArray:
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
    ratios: FloatArray = counts / max(1, len(values))
    return ratios
