"""A walk learns nothing of what it is tested on, and a champion is judged on nothing that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pytest

pytest.importorskip("torch", reason="the dependency group ml is not installed")

from streamforge.gnn.evaluation import (
    BASELINES,
    ChampionComparison,
    ModelName,
    Score,
    Walk,
    WalkConfig,
    blocks_of,
    compare_with_champion,
    judge,
    scores_of,
    usable_rows,
    walk_forward,
)
from streamforge.gnn.features import FeatureSet
from streamforge.gnn.graph import MarketGraphs
from streamforge.gnn.panel import FloatArray, IntArray
from streamforge.gnn.training import Recipe, TrainedModel, TrainingConfig
from tests.models_support import made_of, make_bars

WALK = WalkConfig(blocks=3, test_ratio=0.4, embargo=2, least_train=60, least_test=10)
RECIPE = Recipe(training=TrainingConfig(epochs=2, hidden=4, heads=1))


@pytest.fixture(scope="module")
def made() -> tuple[FeatureSet, MarketGraphs]:
    return made_of(make_bars(intervals=220))


@pytest.fixture(scope="module")
def walked(made: tuple[FeatureSet, MarketGraphs]) -> Walk:
    features, graphs = made
    return walk_forward(features, graphs, usable_rows(features, WALK), RECIPE, WALK)


@pytest.mark.parametrize("block", range(1, WALK.blocks))
def test_a_changed_block_changes_no_prediction_before_it(
    made: tuple[FeatureSet, MarketGraphs], walked: Walk, block: int
) -> None:
    features, graphs = made
    rows = usable_rows(features, WALK)
    since = int(blocks_of(rows, WALK)[block].test_rows[0])
    values, labels = features.values.copy(), features.labels.copy()
    values[since:] *= -3.0
    labels[since:] += np.linspace(2.0, 9.0, len(labels) - since)[:, None]
    other = walk_forward(replace(features, values=values, labels=labels), graphs, rows, RECIPE, WALK)
    before = walked.rows < since
    assert before.sum() == sum(len(each.test_rows) for each in blocks_of(rows, WALK)[:block])
    for name, predicted in walked.predictions.items():
        np.testing.assert_array_equal(other.predictions[name][before], predicted[before], err_msg=name)
        # The property would hold of models that look at nothing.
        assert not np.array_equal(other.predictions[name][~before], predicted[~before]), name


@dataclass(frozen=True)
class Remembering:
    """A champion that errs by one figure on what it was trained on, and by another on what came after."""

    until_ns: int
    seen_error: float
    new_error: float

    def predict(self, features: FeatureSet, _graphs: MarketGraphs, rows: IntArray) -> FloatArray:
        """Return the labels and the error."""
        seen = features.label_start_ns[rows] < self.until_ns
        return features.labels[rows] + np.where(seen, self.seen_error, self.new_error)[:, None]


# Of the rows that are tested, the champion has seen the first two blocks; the embargo after them is nobody's.
@pytest.mark.parametrize(("seen_error", "new_error", "promoted"), [(0.0, 1.2, True), (3.0, 0.8, False)])
def test_a_champion_is_not_judged_on_what_it_was_trained_on(
    made: tuple[FeatureSet, MarketGraphs], seen_error: float, new_error: float, *, promoted: bool
) -> None:
    features, graphs = made
    blocks = blocks_of(usable_rows(features, WALK), WALK)
    rows = np.concatenate([each.test_rows for each in blocks])
    labels = np.where(features.labelled[rows], features.labels[rows], np.nan)
    errors: Mapping[str, float] = {ModelName.GRAPH: 1.0, **dict.fromkeys(BASELINES, 2.0)}
    walk = Walk(rows, labels, {name: labels + error for name, error in errors.items()})
    until_ns = int(features.label_start_ns[blocks[2].test_rows[0]])
    champion = Remembering(until_ns + WALK.embargo * features.interval_ns, seen_error, new_error)
    found = compare_with_champion(
        walk, cast(TrainedModel, champion), features, graphs, WALK, version="3", trained_until_ns=until_ns
    )
    assert found.new_rows == len(blocks[2].test_rows) - WALK.embargo
    assert _rmse(found) == pytest.approx({"graph": 1.0, "champion": new_error})
    assert judge(scores_of(walk), found).passed is promoted


def _rmse(found: ChampionComparison) -> dict[str, float]:
    scores: Mapping[str, Score] = found.scores
    return {"graph": scores[ModelName.GRAPH].rmse, "champion": scores[ModelName.CHAMPION].rmse}
