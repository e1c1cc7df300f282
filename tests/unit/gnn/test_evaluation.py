"""Walks keep training before test, verdicts promote only what is better, and too little data is said clearly."""

from __future__ import annotations

import numpy as np
import pytest

from streamforge.errors import NotEnoughDataError
from streamforge.gnn.evaluation import (
    BASELINES,
    ChampionComparison,
    ModelName,
    Score,
    WalkConfig,
    blocks_of,
    judge,
    score,
    table_of,
    usable_rows,
)
from streamforge.gnn.training import LABEL_INTERVALS
from tests.models_support import made_of, make_bars

WALK = WalkConfig()


@pytest.mark.parametrize("missing", [(), (100, 101, 250, 399)])
def test_blocks_keep_purge_and_embargo_before_every_test_row(missing: tuple[int, ...]) -> None:
    rows = np.array([row for row in range(600) if row not in missing], dtype=np.int64)
    blocks = blocks_of(rows, WALK)
    assert len(blocks) == WALK.blocks
    for block in blocks:
        # The label of the last training row is of the row after it; the embargo lies between that and the test.
        assert block.train_rows.max() + LABEL_INTERVALS + WALK.embargo < block.test_rows.min()
    tested = np.concatenate([block.test_rows for block in blocks])
    assert tested.tolist() == rows[-len(tested) :].tolist()
    assert len(tested) == int(len(rows) * WALK.test_ratio)


def test_the_least_rows_of_a_walk_are_enough_for_its_blocks() -> None:
    first = blocks_of(np.arange(WALK.least_rows), WALK)[0]
    assert len(first.train_rows) >= WALK.least_train - 1
    assert len(first.test_rows) >= WALK.least_test


def test_too_few_bars_say_how_many_there_are_and_are_needed() -> None:
    features, _ = made_of(make_bars(intervals=100))
    found = int(features.labelled.any(axis=1).sum())
    with pytest.raises(NotEnoughDataError, match=rf"{found} intervals.*{WALK.least_rows} are needed.*load history"):
        usable_rows(features, WALK)


def test_score_of_the_truth_is_perfect_and_of_its_mean_has_no_skill() -> None:
    labels = np.array([-6.0, -5.0, -4.0])
    assert score(labels, labels) == Score(rmse=0.0, mae=0.0, qlike=0.0, skill_ratio=1.0, places=3)
    assert score(labels, np.full(3, -5.0)).skill_ratio == pytest.approx(0.0)


def test_score_of_nothing_is_refused() -> None:
    with pytest.raises(NotEnoughDataError):
        score(np.empty(0), np.empty(0))


@pytest.mark.parametrize("winner", BASELINES)
def test_judge_a_better_baseline_prevents_promotion(winner: ModelName) -> None:
    verdict = judge(_scores(graph=0.5, **{winner: 0.49}), None)
    assert not verdict.passed
    assert winner in verdict.reason


def test_judge_without_champion_promotes_what_beats_every_baseline() -> None:
    assert judge(_scores(graph=0.5), None).passed


@pytest.mark.parametrize(("champion", "passed"), [(0.49, False), (0.5, True), (0.6, True)])
def test_judge_never_replaces_a_better_champion(champion: float, *, passed: bool) -> None:
    scores = {ModelName.GRAPH: _score(0.5), ModelName.CHAMPION: _score(champion)}
    assert judge(_scores(graph=0.5), ChampionComparison("3", 40, 24, scores)).passed is passed


def test_judge_too_few_new_rows_leaves_the_champion() -> None:
    verdict = judge(_scores(graph=0.5), ChampionComparison("3", 7, 24, {}))
    assert not verdict.passed
    assert "7 intervals" in verdict.reason


def test_judge_a_champion_that_cannot_be_compared_stays() -> None:
    verdict = judge(_scores(graph=0.5), ChampionComparison("3", 0, 24, {}, "it forecasts hours"))
    assert not verdict.passed
    assert "it forecasts hours" in verdict.reason


def test_the_table_shows_every_model_best_first() -> None:
    lines = table_of(_scores(graph=0.7, har=0.6)).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines][:2] == ["har", "graph_attention"]
    assert len(lines) == 1 + len(BASELINES)


def _scores(*, graph: float, **others: float) -> dict[str, Score]:
    return {ModelName.GRAPH: _score(graph), **{name: _score(others.get(name, 0.8)) for name in BASELINES}}


def _score(rmse: float) -> Score:
    return Score(rmse=rmse, mae=rmse, qlike=rmse, skill_ratio=0.0, places=10)
