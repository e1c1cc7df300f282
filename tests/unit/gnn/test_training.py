"""The graph model learns what is there, nothing where nothing is, and the same twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.compute as pc
import pytest

pytest.importorskip("torch", reason="the dependency group ml is not installed")

from streamforge.errors import ConfigurationError, NotEnoughDataError
from streamforge.gnn.baselines import boosted, last_value, linear
from streamforge.gnn.evaluation import score
from streamforge.gnn.features import FeatureSet
from streamforge.gnn.forecast import InstrumentForecast, forecast
from streamforge.gnn.graph import NO_NEIGHBOUR, MarketGraphs
from streamforge.gnn.synthetic import SyntheticMarket
from streamforge.gnn.training import CONFIG_FILE, WEIGHTS_FILE, TrainedModel, load_model, save_model, train
from tests.models_support import FIRST_NS, HOUR_NS, RECIPE, made_of, make_bars

INTERVALS = 700
TRAIN_ROWS = np.arange(24, 500)
TEST_ROWS = np.arange(530, INTERVALS - 1)


@pytest.fixture(scope="module")
def made() -> tuple[FeatureSet, MarketGraphs]:
    return made_of(make_bars(intervals=INTERVALS))


@pytest.fixture(scope="module")
def model(made: tuple[FeatureSet, MarketGraphs]) -> TrainedModel:
    return train(*made, TRAIN_ROWS, RECIPE)


def test_where_volatility_spills_over_the_graph_model_beats_every_baseline(
    made: tuple[FeatureSet, MarketGraphs], model: TrainedModel
) -> None:
    features, graphs = made
    baselines = [
        last_value(features)(TEST_ROWS),
        linear(features, TRAIN_ROWS, RECIPE.features.har_names)(TEST_ROWS),
        linear(features, TRAIN_ROWS, features.names)(TEST_ROWS),
        boosted(features, TRAIN_ROWS, RECIPE.training)(TEST_ROWS),
    ]
    ours = _rmse(features, model.predict(features, graphs, TEST_ROWS))
    assert ours < 0.97 * min(_rmse(features, predicted) for predicted in baselines)


def test_without_its_edges_the_graph_model_loses_what_neighbours_told(
    made: tuple[FeatureSet, MarketGraphs], model: TrainedModel
) -> None:
    features, graphs = made
    cut = replace(graphs, neighbours=np.full_like(graphs.neighbours, NO_NEIGHBOUR))
    with_edges = _rmse(features, model.predict(features, graphs, TEST_ROWS))
    assert _rmse(features, model.predict(features, cut, TEST_ROWS)) > 1.05 * with_edges


def test_shuffled_labels_give_no_skill(made: tuple[FeatureSet, MarketGraphs]) -> None:
    features, graphs = made
    random = np.random.default_rng(3)
    labels = features.labels.copy()
    labels[TRAIN_ROWS] = random.permutation(labels[TRAIN_ROWS].reshape(-1)).reshape(len(TRAIN_ROWS), -1)
    shuffled = train(replace(features, labels=labels), graphs, TRAIN_ROWS, RECIPE)
    fitted = boosted(replace(features, labels=labels), TRAIN_ROWS, RECIPE.training)
    for predicted in (shuffled.predict(features, graphs, TEST_ROWS), fitted(TEST_ROWS)):
        chosen = features.labelled[TEST_ROWS]
        assert score(features.labels[TEST_ROWS][chosen], predicted[chosen]).skill_ratio < 0.05


def test_the_same_seed_gives_the_same_model_and_another_another(
    made: tuple[FeatureSet, MarketGraphs], model: TrainedModel
) -> None:
    features, graphs = made
    expected = model.predict(features, graphs, TEST_ROWS)
    np.testing.assert_array_equal(
        train(features, graphs, TRAIN_ROWS, RECIPE).predict(features, graphs, TEST_ROWS), expected
    )
    other = msgspec.structs.replace(RECIPE, training=msgspec.structs.replace(RECIPE.training, seed=8))
    assert not np.array_equal(train(features, graphs, TRAIN_ROWS, other).predict(features, graphs, TEST_ROWS), expected)


def test_rows_that_are_not_trained_on_change_no_weight(
    made: tuple[FeatureSet, MarketGraphs], model: TrainedModel
) -> None:
    features, graphs = made
    values, labels = features.values.copy(), features.labels.copy()
    values[TRAIN_ROWS[-1] + 1 :] *= -7.0
    labels[TRAIN_ROWS[-1] + 1 :] += 9.0
    other = train(replace(features, values=values, labels=labels), graphs, TRAIN_ROWS, RECIPE)
    assert other.scaling == model.scaling
    np.testing.assert_array_equal(
        other.predict(features, graphs, TEST_ROWS), model.predict(features, graphs, TEST_ROWS)
    )


def test_a_saved_model_forecasts_the_same(
    made: tuple[FeatureSet, MarketGraphs], model: TrainedModel, tmp_path: Path
) -> None:
    save_model(model, tmp_path)
    bars = make_bars(intervals=300)
    assert forecast(load_model(tmp_path), bars) == forecast(model, bars) != []


def test_a_broken_artifact_says_what_to_do(model: TrainedModel, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(ConfigurationError, match="retrain"):
        load_model(tmp_path)


@pytest.mark.parametrize("broken", ["empty", "garbage", "index", "cut", "of another network"])
def test_broken_weights_say_what_to_do(model: TrainedModel, tmp_path: Path, broken: str) -> None:
    save_model(model, tmp_path)
    weights = tmp_path / WEIGHTS_FILE
    if broken == "of another network":
        (tmp_path / CONFIG_FILE).write_text((tmp_path / CONFIG_FILE).read_text().replace('"hidden": 16', '"hidden": 8'))
    else:
        whole = weights.read_bytes()
        # torch takes these for a pickle: "index" is one that ends before it has begun.
        contents = {"empty": b"", "garbage": b"no weights" * 99, "index": b"0.", "cut": whole[: len(whole) // 2]}
        weights.write_bytes(contents[broken])
    with pytest.raises(ConfigurationError, match="retrain"):
        load_model(tmp_path)


def test_a_forecast_is_of_the_next_interval_and_needs_no_more_than_the_history(model: TrainedModel) -> None:
    bars = make_bars(intervals=INTERVALS)
    whole = forecast(model, bars)
    assert {item.ts_start_ns for item in whole} == {FIRST_NS + INTERVALS * HOUR_NS}
    assert len(whole) == len(SyntheticMarket(groups=2, size=3).symbols)
    since_ns = FIRST_NS + (INTERVALS - model.recipe.history_intervals) * HOUR_NS
    recent = bars.filter(pc.greater_equal(bars["ts_start_ns"], since_ns))
    assert _volatilities(forecast(model, recent)) == pytest.approx(_volatilities(whole), rel=1e-5)
    shuffled = recent.take(np.random.default_rng(1).permutation(recent.num_rows))
    assert forecast(model, shuffled) == forecast(model, recent)


def test_a_forecast_of_nothing_or_of_silent_instruments_is_left_out(model: TrainedModel) -> None:
    bars = make_bars(intervals=100)
    assert forecast(model, bars.slice(0, 0)) == []
    silent = pc.and_(
        pc.equal(bars["instrument"], "G0M1-USDT.SIM"), pc.equal(bars["ts_start_ns"], FIRST_NS + 99 * HOUR_NS)
    )
    found = forecast(model, bars.filter(pc.invert(silent)))
    assert "G0M1-USDT.SIM" not in {item.instrument for item in found}
    assert len(found) == 5


def test_training_without_labels_is_refused(made: tuple[FeatureSet, MarketGraphs]) -> None:
    features, graphs = made
    with pytest.raises(NotEnoughDataError):
        train(replace(features, labels=np.full_like(features.labels, np.nan)), graphs, TRAIN_ROWS, RECIPE)


def _rmse(features: FeatureSet, predicted: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    chosen = features.labelled[TEST_ROWS]
    return score(features.labels[TEST_ROWS][chosen], predicted[chosen]).rmse


def _volatilities(found: list[InstrumentForecast]) -> dict[str, float]:
    return {item.instrument: item.volatility for item in found}
