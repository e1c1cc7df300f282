"""The steps of a retraining, one function each: read, train and register, evaluate. Dagster's assets call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from streamforge.contracts import Contracts
from streamforge.errors import ConfigurationError, NotEnoughDataError
from streamforge.gnn import registry
from streamforge.gnn.drift import REFERENCE_FILE, DriftReference, FeatureDrift, drift_of, reference_of
from streamforge.gnn.evaluation import (
    ChampionComparison,
    Score,
    Verdict,
    Walk,
    WalkConfig,
    compare_with_champion,
    judge,
    scores_of,
    usable_rows,
    walk_forward,
)
from streamforge.gnn.features import FeatureConfig, FeatureSet, features_of
from streamforge.gnn.graph import MarketGraphs
from streamforge.gnn.history import (
    BarsSource,
    BarsView,
    find_bars,
    keep_reading,
    pin_artifact,
    pin_reading,
    read_bars,
    release_reading,
)
from streamforge.gnn.libraries import require_libraries
from streamforge.gnn.panel import panel_of
from streamforge.gnn.training import Recipe, TrainedModel, load_recipe, train
from streamforge.lakehouse.commit import table_name
from streamforge.settings import Settings

SOURCE_TAG = "bars_contract"
INTERVAL_TAG = "interval_ns"
UNTIL_TAG = "trained_until_ns"
PINNED_TAG = "snapshot_tag"
"""Name of the Iceberg tag that keeps the table snapshot which a version was trained on."""
RECENT_INTERVALS = 168


@dataclass(frozen=True, slots=True)
class FeatureHistory:
    """Features and which table snapshot they were made from.

    Args:
        contract_id: `bars` or `venue-bars`.
        table: name of the table.
        snapshot_id: table snapshot that was read.
        interval: length of the bars.
        reading_tag: keeps the table snapshot until a version does.
        features: of the whole history that was read.
    """

    contract_id: str
    table: str
    snapshot_id: int
    interval: str
    reading_tag: str
    features: FeatureSet


@dataclass(frozen=True, slots=True)
class TrainedVersion:
    """A version of the model that was just trained."""

    version: str
    recipe: Recipe
    epochs: int
    snapshot_tag: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a version's recipe does in a walk forward, beside baselines and champion."""

    version: str
    tested_rows: int
    scores: dict[str, Score]
    champion: ChampionComparison | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ChampionDrift:
    """How far the champion's features have moved since its training; empty where there are too few bars to say.

    Args:
        version: of the champion.
        source: which bars it was trained on.
        needed_intervals: how many recent ones are judged.
        features: by name.
    """

    version: str
    source: BarsSource
    needed_intervals: int
    features: dict[str, FeatureDrift]

    @property
    def drifted(self) -> list[str]:
        """Return the features that have drifted."""
        return sorted(name for name, item in self.features.items() if item.drifted)


def read_features(
    settings: Settings,
    contracts: Contracts,
    *,
    source: BarsSource,
    max_intervals: int,
    reading: str,
    config: FeatureConfig,
    walk: WalkConfig,
) -> FeatureHistory:
    """Read the bars of one table snapshot, keep it from expiry, and make features.

    Raises:
        NotEnoughDataError: too few bars for a walk; says how many there are and are needed.
    """
    view = find_bars(settings, contracts, source)
    tag = pin_reading(view, reading)
    bars = read_bars(view, max_intervals=max_intervals)
    features = features_of(panel_of(bars, interval_ns=view.interval_ns, max_intervals=max_intervals), config)
    usable_rows(features, walk)
    return FeatureHistory(view.contract_id, table_name(view.table), view.snapshot_id, view.interval, tag, features)


