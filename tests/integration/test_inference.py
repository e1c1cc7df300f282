"""The inference processor with a real champion from a real registry: each forecast once, of what was known then."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from streamforge.contracts import Contracts, load_contracts
from streamforge.gnn.registry import Champion
from streamforge.gnn.training import WEIGHTS_FILE, TrainedModel
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.market.bars import INTERVAL_NS
from streamforge.market.records import Bar, Prediction
from streamforge.metrics import ProcessMetrics
from streamforge.settings import Settings
from streamforge.supervision import read_process_states
from streaming.processors.champion import ChampionWatch
from streaming.processors.inference import Inference, InferenceSettings, InferenceWorker
from streaming.processors.types import Source, TransactionOptions
from tests.inference_support import (
    FIRST_NS,
    WARM_UP,
    bar_message,
    bars_table,
    make_bar,
    make_champion,
    market_minutes,
    produce_bars,
    train_small,
)
from tests.pipeline_support import (
    INSTRUMENTS,
    Pipeline,
    WorkerThread,
    committed,
    dead_letters,
    make_pipeline,
    process,
    wait_for_positions,
)
from tests.waiting import wait_until
from tests.writer_support import running_writer, wait_for_landed, writer_settings

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

TOPICS = (
    "bars",
    "bars.dlq",
    "predictions",
    "predictions.dlq",
    "inference-changelog",
    "queue-events",
    "queue-control",
)
# The market of these tests is years old.
LATE_S = 1e9
SOURCE = Source("bars", "topic-id", 0)
# Just before the commit and just after it; the processors' own tests kill at every step. Each victim loads torch.
STEPS = ("after_offsets", "after_commit")
Place = tuple[str, int]


@pytest.fixture(scope="module")
def contracts() -> Contracts:
    return load_contracts(Settings.model_fields["contracts_dir"].default)


@pytest.fixture(scope="module")
def model(contracts: Contracts) -> TrainedModel:
    """Return a small trained model."""
    return train_small(contracts)


def settings_of(base: Settings, **more: object) -> InferenceSettings:
    known = {name: getattr(base, name) for name in ("home", "contracts_dir", "topic_prefix", "bootstrap_servers")}
    values = {"inference_settle_s": 0.2, "inference_champion_poll_s": 0.05, "inference_max_late_s": LATE_S}
    return InferenceSettings(_env_file=None, **(known | values | more))


def predictions(pipeline: Pipeline) -> list[Prediction]:
    messages = committed(pipeline, "predictions")
    return [msgspec.json.decode(message.value() or b"", type=Prediction) for message in messages]


def places(found: list[Prediction]) -> Counter[Place]:
    """Return instrument and minute of the interval that each forecast is of."""
    return Counter((item.instrument, (item.ts_start_ns - FIRST_NS) // INTERVAL_NS) for item in found)


def minutes(wanted: range) -> Counter[Place]:
    return Counter((instrument, minute) for minute in wanted for instrument in INSTRUMENTS)


@contextmanager
def inference(pipeline: Pipeline) -> Iterator[WorkerThread]:
    """Run the inference worker in a thread."""
    options = TransactionOptions(commit_interval_s=0.05, idle_commit_interval_s=0.1)
    metrics = ProcessMetrics("inference", "0")
    worker = InferenceWorker(
        settings_of(pipeline.settings), pipeline.contracts, slot="0", metrics=metrics, options=options
    )
    thread = WorkerThread(pipeline, worker, metrics=metrics)
    try:
        yield thread
    finally:
        thread.stop()


def note(pipeline: Pipeline) -> str:
    """Return what the process said last of itself."""
    states = read_process_states(pipeline.settings, pipeline.contracts).values()
    return max(states, key=lambda event: event.ts_ns).detail if states else ""


def test_forecasts_begin_with_the_first_champion_follow_the_next_and_land(
    broker_settings: Settings, tmp_path: Path, model: TrainedModel
) -> None:
    pipeline = make_pipeline(broker_settings, tmp_path, f"i{uuid.uuid4().hex[:8]}.", TOPICS)
    writer = writer_settings(pipeline.settings, writer_contracts=("predictions",))
    with inference(pipeline) as thread, running_writer(writer, pipeline.contracts) as writing:
        produce_bars(pipeline, [*market_minutes(range(40)), b"{}"])
        wait_for_positions(pipeline, thread, "bars")
        wait_until(lambda: "no champion yet" in note(pipeline), what="it says that there is no champion")
        assert predictions(pipeline) == []
        make_champion(pipeline.settings, model)
        wait_until(lambda: note(pipeline).startswith("champion 1"), what="the first champion is there")
        produce_bars(pipeline, market_minutes(range(40, 42)))
        wait_for_positions(pipeline, thread, "bars")
        make_champion(pipeline.settings, model)
        wait_until(lambda: note(pipeline).startswith("champion 2"), what="the next champion is there")
        produce_bars(pipeline, [make_bar(INSTRUMENTS[0], 41, revision=1), *market_minutes(range(42, 43))])
        wait_for_positions(pipeline, thread, "bars")
        wait_for_landed(
            pipeline.settings, pipeline.contracts, pipeline.topic("predictions"), "predictions", writer=writing
        )
    found = predictions(pipeline)
    assert places(found) == minutes(range(41, 44))
    versions = {place[1]: item.model_version for place, item in zip(map(_place, found), found, strict=True)}
    assert versions == {41: "1", 42: "1", 43: "2"}
    table = load_table(open_catalog(pipeline.settings), pipeline.settings, pipeline.contracts["predictions"])
    rows = table.scan().to_arrow()
    assert Counter(zip(rows["instrument"].to_pylist(), rows["volatility"].to_pylist(), strict=True)) == Counter(
        (item.instrument, item.volatility) for item in found
    )
    assert [letter.reason for letter in dead_letters(pipeline, "bars")] == ["wrong_type"]


def _place(item: Prediction) -> Place:
    [place] = places([item])
    return place


@pytest.fixture(scope="module")
def pipeline(broker_settings: Settings, tmp_path_factory: pytest.TempPathFactory, model: TrainedModel) -> Pipeline:
    """Return one platform with a champion for all kills: each adds its bars and compares everything so far."""
    made = make_pipeline(broker_settings, tmp_path_factory.mktemp("inference"), f"j{uuid.uuid4().hex[:8]}.", TOPICS)
    make_champion(made.settings, model)
    return made


_fed: dict[str, int] = {}


def feed(pipeline: Pipeline, count: int) -> int:
    """Produce the next minutes of the market and return how many there are by now."""
    prefix = pipeline.settings.topic_prefix
    start = _fed.get(prefix, 0)
    produce_bars(pipeline, market_minutes(range(start, start + count)))
    _fed[prefix] = start + count
    return _fed[prefix]


@pytest.mark.parametrize("step", STEPS)
def test_inference_killed_at_a_step_loses_and_doubles_no_forecast(
    pipeline: Pipeline, step: str, tmp_path: Path
) -> None:
    feed(pipeline, WARM_UP + 4)
    more = {
        "STREAMFORGE_INFERENCE_SETTLE_S": "0.2",
        "STREAMFORGE_INFERENCE_MAX_LATE_S": str(LATE_S),
    }
    with process(pipeline, "inference", kill_at=f"inference.{step}", log=tmp_path / "log", more=more) as victim:
        assert victim.wait(200) == -signal.SIGKILL, victim.said()
    end = feed(pipeline, 4)
    with inference(pipeline) as thread:
        wait_for_positions(pipeline, thread, "bars")
    made, bars = predictions(pipeline), _bars(pipeline)
    found = places(made)
    assert {place: count for place, count in found.items() if count > 1} == {}
    # A window is warm after some bars; from then on there is one for each bar.
    assert Counter(place for place in found if place[1] > WARM_UP) == minutes(range(WARM_UP + 1, end + 1))
    for item in made:
        bar = bars[item.bars_partition, item.bars_offset]
        assert (bar.instrument, bar.ts_end_ns) == (item.instrument, item.ts_start_ns)
        assert item.market_instruments == len(INSTRUMENTS)


def _bars(pipeline: Pipeline) -> Mapping[tuple[int, int], Bar]:
    return {
        (message.partition() or 0, message.offset() or 0): msgspec.json.decode(message.value() or b"", type=Bar)
        for message in committed(pipeline, "bars")
    }


# Without a broker


def processor(contracts: Contracts, champion: Champion | None, *, now_ns: int = FIRST_NS, **more: object) -> Inference:
    settings = InferenceSettings(_env_file=None, inference_max_late_s=600, **more)  # type: ignore[arg-type]
    return Inference(settings, contracts["bars"], lambda: champion, lambda: now_ns)


def run(
    made: Inference, bars: list[Bar], state: object = None, first_offset: int = 0
) -> tuple[list[Prediction], object]:
    """Run one batch and return its forecasts and the state after it."""
    messages = [bar_message(bar, first_offset + number) for number, bar in enumerate(bars)]
    made.see(messages)
    step = made.process(state or {}, SOURCE, messages)  # type: ignore[arg-type]
    return [msgspec.json.decode(item.value, type=Prediction) for item in step.outputs], step.state


def test_forecast_is_that_of_the_bars_up_to_its_interval(contracts: Contracts, model: TrainedModel) -> None:
    champion = Champion("7", model)
    found, _ = run(processor(contracts, champion), market_minutes(range(30)))
    assert places(found) == minutes(range(min(place[1] for place in places(found)), 31))
    assert len(found) > 20 * len(INSTRUMENTS)
    by_place = {_place(item): item.volatility for item in found}
    for minute in (12, 20, 30):
        # What comes after the minute is not there at all here: the processor had it in the same batch.
        known = bars_table(contracts, market_minutes(range(minute)))
        for item in champion.predict(known):
            assert by_place[item.instrument, minute] == pytest.approx(item.volatility, rel=1e-6)


def test_forecast_in_one_batch_or_in_many_is_the_same(contracts: Contracts, model: TrainedModel) -> None:
    champion = Champion("7", model)
    whole, _ = run(processor(contracts, champion), market_minutes(range(25)))
    made = processor(contracts, champion)
    state: object = None
    parts: list[Prediction] = []
    for start in range(25):
        more, state = run(made, market_minutes(range(start, start + 1)), state, start * len(INSTRUMENTS))
        parts += more
    # The batch of one minute has the whole market too.
    assert {_place(item): item.bars_offset for item in parts} == {_place(item): item.bars_offset for item in whole}
    for one, other in zip(parts, whole, strict=True):
        assert one.volatility == pytest.approx(other.volatility, rel=1e-6)


def test_state_of_a_restart_forecasts_on_and_asks_nothing_twice(contracts: Contracts, model: TrainedModel) -> None:
    champion = Champion("7", model)
    first = processor(contracts, champion, inference_window_bars=16)
    _, state = run(first, market_minutes(range(20)))
    keys = [f"{name}@{at}" for name, window in state.items() for at in (*window.bars, "asked")]  # type: ignore[attr-defined]
    saved = {key: first.save(state, key) or "" for key in keys}  # type: ignore[arg-type]
    second = processor(contracts, champion, inference_window_bars=16)
    again, _ = run(second, [make_bar(INSTRUMENTS[0], 19, revision=1)], second.restore(saved))
    assert again == []
    late, _ = run(second, market_minutes(range(20, 21)), second.restore(saved))
    straight, _ = run(first, market_minutes(range(20, 21)), state)
    assert places(late) == minutes(range(21, 22))
    assert [item.volatility for item in late] == [item.volatility for item in straight]


def test_interval_that_is_long_over_is_not_forecast(contracts: Contracts, model: TrainedModel) -> None:
    now_ns = FIRST_NS + 100 * INTERVAL_NS
    found, _ = run(processor(contracts, Champion("7", model), now_ns=now_ns), market_minutes(range(100)))
    # 600 s after its end an interval is over for good.
    assert places(found) == minutes(range(89, 101))
    assert {item.ts_predicted_ns for item in found} == {now_ns}


def test_model_of_longer_intervals_forecasts_once_an_interval(contracts: Contracts) -> None:
    champion = Champion("1", train_small(contracts, interval_ns=5 * INTERVAL_NS))
    found, _ = run(processor(contracts, champion), market_minutes(range(120)))
    starts = sorted({item.ts_start_ns for item in found})
    assert {start % (5 * INTERVAL_NS) for start in starts} == {0}
    assert len(found) == len(starts) * len(INSTRUMENTS)
    assert {item.ts_end_ns - item.ts_start_ns for item in found} == {5 * INTERVAL_NS}
    last = max(starts)
    known = bars_table(contracts, market_minutes(range((last - FIRST_NS) // INTERVAL_NS)))
    wanted = {item.instrument: item.volatility for item in champion.predict(known)}
    assert {item.instrument: item.volatility for item in found if item.ts_start_ns == last} == pytest.approx(wanted)


def test_watch_asks_every_few_seconds_and_keeps_its_champion_when_the_registry_fails(
    tmp_path: Path, model: TrainedModel
) -> None:
    said: list[str] = []
    settings = Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]
    watch = ChampionWatch(settings, 5.0, said.append)
    watch.refresh(0.0)
    assert (watch.champion, said[-1][:15]) == (None, "no champion yet")
    make_champion(settings, model)
    watch.refresh(4.9)
    assert watch.champion is None
    watch.refresh(5.0)
    assert watch.champion is not None
    assert (watch.champion.version, said[-1]) == ("1", "champion 1")
    held = watch.champion
    broken = tmp_path / "broken.db"
    broken.write_text("not a database" * 100)
    watch._settings = settings.model_copy(update={"mlflow_uri": f"sqlite:///{broken}"})
    watch.refresh(10.0)
    assert watch.champion is held
    assert "the registry cannot be asked" in said[-1]


def test_watch_keeps_its_champion_when_the_weights_of_the_next_are_garbage(tmp_path: Path, model: TrainedModel) -> None:
    said: list[str] = []
    settings = Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]
    make_champion(settings, model)
    watch = ChampionWatch(settings, 5.0, said.append)
    watch.refresh(0.0)
    held = watch.champion
    assert held is not None
    known = set(tmp_path.rglob(WEIGHTS_FILE))
    make_champion(settings, model)
    [weights] = set(tmp_path.rglob(WEIGHTS_FILE)) - known
    weights.write_bytes(b"no weights" * 99)
    watch.refresh(5.0)
    assert watch.champion is held
    assert said[-1].startswith("champion 1; ")
    assert "cannot be read" in said[-1]


def test_nothing_heavy_is_imported_before_there_is_a_champion() -> None:
    code = (
        "import json, sys, tempfile\n"
        "from streamforge.settings import Settings\n"
        "import streaming.processors.inference, streaming.processors.history, streaming.writer, cli.run\n"
        "from streaming.processors.champion import ChampionWatch\n"
        "watch = ChampionWatch(Settings(_env_file=None, home=tempfile.mkdtemp()), 1.0, lambda text: None)\n"
        "watch.refresh(0.0)\n"
        "print(json.dumps([name for name in ('torch', 'mlflow', 'lightgbm') if name in sys.modules]))\n"
    )
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == [], time.monotonic() - started_s
