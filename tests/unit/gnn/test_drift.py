"""Drift: what the training has seen is none, what it has not seen is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from streamforge.gnn.drift import PSI_BOUND, drift_of, psi, reference_of
from tests.models_support import made_of, make_bars

RECENT = 100


def test_psi_of_the_same_distribution_is_zero_and_of_another_is_not() -> None:
    same, other = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    assert psi(same, same) == 0.0
    assert psi(same, other) == pytest.approx(0.4 * np.log(1.8) + 0.4 * np.log(5.0))


def test_training_rows_have_not_drifted_but_louder_ones_have() -> None:
    features, _ = made_of(make_bars(intervals=600))
    reference = reference_of(features, np.arange(500), recent_intervals=RECENT)
    assert all(item.limit >= PSI_BOUND for item in reference.features.values())
    for end in range(RECENT, 501, 37):
        part = replace(features, values=features.values[:end], known=features.known[:end])
        seen = drift_of(part, reference)
        assert seen or end < 2 * RECENT
        assert not [name for name, item in seen.items() if item.drifted], end
    loud = features.values.copy()
    loud[..., features.columns(("volatility_1",))] += 3.0
    found = drift_of(replace(features, values=loud), reference)
    assert [name for name, item in found.items() if item.drifted and name == "volatility_1"]
    assert not found["return_1"].drifted


def test_fewer_recent_rows_than_the_reference_asks_for_say_nothing() -> None:
    long, _ = made_of(make_bars(intervals=600))
    short, _ = made_of(make_bars(intervals=60))
    assert drift_of(short, reference_of(long, np.arange(500), recent_intervals=RECENT)) == {}
