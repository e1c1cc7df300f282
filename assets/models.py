"""Models of volatility: features of bars, market graphs, a trained graph model, its evaluation and its promotion.

Each asset is one step of a retraining. What they hand on lies in Dagster's own storage; what must last is elsewhere:
versions of the model in the registry, and the table snapshots that they were trained on, as tags, in Iceberg.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import msgspec
from pydantic import Field

from assets.catalogue import PLATFORM_RESOURCE, TABLES, platform_of
from assets.failures import clear_failures
from streamforge.gnn import registry
from streamforge.gnn.evaluation import Score, WalkConfig, table_of
from streamforge.gnn.features import FeatureConfig
from streamforge.gnn.graph import GraphConfig, MarketGraphs, graphs_of
from streamforge.gnn.history import BarsSource
from streamforge.gnn.steps import (
    Evaluation,
    FeatureHistory,
    TrainedVersion,
    evaluate_version,
    read_features,
    train_version,
)
from streamforge.gnn.training import Recipe, TrainingConfig

MODELS = "models"
POOL = "retraining"
"""One run of a pool at a time (`pools` in `dagster.yaml`): the path of what a step hands on has no run in it, so two
runs at once, of the job or of assets by hand, would mix their data."""
_SOURCES = (dg.AssetKey([TABLES, "bars"]), dg.AssetKey([TABLES, "venue_bars"]))
_WALK = WalkConfig()
_DEFAULTS = TrainingConfig()


class FeaturesConfig(dg.Config):
    """Which bars are read."""

    source: BarsSource = Field(
        BarsSource.AUTO, description="`bars` (made of trades), `venue-bars` (loaded history) or `auto`: the longer one."
    )
    max_intervals: int = Field(4_000, ge=1, description="Only so many of the latest intervals are read.")


class ModelConfig(dg.Config):
    """How the model is trained."""

    seed: int = Field(_DEFAULTS.seed, description="Of weights and batches; the same seed gives the same model.")
    epochs: int = Field(_DEFAULTS.epochs, ge=1, description="Passes over the training rows at most.")


@dg.asset(
    deps=_SOURCES,
    group_name=MODELS,
    pool=POOL,
    kinds={"python"},
    required_resource_keys={PLATFORM_RESOURCE},
    description="What is known of each instrument when an interval ends: means of log volatility over several "
    "horizons, return, volume, the market's mean, time of day. Says which table it was made from.",
)
def features(context: dg.AssetExecutionContext, config: FeaturesConfig) -> dg.Output[FeatureHistory]:
    """Read bars, keep their table snapshot and make features."""
    settings, known = platform_of(context.op_execution_context)
    with clear_failures():
        history = read_features(
            settings,
            known,
            source=config.source,
            max_intervals=config.max_intervals,
            reading=context.run.run_id,
            config=FeatureConfig(),
            walk=_WALK,
        )
    return dg.Output(history, metadata=_features_metadata(history))


@dg.asset(
    group_name=MODELS,
    pool=POOL,
    kinds={"python"},
    description="Who moves with whom: rolling correlation of log volatility, past data only; a new graph every "
    f"{GraphConfig().every} intervals, {GraphConfig().neighbours} edges into each instrument.",
)
def market_graph(features: FeatureHistory) -> dg.Output[MarketGraphs]:
    """Make the graphs of all rows."""
    graphs = graphs_of(features.features, GraphConfig())
    return dg.Output(graphs, metadata={"graphs": len(graphs.made_ns), "edges": graphs.edges})


@dg.asset(
    group_name=MODELS,
    pool=POOL,
    kinds={"pytorch", "mlflow"},
    required_resource_keys={PLATFORM_RESOURCE},
    description="GATv2 on the market graph, trained on the whole history and registered as challenger. The table "
    "snapshot that it was trained on is tagged in Iceberg, so that expiry keeps it.",
)
def trained_model(
    context: dg.AssetExecutionContext, config: ModelConfig, features: FeatureHistory, market_graph: MarketGraphs
) -> dg.Output[TrainedVersion]:
    """Train on the whole history and register a challenger."""
    settings, known = platform_of(context.op_execution_context)
    recipe = Recipe(training=TrainingConfig(seed=config.seed, epochs=config.epochs))
    with clear_failures():
        trained = train_version(settings, known, features, market_graph, recipe=recipe, walk=_WALK)
    return dg.Output(
        trained,
        metadata={
            "version": trained.version,
            "epochs": trained.epochs,
            "table": features.table,
            "table_snapshot": str(features.snapshot_id),
            "snapshot_tag": trained.snapshot_tag,
        },
    )


@dg.asset(
    group_name=MODELS,
    pool=POOL,
    kinds={"python", "mlflow"},
    required_resource_keys={PLATFORM_RESOURCE},
    description="Walk forward in time, with purge and embargo: the graph model's recipe beside last value, HAR, a "
    "linear model and LightGBM on the same places. The comparison is shown whoever wins.",
)
def evaluation(
    context: dg.AssetExecutionContext,
    features: FeatureHistory,
    market_graph: MarketGraphs,
    trained_model: TrainedVersion,
) -> dg.Output[Evaluation]:
    """Walk forward and compare."""
    settings, _ = platform_of(context.op_execution_context)
    with clear_failures():
        found = evaluate_version(
            settings,
            features,
            market_graph,
            trained_model,
            _WALK,
            progress=lambda done, total: context.log.info("block %d of %d is walked", done, total),
        )
    context.log.info("%s", table_of(found.scores))
    return dg.Output(found, metadata=_evaluation_metadata(found))


@dg.asset_check(
    asset=evaluation,
    pool=POOL,
    required_resource_keys={PLATFORM_RESOURCE},
    description="The graph model beats every baseline, and is not worse than the champion on intervals that are "
    "new to the champion. Only then does the challenger become champion.",
)
def promotion(context: dg.AssetCheckExecutionContext, evaluation: Evaluation) -> dg.AssetCheckResult:
    """Move the alias champion when the verdict allows it."""
    settings, _ = platform_of(context.op_execution_context)
    verdict = evaluation.verdict
    if verdict.passed:
        with clear_failures():
            registry.promote(settings, evaluation.version)
    return dg.AssetCheckResult(
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=verdict.reason,
        metadata={"version": evaluation.version, "comparison": _shown(evaluation.scores)},
    )


ASSETS = (features, market_graph, trained_model, evaluation)
CHECKS = (promotion,)


def _features_metadata(history: FeatureHistory) -> dict[str, Any]:
    features = history.features
    return {
        "bars_contract": history.contract_id,
        "table": history.table,
        "table_snapshot": str(history.snapshot_id),
        "interval": history.interval,
        "intervals": len(features.ts_start_ns),
        "instruments": len(features.instruments),
        "labelled_places": int(features.labelled.sum()),
        "features": list(features.names),
    }


def _evaluation_metadata(found: Evaluation) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "version": found.version,
        "tested_intervals": found.tested_rows,
        "comparison": _shown(found.scores),
        "scores": {name: msgspec.to_builtins(item) for name, item in found.scores.items()},
        "verdict": found.verdict.reason,
    }
    if found.champion is not None and found.champion.scores:
        shown["against_champion"] = _shown(found.champion.scores)
    return shown


def _shown(scores: Mapping[str, Score]) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(table_of(scores))
