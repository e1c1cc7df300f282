"""Walk forward in time: train on the past, test on what came after, again and again; then compare.

The rows are in order of time. Their last part is cut into test blocks; each block's models train on all rows
before it, less a purge (labels that reach into the block) and an embargo (rows beside it, which tell much the
same). Every model, the graph model and the baselines, sees the same rows and is judged on the same places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec
import numpy as np

from streamforge.errors import NotEnoughDataError
from streamforge.gnn.baselines import Predict, boosted, last_value, linear
from streamforge.gnn.features import FeatureSet
from streamforge.gnn.graph import MarketGraphs
from streamforge.gnn.panel import BoolArray, FloatArray, IntArray
from streamforge.gnn.training import LABEL_INTERVALS, Recipe, TrainedModel, train


class ModelName(StrEnum):
    """The models of a comparison."""

    GRAPH = "graph_attention"
    CHAMPION = "champion"
    LAST_VALUE = "last_value"
    HAR = "har"
    LINEAR = "linear"
    LIGHTGBM = "lightgbm"


BASELINES = (ModelName.LAST_VALUE, ModelName.HAR, ModelName.LINEAR, ModelName.LIGHTGBM)


class WalkConfig(msgspec.Struct, frozen=True):
    """How a walk goes.

    Args:
        blocks: test blocks.
        test_ratio: part of the rows that is tested, all blocks together.
        embargo: rows left out between training and test, beside the purge.
        least_train: rows to train on at least, in the first block.
        least_test: rows in a block at least, and rows that champion and challenger are compared on.
    """

    blocks: int = 4
    test_ratio: float = 0.4
    embargo: int = 24
    least_train: int = 240
    least_test: int = 24

    @property
    def least_rows(self) -> int:
        """Return the rows that a walk needs."""
        test_rows = self.blocks * self.least_test
        before = self.least_train + self.embargo + LABEL_INTERVALS
        return max(
            before + test_rows, int(np.ceil(test_rows / self.test_ratio)), int(np.ceil(before / self.train_ratio))
        )

    @property
    def train_ratio(self) -> float:
        """Return the part of the rows that is never tested."""
        return 1.0 - self.test_ratio


@dataclass(frozen=True, slots=True)
class Block:
    """Rows to train on and rows to test on, both in order of time."""

    train_rows: IntArray
    test_rows: IntArray


@dataclass(frozen=True, slots=True)
class Walk:
    """Predictions of every model on the tested rows.

    Shapes:
        rows (R,); labels and each of predictions (R, N), NaN where there is none.
    """

    rows: IntArray
    labels: FloatArray
    predictions: Mapping[str, FloatArray]


class Score(msgspec.Struct, frozen=True):
    """How well one model did.

    Args:
        rmse: of log volatility.
        mae: of log volatility.
        qlike: mean of `ratio - ln(ratio) - 1`, ratio being realised by predicted variance.
        skill_ratio: 1 - squared error / squared error of the mean of the same labels.
        places: instruments times intervals that were judged.
    """

    rmse: float
    mae: float
    qlike: float
    skill_ratio: float
    places: int


def usable_rows(features: FeatureSet, walk: WalkConfig) -> IntArray:
    """Return the rows with a label, enough of them for a walk.

    Raises:
        NotEnoughDataError: says how many there are, how many are needed and what to do.
    """
    rows = np.flatnonzero(features.labelled.any(axis=1))
    if len(rows) < walk.least_rows:
        msg = (
            f"too few bars to train and to evaluate: {len(rows)} intervals of {features.interval_ns / 1e9:g} s with "
            f"features and a label, over {len(features.instruments)} instruments; {walk.least_rows} are needed. "
            "Let the platform run on, or load history: `streamforge load history`"
        )
        raise NotEnoughDataError(msg)
    return rows


def blocks_of(rows: IntArray, walk: WalkConfig) -> list[Block]:
    """Cut rows into training and test parts; a training row's label ends before the embargo begins."""
    tested = max(int(len(rows) * walk.test_ratio), walk.blocks * walk.least_test)
    edges = np.linspace(len(rows) - tested, len(rows), walk.blocks + 1).astype(np.int64)
    gap = walk.embargo + LABEL_INTERVALS
    return [Block(rows[rows < rows[start] - gap], rows[start:end]) for start, end in itertools.pairwise(edges.tolist())]


