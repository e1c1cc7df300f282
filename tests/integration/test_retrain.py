"""A retraining as Dagster runs it, on real Iceberg tables: train, register, evaluate, promote, watch for drift."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

pytest.importorskip("torch", reason="the dependency group ml is not installed")

from assets.catalogue import PLATFORM_RESOURCE
from orchestration import ml
from orchestration.resources import Platform
from streamforge.contracts import load_contracts
from streamforge.errors import ConfigurationError
from streamforge.gnn import registry, steps
from streamforge.gnn.evaluation import BASELINES, ModelName, Walk, WalkConfig
from streamforge.gnn.features import FeatureConfig
from streamforge.gnn.graph import graphs_of
from streamforge.gnn.history import READING_TAG, BarsSource, find_bars, pin_reading
from streamforge.gnn.steps import (
    PINNED_TAG,
    SOURCE_TAG,
    FeatureHistory,
    against_champion,
    champion_drift,
    read_features,
    train_version,
)
from streamforge.gnn.training import Recipe, TrainingConfig
from streamforge.lakehouse.catalog import ensure_table, load_table, open_catalog
from streamforge.lakehouse.tags import set_tag
from streamforge.settings import Settings
from tests.inference_support import make_champion, train_small
from tests.models_support import FIRST_NS, HOUR_NS, MARKET, as_rows, make_bars

pytestmark = pytest.mark.timeout(600)  # three retrainings, and the first import of torch

INTERVALS = 560
LATER = 660


@dataclass(frozen=True, slots=True)
class Retraining:
    """A run of the job, and who was champion and challenger after it."""

    result: dg.ExecuteInProcessResult
    champion: str | None
    challenger: str | None

    @property
    def check(self) -> dg.AssetCheckEvaluation:
        """Return what the check `promotion` said."""
        [check] = self.result.get_asset_check_evaluations()
        return check

    @property
    def version(self) -> str:
        """Return the version that was trained."""
        return str(_metadata(self.result, "trained_model")["version"])


@dataclass(frozen=True, slots=True)
class Room:
    """A platform and its Dagster instance in which three retrainings have run; tests only look."""

    platform: Platform
    instance: dg.DagsterInstance
    first: Retraining
    again: Retraining
    later: Retraining
    first_snapshot_id: int


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """Retrain on `venue-bars`, once more on the same, and once more on longer ones."""
    platform = _platform(tmp_path_factory.mktemp("models"))
    _append(platform, "venue-bars", make_bars(intervals=LATER), until=INTERVALS)
    snapshot_id = find_bars(platform.settings, platform.contracts, BarsSource.VENUE_BARS).snapshot_id
    with dg.instance_for_test() as instance:
        first, again = (_retrained(platform, instance) for _ in range(2))
        _append(platform, "venue-bars", make_bars(intervals=LATER), since=INTERVALS)
        yield Room(platform, instance, first, again, _retrained(platform, instance), snapshot_id)


def test_a_retraining_makes_its_version_champion_when_it_beats_every_baseline(room: Room) -> None:
    assert room.first.result.success
    assert room.first.check.passed, room.first.check.description
    assert (room.first.champion, room.first.challenger) == (room.first.version, None)
    comparison = str(room.first.check.metadata["comparison"].value)
    assert all(name in comparison for name in (ModelName.GRAPH, *BASELINES))


def test_the_champion_forecasts_every_instrument(room: Room) -> None:
    champion = registry.load_champion(room.platform.settings)
    assert champion is not None
    found = champion.predict(make_bars(intervals=200))
    assert {item.instrument for item in found} == {f"{symbol}-USDT.SIM" for symbol in MARKET.symbols}


def test_features_say_which_table_and_which_snapshot_they_were_made_from(room: Room) -> None:
    features = _metadata(room.first.result, "features")
    assert features["bars_contract"] == "venue-bars"
    assert features["table_snapshot"] == str(room.first_snapshot_id)
    assert features["intervals"] == INTERVALS
    assert _metadata(room.first.result, "market_graph")["edges"] > 0


def test_the_snapshot_that_a_version_was_trained_on_is_tagged_and_the_reading_released(room: Room) -> None:
    settings = room.platform.settings
    table = load_table(open_catalog(settings), settings, room.platform.contracts["venue-bars"])
    assert registry.trained_on(settings, room.first.version) == {"market.venue_bars": room.first_snapshot_id}
    reference = table.metadata.refs[_metadata(room.first.result, "trained_model")["snapshot_tag"]]
    assert reference.snapshot_id == room.first_snapshot_id != table.metadata.current_snapshot_id
    assert not [tag for tag in table.metadata.refs if tag.startswith(READING_TAG)]
    assert registry.version_tags(settings, room.first.version)[SOURCE_TAG] == "venue-bars"


@pytest.mark.parametrize("killed_in", ["create_model_version", "set_registered_model_alias"])
@pytest.mark.parametrize("after", [False, True])
def test_no_kill_leaves_a_version_without_the_tag_of_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str, *, after: bool
) -> None:
    platform = _platform(tmp_path)
    _append(platform, "venue-bars", make_bars(intervals=INTERVALS))
    client = registry._client(platform.settings)
    asked = getattr(client, killed_in)

    def killed(_client: object, *args: Any, **more: Any) -> None:
        if after:
            asked(*args, **more)
        raise _KilledError

    monkeypatch.setattr(type(client), killed_in, killed)
    with pytest.raises(_KilledError):
        _train(platform)
    monkeypatch.undo()
    versions = client.search_model_versions()
    assert len(versions) == int(after or killed_in != "create_model_version")
    table = load_table(open_catalog(platform.settings), platform.settings, platform.contracts["venue-bars"])
    for version in versions:
        [snapshot_id] = registry.trained_on(platform.settings, version.version).values()
        assert table.metadata.refs[version.tags[PINNED_TAG]].snapshot_id == snapshot_id


def test_a_champion_that_forecasts_something_else_is_not_replaced_unjudged(tmp_path: Path) -> None:
    platform = _platform(tmp_path)
    _append(platform, "venue-bars", make_bars(intervals=INTERVALS))
    history = _read(platform)
    graphs = graphs_of(history.features, Recipe().graph)
    walked = Walk(np.empty(0, np.int64), np.empty((0, 0)), {})
    other = train_small(platform.contracts)
    as_long = replace(other, interval_ns=history.features.interval_ns)
    for model, difference in ((other, "of 60 s"), (as_long, "made of the features volatility_1, volatility_3")):
        version = make_champion(platform.settings, model)
        found = against_champion(platform.settings, walked, history, graphs, WalkConfig())
        assert found is not None
        assert found.not_comparable.startswith(f"champion {version} cannot be compared")
        assert difference in found.not_comparable
        assert "`source: " in found.not_comparable


def test_a_registry_that_fails_is_a_plain_error_and_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = _platform(tmp_path)
    settings, model = platform.settings, train_small(platform.contracts)
    make_champion(settings, model)
    # A champion made by hand says nothing of its training: no traceback at each tick of the sensor.
    with pytest.raises(ConfigurationError, match="champion 1 does not say"):
        champion_drift(settings, platform.contracts)
    absent = (
        lambda: registry.version_tags(settings, "99"),
        lambda: registry.promote(settings, "99"),
        lambda: registry.log_metrics(settings, "99", {"rmse": 1.0}),
        lambda: registry.register(settings, "absent", table_snapshots={}, tags={}),
    )
    for ask in absent:
        with pytest.raises(ConfigurationError, match="model registry"):
            ask()
    artifacts = tmp_path / "mlflow" / "artifacts"
    artifacts.rename(tmp_path / "moved")
    artifacts.write_text("no folder")
    with pytest.raises(ConfigurationError, match="model registry"):
        registry.store(settings, model, tags={}, files={})
    _append(platform, "venue-bars", make_bars(intervals=INTERVALS))
    away = Platform(settings.model_copy(update={"mlflow_uri": "http://127.0.0.1:9"}), platform.contracts)
    monkeypatch.setattr(steps, "train", lambda *_: pytest.fail("it trains before it asks for the registry"))
    with pytest.raises(ConfigurationError, match="model registry"):
        _train(away)


class _KilledError(BaseException):
    """A kill, as far as one process can show it: nothing of ours catches it."""


def _read(platform: Platform) -> FeatureHistory:
    return read_features(
        platform.settings,
        platform.contracts,
        source=BarsSource.VENUE_BARS,
        max_intervals=INTERVALS,
        reading="test",
        config=FeatureConfig(),
        walk=WalkConfig(),
    )


def _train(platform: Platform) -> None:
    """Read, train for one pass and register."""
    history, recipe = _read(platform), Recipe(training=TrainingConfig(epochs=1))
    graphs = graphs_of(history.features, recipe.graph)
    train_version(platform.settings, platform.contracts, history, graphs, recipe=recipe, walk=WalkConfig())


def test_the_same_data_again_do_not_replace_the_champion(room: Room) -> None:
    assert room.again.result.success
    assert not room.again.check.passed
    assert f"0 intervals are new to champion {room.first.version}" in str(room.again.check.description)
    assert (room.again.champion, room.again.challenger) == (room.first.version, room.again.version)


def test_a_challenger_is_judged_against_the_champion_on_new_intervals_only(room: Room) -> None:
    # The embargo after the champion's training is not judged.
    new = LATER - INTERVALS - WalkConfig().embargo
    assert f"on {new} intervals new to champion {room.first.version}" in str(room.later.check.description)
    won = room.later.check.passed
    assert room.later.champion == (room.later.version if won else room.first.version)


def test_no_drift_in_bars_like_those_that_were_trained_on(room: Room) -> None:
    assert "no drift against champion" in str(_sense(room.platform, room.instance).skip_message)


@pytest.mark.parametrize("table", ["venue-bars", "bars"])
def test_drift_asks_for_one_retraining_a_day(tmp_path: Path, room: Room, table: str) -> None:
    # Tables of its own beside the registry of the room. Live bars, which are forecast, tell more than loaded ones.
    uri = registry.registry_uri(room.platform.settings)
    loud = _platform(tmp_path, mlflow_uri=uri)
    if table == "bars":
        _append(loud, "venue-bars", make_bars(intervals=LATER))
    _append(loud, table, _louder(make_bars(intervals=LATER), since=LATER - 200))
    [request] = _sense(loud, room.instance).run_requests or []
    version = registry.champion_version(loud.settings)
    assert str(request.run_key).startswith(f"drift-{version}-20")
    assert "volatility_1" in request.tags["drift"]
    assert dg.validate_run_config(ml.defs.resolve_job_def("retrain"), request.run_config)
    assert request.run_config["ops"]["features"]["config"] == {"source": BarsSource.VENUE_BARS.name}


def test_too_few_bars_fail_the_run_with_what_is_there_and_what_is_needed(tmp_path: Path) -> None:
    platform = _platform(tmp_path)
    _append(platform, "bars", make_bars(intervals=100, interval="1m", interval_ns=60_000_000_000))
    message = _failure(platform)
    # Without the warm-up of the means, and the last interval, which has no label.
    assert "97 intervals of 60 s" in message
    assert f"{WalkConfig().least_rows} are needed" in message
    assert "streamforge load history" in message
    assert registry.champion_version(platform.settings) is None


@pytest.mark.parametrize("create", [True, False])
def test_empty_or_missing_tables_fail_the_run_with_the_way_out(tmp_path: Path, *, create: bool) -> None:
    message = _failure(_platform(tmp_path, create=create))
    assert "no bars in bars or venue-bars" in message
    assert "streamforge load history" in message


def test_readings_of_runs_that_failed_are_forgotten_after_a_day(tmp_path: Path) -> None:
    platform = _platform(tmp_path)
    _append(platform, "bars", make_bars(intervals=10))
    view = find_bars(platform.settings, platform.contracts, BarsSource.BARS)
    now_s = int(time.time())
    old, fresh = f"{READING_TAG}{now_s - 90_000}-old", f"{READING_TAG}{now_s - 60}-fresh"
    for tag in (old, fresh):
        set_tag(view.table, tag, view.snapshot_id)
    own = pin_reading(find_bars(platform.settings, platform.contracts, BarsSource.BARS), "own")
    table = load_table(open_catalog(platform.settings), platform.settings, platform.contracts["bars"])
    assert {tag for tag in table.metadata.refs if tag.startswith(READING_TAG)} == {fresh, own}


def test_without_a_champion_the_sensor_says_so(tmp_path: Path) -> None:
    with dg.instance_for_test() as instance:
        assert "no champion yet" in str(_sense(_platform(tmp_path), instance).skip_message)


def test_the_schedule_asks_each_monday_for_a_model_that_the_champion_can_be_compared_with(
    tmp_path: Path, room: Room
) -> None:
    when = datetime(2026, 1, 5, 3, tzinfo=UTC)
    asked = {}
    for name, platform in {"champion": room.platform, "none": _platform(tmp_path)}.items():
        resources = {PLATFORM_RESOURCE: platform}
        with dg.build_schedule_context(scheduled_execution_time=when, resources=resources) as context:
            [request] = ml.weekly_retraining.evaluate_tick(context).run_requests or []
        assert request.run_key == "weekly-2026-01-05"
        asked[name] = request.run_config
    # More live bars than loaded ones change nothing: they are of another length.
    assert asked == {"champion": {"ops": {"features": {"config": {"source": "VENUE_BARS"}}}}, "none": {}}
    assert ml.weekly_retraining.cron_schedule == "0 3 * * 1"


def _platform(home: Path, *, create: bool = True, mlflow_uri: str | None = None) -> Platform:
    settings = Settings(_env_file=None, home=home, mlflow_uri=mlflow_uri)  # type: ignore[call-arg]
    contracts = load_contracts(settings.contracts_dir)
    if create:
        for name in ("bars", "venue-bars"):
            ensure_table(open_catalog(settings), settings, contracts[name])
    return Platform(settings, contracts)


def _append(platform: Platform, contract_id: str, bars: pa.Table, *, since: int = 0, until: int = LATER) -> None:
    contract = platform.contracts[contract_id]
    first_ns, end_ns = FIRST_NS + since * HOUR_NS, FIRST_NS + until * HOUR_NS
    starts_ns = bars["ts_start_ns"]
    chosen = bars.filter(pc.and_(pc.greater_equal(starts_ns, first_ns), pc.less(starts_ns, end_ns)))
    table = load_table(open_catalog(platform.settings), platform.settings, contract)
    table.append(as_rows(chosen, contract))


def _louder(bars: pa.Table, *, since: int) -> pa.Table:
    """Return bars whose range is wider from interval `since` on."""
    later = pc.greater_equal(bars["ts_start_ns"], FIRST_NS + since * HOUR_NS)
    low = pc.cast(bars["low"], pa.float64()).to_numpy()
    high = pc.cast(bars["high"], pa.float64()).to_numpy()
    wider = pa.array((low * (high / low) ** 4.5).round(9))
    exact = pc.if_else(later, pc.cast(wider, pa.decimal128(38, 18)), bars["high"])
    return bars.set_column(bars.column_names.index("high"), "high", exact)


def _resources(platform: Platform) -> Mapping[str, Any]:
    return {PLATFORM_RESOURCE: dg.ResourceDefinition.hardcoded_resource(platform)}


def _retrain(platform: Platform, instance: dg.DagsterInstance, *, check: bool = True) -> dg.ExecuteInProcessResult:
    job = dg.Definitions(
        assets=ml.ASSETS, asset_checks=ml.CHECKS, jobs=[ml.retrain], resources=_resources(platform)
    ).resolve_job_def("retrain")
    return job.execute_in_process(instance=instance, raise_on_error=check)


def _retrained(platform: Platform, instance: dg.DagsterInstance) -> Retraining:
    result = _retrain(platform, instance)
    aliases = [registry.alias_version(platform.settings, name) for name in (registry.CHAMPION, registry.CHALLENGER)]
    return Retraining(result, *aliases)


def _failure(platform: Platform) -> str:
    with dg.instance_for_test() as instance:
        result = _retrain(platform, instance, check=False)
    assert not result.success
    [event] = [item for item in result.get_step_failure_events() if item.step_key == "features"]
    failure = event.step_failure_data.user_failure_data
    assert failure is not None
    return str(failure.description)


def _metadata(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    [event] = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in event.metadata.items()}


def _sense(platform: Platform, instance: dg.DagsterInstance) -> Any:
    with dg.build_sensor_context(instance=instance, resources=_resources(platform)) as context:
        return ml.drift.evaluate_tick(context)
