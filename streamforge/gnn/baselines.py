"""What the graph model must beat: last value, HAR, a linear model and LightGBM, on the same rows.

Each learns from training rows only and predicts log volatility of the next interval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from streamforge.gnn.features import FeatureSet
from streamforge.gnn.panel import FloatArray, IntArray
from streamforge.gnn.training import TrainingConfig, fit_and_stop_rows, scaling_of

Predict = Callable[[IntArray], FloatArray]
"""Returns predictions (len(rows), N) for rows."""

_RIDGE = 1e-3
_BOOST_ROUNDS = 400
_BOOST_PATIENCE = 20


def last_value(features: FeatureSet) -> Predict:
    """Return the model that says: as in the interval before."""
    [column] = features.columns(("volatility_1",))
    return lambda rows: features.values[rows][..., column]


def linear(features: FeatureSet, rows: IntArray, names: tuple[str, ...]) -> Predict:
    """Fit a least-squares model of the features `names` on `rows`; with the means of log volatility it is HAR."""
    scaling = scaling_of(features, rows)
    columns = features.columns(names)
    scaled = scaling.scale(features.values)[..., columns]
    chosen = features.labelled[rows]
    inputs, labels = scaled[rows][chosen], features.labels[rows][chosen]
    gram = inputs.T @ inputs + _RIDGE * np.eye(len(columns))
    weights = np.linalg.solve(gram, inputs.T @ (labels - scaling.label_mean))
    return lambda wanted: scaled[wanted] @ weights + scaling.label_mean


def boosted(features: FeatureSet, rows: IntArray, config: TrainingConfig) -> Predict:
    """Fit LightGBM on all features and the instrument, stopped by the same validation rows as the graph model."""
    import lightgbm  # noqa: PLC0415

    fit_rows, stop_rows = fit_and_stop_rows(features, rows, config.validation_ratio)
    numbers = np.broadcast_to(np.arange(len(features.instruments), dtype=np.float64)[None, :], features.labels.shape)
    inputs = np.concatenate([features.values, numbers[..., None]], axis=-1)
    labelled = features.labelled

    def dataset(part: IntArray, reference: lightgbm.Dataset | None = None) -> lightgbm.Dataset:
        chosen = labelled[part]
        return lightgbm.Dataset(
            inputs[part][chosen],
            features.labels[part][chosen],
            categorical_feature=[inputs.shape[-1] - 1],
            reference=reference,
            free_raw_data=True,
        )

    parameters = {
        "objective": "regression",
        "learning_rate": 0.05,
        "num_leaves": 31,
        "min_data_in_leaf": 50,
        "lambda_l2": 1.0,
        "seed": config.seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": config.threads,
        "verbosity": -1,
    }
    fitted_on = dataset(fit_rows)
    booster = lightgbm.train(
        parameters,
        fitted_on,
        num_boost_round=_BOOST_ROUNDS,
        valid_sets=[dataset(stop_rows, fitted_on)],
        callbacks=[lightgbm.early_stopping(_BOOST_PATIENCE, verbose=False)],
    )

    def predict(wanted: IntArray) -> FloatArray:
        flat = inputs[wanted].reshape(-1, inputs.shape[-1])
        return np.asarray(booster.predict(flat), dtype=np.float64).reshape(len(wanted), -1)

    return predict