def walk_forward(
    features: FeatureSet,
    graphs: MarketGraphs,
    rows: IntArray,
    recipe: Recipe,
    walk: WalkConfig,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Walk:
    """Train every model on each block's past and predict the block."""
    found: dict[str, list[FloatArray]] = {name: [] for name in (ModelName.GRAPH, *BASELINES)}
    blocks = blocks_of(rows, walk)
    for number, block in enumerate(blocks):
        graph_model = train(features, graphs, block.train_rows, recipe)
        models: dict[str, Predict] = {
            ModelName.GRAPH: lambda wanted, model=graph_model: model.predict(features, graphs, wanted),  # type: ignore[misc]
            ModelName.LAST_VALUE: last_value(features),
            ModelName.HAR: linear(features, block.train_rows, recipe.features.har_names),
            ModelName.LINEAR: linear(features, block.train_rows, features.names),
            ModelName.LIGHTGBM: boosted(features, block.train_rows, recipe.training),
        }
        for name, predict in models.items():
            found[name].append(predict(block.test_rows))
        progress(number + 1, len(blocks))
    tested = np.concatenate([block.test_rows for block in blocks])
    labels = np.where(features.labelled[tested], features.labels[tested], np.nan)
    return Walk(tested, labels, {name: np.concatenate(parts) for name, parts in found.items()})


def scores_of(walk: Walk, where: BoolArray | None = None) -> dict[str, Score]:
    """Judge every model on the places that all of them predicted.

    Args:
        walk: the predictions.
        where: rows to judge, (R,); None takes all.
    """
    chosen = np.isfinite(walk.labels)
    for predicted in walk.predictions.values():
        chosen &= np.isfinite(predicted)
    if where is not None:
        chosen &= where[:, None]
    labels = walk.labels[chosen]
    return {name: score(labels, predicted[chosen]) for name, predicted in walk.predictions.items()}


def score(labels: FloatArray, predicted: FloatArray) -> Score:
    """Judge predictions of log volatility.

    Raises:
        NotEnoughDataError: there is nothing to judge.
    """
    if labels.size == 0:
        msg = "no place has a label and a prediction of every model: nothing can be judged"
        raise NotEnoughDataError(msg)
    errors = labels - predicted
    log_ratio = 2.0 * errors
    mean_squared = float((errors**2).mean())
    variance = float(labels.var())
    return Score(
        rmse=float(np.sqrt(mean_squared)),
        mae=float(np.abs(errors).mean()),
        qlike=float((np.exp(np.clip(log_ratio, -_LOG_LIMIT, _LOG_LIMIT)) - log_ratio - 1.0).mean()),
        skill_ratio=1.0 - mean_squared / variance if variance > 0 else 0.0,
        places=int(labels.size),
    )


_LOG_LIMIT = 50.0


class ChampionComparison(msgspec.Struct, frozen=True):
    """Challenger and champion on rows that are new to the champion.

    Args:
        version: of the champion.
        new_rows: tested rows whose features begin after the champion's training and the embargo.
        needed_rows: how many there must be.
        scores: over those rows; empty where there are too few.
        not_comparable: why the two cannot be compared at all, and what to do; empty where they can.
    """

    version: str
    new_rows: int
    needed_rows: int
    scores: Mapping[str, Score]
    not_comparable: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """Whether a challenger may become champion, and why."""

    passed: bool
    reason: str


def compare_with_champion(
    walk: Walk,
    champion: TrainedModel,
    features: FeatureSet,
    graphs: MarketGraphs,
    config: WalkConfig,
    *,
    version: str,
    trained_until_ns: int,
) -> ChampionComparison:
    """Judge the champion, as it is, and the challenger's walk on the rows that are new to the champion.

    Args:
        walk: of the challenger.
        champion: made from features of the same names and intervals.
        features: of the walk.
        graphs: of the walk.
        config: of the walk.
        version: of the champion.
        trained_until_ns: end of the last label that the champion was trained on.
    """
    since_ns = trained_until_ns + config.embargo * features.interval_ns
    new = features.label_start_ns[walk.rows] >= since_ns
    count = int(new.sum())
    scores: Mapping[str, Score] = {}
    if count >= config.least_test:
        predictions = {**walk.predictions, ModelName.CHAMPION: champion.predict(features, graphs, walk.rows)}
        scores = scores_of(Walk(walk.rows, walk.labels, predictions), new)
    return ChampionComparison(version, count, config.least_test, scores)


def judge(scores: Mapping[str, Score], champion: ChampionComparison | None) -> Verdict:
    """Decide on promotion: the graph model must beat every baseline, and not be worse than the champion.

    Args:
        scores: over the whole walk.
        champion: None without a champion.
    """
    graph = scores[ModelName.GRAPH]
    best = min(BASELINES, key=lambda name: scores[name].rmse)
    compared = f"rmse {graph.rmse:.4f}, best baseline {best} {scores[best].rmse:.4f}"
    if graph.rmse >= scores[best].rmse:
        return Verdict(passed=False, reason=f"the graph model does not beat every baseline: {compared}")
    if champion is None:
        return Verdict(passed=True, reason=f"the graph model beats every baseline: {compared}; there was no champion")
    if champion.not_comparable:
        return Verdict(passed=False, reason=f"{compared}; {champion.not_comparable}")
    if not champion.scores:
        told = f"{champion.new_rows} intervals are new to champion {champion.version}, {champion.needed_rows} needed"
        return Verdict(passed=False, reason=f"too early to replace the champion: {told}")
    ours, theirs = champion.scores[ModelName.GRAPH].rmse, champion.scores[ModelName.CHAMPION].rmse
    told = (
        f"on {champion.new_rows} intervals new to champion {champion.version}: rmse {ours:.4f}, champion {theirs:.4f}"
    )
    return Verdict(passed=ours <= theirs, reason=f"{compared}; {told}")


def table_of(scores: Mapping[str, Score]) -> str:
    """Return the comparison as a Markdown table, best first."""
    head = "| model | rmse of log volatility | mae | qlike | skill |\n|---|---:|---:|---:|---:|"
    ordered = sorted(scores.items(), key=lambda item: item[1].rmse)
    lines = [
        f"| {name} | {item.rmse:.4f} | {item.mae:.4f} | {item.qlike:.4f} | {item.skill_ratio:.3f} |"
        for name, item in ordered
    ]
    return "\n".join([head, *lines])