def train_version(
    settings: Settings,
    contracts: Contracts,
    history: FeatureHistory,
    graphs: MarketGraphs,
    *,
    recipe: Recipe,
    walk: WalkConfig,
) -> TrainedVersion:
    """Train on the whole history and register the result as challenger; its table snapshot is kept for good.

    Raises:
        NotEnoughDataError: too few bars.
        ConfigurationError: libraries are missing, or the registry cannot be reached.
        CommitError: the table snapshot has expired since it was read.
    """
    require_libraries()
    registry.champion_version(settings)  # a registry that is away is told now and not after the training
    keep_reading(settings, contracts, history.contract_id, history.snapshot_id, history.reading_tag)
    features = history.features
    rows = usable_rows(features, walk)
    model = train(features, graphs, rows, recipe)
    until_ns = int(features.label_start_ns[rows[-1]]) + features.interval_ns
    reference = reference_of(features, rows, recent_intervals=min(RECENT_INTERVALS, len(rows) // 4))
    tags = {
        SOURCE_TAG: history.contract_id,
        INTERVAL_TAG: str(features.interval_ns),
        UNTIL_TAG: str(until_ns),
        "reading_tag": history.reading_tag,
        "instruments": str(len(features.instruments)),
        "seed": str(recipe.training.seed),
    }
    files = {REFERENCE_FILE: msgspec.json.encode(reference)}
    artifact_id = registry.store(settings, model, tags=tags, files=files)
    # Before the version, which then never stands without it; a kill in between leaves a tag of no version.
    tag = pin_artifact(settings, contracts, history.contract_id, history.snapshot_id, artifact_id)
    version = registry.register(
        settings,
        artifact_id,
        table_snapshots={history.table: history.snapshot_id},
        tags={**tags, PINNED_TAG: tag},
    )
    release_reading(settings, contracts, history.contract_id, history.reading_tag)
    return TrainedVersion(version, recipe, model.epochs, tag)


def evaluate_version(
    settings: Settings,
    history: FeatureHistory,
    graphs: MarketGraphs,
    trained: TrainedVersion,
    walk: WalkConfig,
    *,
    progress: Callable[[int, int], None],
) -> Evaluation:
    """Walk forward with the version's recipe, compare, and write the figures beside the version."""
    features = history.features
    walked = walk_forward(features, graphs, usable_rows(features, walk), trained.recipe, walk, progress=progress)
    scores = scores_of(walked)
    comparison = against_champion(settings, walked, history, graphs, walk)
    metrics = {f"{name}.{what}": getattr(item, what) for name, item in scores.items() for what in ("rmse", "qlike")}
    registry.log_metrics(settings, trained.version, metrics)
    return Evaluation(trained.version, len(walked.rows), scores, comparison, judge(scores, comparison))


def against_champion(
    settings: Settings, walked: Walk, history: FeatureHistory, graphs: MarketGraphs, walk: WalkConfig
) -> ChampionComparison | None:
    """Compare a walk with the champion; None where there is none."""
    champion = registry.load_champion(settings)
    if champion is None:
        return None
    tags = registry.version_tags(settings, champion.version)
    why_not = _difference(champion.model, history.features)
    if why_not:
        told = (
            f"champion {champion.version} cannot be compared with it: {why_not}. The champion stays. Run `retrain` "
            f"with `source: {tags.get(SOURCE_TAG, BarsSource.BARS)}` for `features`, or, to forecast something else "
            f"from now on, set the alias `{registry.CHAMPION}` of model `{registry.MODEL_NAME}` in MLflow to the new "
            "version"
        )
        return ChampionComparison(champion.version, 0, walk.least_test, {}, told)
    return compare_with_champion(
        walked,
        champion.model,
        history.features,
        graphs,
        walk,
        version=champion.version,
        trained_until_ns=int(tags[UNTIL_TAG]),
    )


def champion_drift(settings: Settings, contracts: Contracts) -> ChampionDrift | None:
    """Compare the latest bars with those that the champion was trained on; None without a champion.

    The live bars, which it forecasts, where there are enough of its length; else those of the table it was trained on.

    Raises:
        NotEnoughDataError: there are no bars of its length in either.
        ConfigurationError: the registry cannot be read, or the version does not say what it was trained on.
    """
    version = registry.champion_version(settings)
    if version is None:
        return None
    tags = registry.version_tags(settings, version)
    try:
        with TemporaryDirectory() as folder:
            artifact = registry.artifact_of(settings, version, Path(folder))
            reference = msgspec.json.decode((artifact / REFERENCE_FILE).read_bytes(), type=DriftReference)
            config = load_recipe(artifact).features
        interval_ns = int(tags[INTERVAL_TAG])
    except (OSError, LookupError, ValueError) as error:
        msg = (
            f"champion {version} does not say what it was trained on ({type(error).__name__}: {error}): its drift is "
            "not known. Run the job `retrain`, which registers all of it"
        )
        raise ConfigurationError(msg) from error
    source = _source_of(version, tags)
    max_intervals = reference.recent_intervals + config.history_intervals
    view = _judged_bars(settings, contracts, source, interval_ns, max_intervals)
    bars = read_bars(view, max_intervals=max_intervals)
    features = features_of(panel_of(bars, interval_ns=interval_ns, max_intervals=max_intervals), config)
    return ChampionDrift(version, source, reference.recent_intervals, drift_of(features, reference))


def champion_source(settings: Settings) -> BarsSource | None:
    """Return which bars the champion was trained on, so that the next model can be compared with it; None without one.

    Raises:
        ConfigurationError: the registry cannot be read, or the version does not say it.
    """
    version = registry.champion_version(settings)
    return None if version is None else _source_of(version, registry.version_tags(settings, version))


def _source_of(version: str, tags: Mapping[str, str]) -> BarsSource:
    try:
        return BarsSource(tags[SOURCE_TAG])
    except (LookupError, ValueError) as error:
        msg = (
            f"champion {version} does not say which bars it was trained on ({error}). Set its tag {SOURCE_TAG} in "
            f"MLflow to {BarsSource.BARS} or {BarsSource.VENUE_BARS}, or move the alias {registry.CHAMPION}"
        )
        raise ConfigurationError(msg) from error


def _judged_bars(
    settings: Settings, contracts: Contracts, source: BarsSource, interval_ns: int, needed_intervals: int
) -> BarsView:
    with suppress(NotEnoughDataError):
        live = find_bars(settings, contracts, BarsSource.BARS, interval_ns=interval_ns)
        if live.intervals >= needed_intervals:
            return live
    return find_bars(settings, contracts, source, interval_ns=interval_ns)


def _difference(model: TrainedModel, features: FeatureSet) -> str:
    """Return why a model cannot be judged on these features; empty where it can."""
    if model.interval_ns != features.interval_ns:
        return (
            f"it forecasts intervals of {model.interval_ns / 1e9:g} s, the bars are of {features.interval_ns / 1e9:g} s"
        )
    if model.names != features.names:
        return f"it is made of the features {', '.join(model.names)}, these are {', '.join(features.names)}"
    return ""
