"""Consumers from Dagster, on a real broker: told and heard, observed, and watched when they stand still."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
import msgspec
import pytest
from confluent_kafka import Producer
from dagster._core.definitions.sensor_definition import SensorExecutionData

from assets.catalogue import PLATFORM_RESOURCE, stream_key, stream_specs
from assets.consumers import ALIVE, KINDS, Consumer
from assets.maintenance import maintenance_key
from orchestration import control, lakehouse
from orchestration.control import stuck_consumers
from orchestration.resources import Platform
from streamforge.contracts import load_contracts
from streamforge.events import EventKind, ProcessEvent, ProcessState
from streamforge.kafka import producer_config
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.platform.plan import BROKER, make_plan
from streamforge.processes import LOOPBACK, choose_free_port
from streamforge.settings import Settings
from streamforge.supervision import (
    EVENTS_CONTRACT,
    EventPublisher,
    ProcessIdentity,
    ProcessStatus,
    read_process_states,
    topic_of,
)
from streaming.processors.bars import Bars
from streaming.processors.history import HistoryParser
from streaming.processors.inference import Inference
from streaming.processors.parser import Parser
from streaming.writer import WriterWorker
from tests.dagster_support import Jobs, with_platform
from tests.pipeline_support import Pipeline, running, wait_for_positions
from tests.waiting import wait_until
from tests.writer_support import writer_settings

pytestmark = pytest.mark.integration

BY_KIND = {each.kind: each for each in KINDS}
ITEM = str(TopicPartition("trades", 0))


@pytest.fixture
def jobs(pipeline: Pipeline) -> Iterator[Jobs]:
    definitions = with_platform(control.definitions(pipeline.contracts), pipeline.settings, pipeline.contracts)
    with dg.instance_for_test() as instance:
        yield Jobs(definitions, instance)


def test_every_process_of_a_platform_is_a_consumer_asset_behind_the_streams_it_reads(pipeline: Pipeline) -> None:
    plan = make_plan(pipeline.settings, broker=True, simulator=True, remember=False)
    assert {each.kind for each in plan.processes} - {BROKER} <= set(BY_KIND)
    specs = {spec.key: spec for assets in control.definitions(pipeline.contracts).assets or () for spec in assets.specs}  # type: ignore[union-attr]
    found = {each.kind: {dep.asset_key for dep in specs[each.key].deps} for each in KINDS}
    contracts = pipeline.contracts
    streams = {spec.key: {dep.asset_key for dep in spec.deps} for spec in stream_specs(contracts)}
    for processor in (Parser, Bars, HistoryParser, Inference):
        inputs = {stream_key(contracts[processor.input_id])}
        assert found[processor.kind] == inputs
        made = [contracts[name] for name in processor.output_ids if name != "market-gaps"]  # others make gaps too
        assert made
        assert [streams[stream_key(each)] for each in made] == [inputs] * len(made)
    writer = WriterWorker(
        writer_settings(pipeline.settings, writer_contracts=()),
        contracts,
        slot="0",
        metrics=ProcessMetrics("writer", "0"),
    )
    topics = {topic_of(contracts, each.id).name: stream_key(each) for each in contracts.with_topic}
    assert found["writer"] == {topics[name] for name in writer.topics}
    writer.close()
    assert not found["loader"] | found["simulator"]


def test_no_job_of_the_location_is_empty() -> None:
    # A selection by group leaves out assets that are only observed, and says nothing.
    repository = lakehouse.defs.get_repository_def()
    assert [job.name for job in repository.get_all_jobs() if not job.nodes] == []


def test_every_schedule_and_sensor_of_the_location_has_its_job_and_only_that_of_the_marts_is_off() -> None:
    repository = lakehouse.defs.get_repository_def()
    jobs = {job.name for job in repository.get_all_jobs()}
    scheduled = {each.job_name: each.default_status.value for each in repository.schedule_defs}
    assert set(scheduled) <= jobs
    letters = {"observe_dead_letters", "check_dead_letters"}
    running = {"observe", "observe_consumers", "quality", "bars_backfill", "maintain", "remove_orphans"} | letters
    assert scheduled == dict.fromkeys(running, "RUNNING") | {"marts": "STOPPED"}
    sensors = {each.name: each.default_status.value for each in repository.sensor_defs}
    always_on = ("stuck_consumers", "hours_that_replays_changed", "bars_follow_replays")
    assert sensors == dict.fromkeys(always_on, "RUNNING")


def test_maintenance_visits_every_table() -> None:
    repository = lakehouse.defs.get_repository_def()
    contracts = load_contracts(Settings.model_fields["contracts_dir"].default)
    keys = repository.get_job("maintain").asset_layer.selected_asset_keys
    assert keys >= {maintenance_key(contract) for contract in contracts.with_table}


def test_jobs_tell_a_live_consumer_and_hear_its_answer(pipeline: Pipeline, jobs: Jobs) -> None:
    with running(pipeline, "parser") as parser:
        wait_for_positions(pipeline, parser, "raw-trades")
        paused = jobs.run("pause", {"target": "parser"})
        assert paused.success, paused.failure
        assert (paused.metadata["state"], paused.metadata["process"].partition("@")[0]) == ("paused", "parser/0")
        assert health(jobs, BY_KIND["parser"]) == (True, "parser/0 is paused")
        assert jobs.run("resume", {"target": "parser/0"}).metadata["state"] == "running"
        assert jobs.run("stop", {"target": str(paused.metadata["process"])}).metadata["state"] == "stopping"
        assert parser.join() == 0
    assert health(jobs, BY_KIND["parser"]) == (True, "parser/0 was stopped")


def test_job_waits_for_every_live_process_and_names_the_one_that_does_not_answer(
    pipeline: Pipeline, jobs: Jobs
) -> None:
    with running(pipeline, "parser", slot="0"), running(pipeline, "parser", slot="1"):
        wait_until(lambda: live(pipeline) == {"parser/0", "parser/1"}, what="both parsers have spoken")
        both = jobs.run("pause", {"target": "parser", "wait_s": 60.0})
        assert both.success, both.failure
        assert [each.partition("@")[0] for each in both.metadata["process"].split(", ")] == ["parser/0", "parser/1"]
        assert both.metadata["state"] == "paused, paused"
        # It speaks and obeys nobody; who has ended, or is of another kind, is not waited for.
        with speaking(pipeline, "parser", "2") as deaf, speaking(pipeline, "parser", "3") as ended:
            deaf.heartbeat(status(position=1, lag=0))
            ended.heartbeat(status(position=1, lag=0))
            ended.finished()
        with speaking(pipeline, "bars", "0") as other:
            other.heartbeat(status(position=1, lag=0))
        ran = jobs.run("resume", {"target": "parser", "wait_s": 10.0})
    assert not ran.success
    assert f"from {deaf.identity.process_id}; parser/0@" in ran.failure
    assert "parser/3" not in ran.failure


def test_job_that_nobody_answers_fails_and_says_whom_it_asked(jobs: Jobs) -> None:
    ran = jobs.run("pause", {"target": "nobody", "wait_s": 0.5})
    assert not ran.success
    assert "nobody answered pause to 'nobody' within 0.5 s" in ran.failure
    assert ran.error == "RetryableSourceError"


def test_job_without_a_broker_fails_and_says_so(pipeline: Pipeline) -> None:
    away = pipeline.settings.model_copy(update={"bootstrap_servers": f"{LOOPBACK}:{choose_free_port()}"})
    definitions = with_platform(control.definitions(pipeline.contracts), away, pipeline.contracts)
    with dg.instance_for_test() as instance:
        ran = Jobs(definitions, instance).run("stop", {"target": "parser"})
    assert not ran.success
    assert "Is the broker up?" in ran.failure


def test_job_without_a_target_is_refused_before_it_starts(jobs: Jobs) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match="target"):
        jobs.run("stop", {})


def test_observation_tells_state_and_lag_of_each_replica(pipeline: Pipeline, jobs: Jobs) -> None:
    with speaking(pipeline, "writer", "0") as zero, speaking(pipeline, "writer", "1") as one:
        zero.heartbeat(status(position=100, lag=7))
        one.heartbeat(status(position=50, lag=5))
    assert health(jobs, BY_KIND["writer"])[0]
    assert health(jobs, BY_KIND["bars"]) == (
        True,
        "no bars spoke in the last 7 days: nobody runs it here",
    )
    assert jobs.definitions.resolve_job_def("observe_consumers").execute_in_process(instance=jobs.instance).success
    [record] = jobs.instance.fetch_observations(BY_KIND["writer"].key, limit=1).records
    assert record.asset_observation is not None
    metadata = {name: value.value for name, value in record.asset_observation.metadata.items()}
    assert (metadata["replicas"], metadata["lag_records"], metadata["health"]) == (2, 12, "well, well")
    table = record.asset_observation.metadata["processes"]
    assert isinstance(table, dg.TableMetadataValue)
    rows = {str(row.data["process"]).partition("@")[0]: row.data for row in table.records}
    assert (rows["writer/0"]["next_offsets"], rows["writer/1"]["lag_records"]) == (100, 5)


def test_sensor_fails_the_check_of_a_stuck_consumer_once_and_passes_it_when_it_moves(pipeline: Pipeline) -> None:
    clock = Clock()
    with speaking(pipeline, "writer", "0", clock) as writer, dg.instance_for_test() as instance:
        for ago_s, lag in ((90, 10), (45, 500), (1, 900)):
            clock.set(ago_s)
            writer.heartbeat(status(position=100, lag=lag))
        assert writer.flush() == 0
        first = tick(pipeline, instance, None)
        [failed] = first.asset_events
        assert isinstance(failed, dg.AssetCheckEvaluation)
        assert (failed.asset_key, failed.check_name, failed.passed) == (BY_KIND["writer"].key, ALIVE, False)
        assert "stands still at 100" in str(failed.description)
        second = tick(pipeline, instance, first.cursor)
        assert second.asset_events == [], "a check that says the same again buries the others"
        assert "stands still at 100" in str(second.skip_message)
        clock.set(0)
        writer.heartbeat(status(position=1000, lag=0))
        assert writer.flush() == 0
        [passed] = tick(pipeline, instance, second.cursor).asset_events
        assert isinstance(passed, dg.AssetCheckEvaluation)
        assert passed.passed


def test_sensor_fails_the_check_of_a_silent_consumer_but_not_of_a_stopped_one(pipeline: Pipeline) -> None:
    clock = Clock()
    clock.set(90)
    with speaking(pipeline, "parser", "0", clock) as silent, speaking(pipeline, "bars", "0", clock) as stopped:
        silent.heartbeat(status(position=1, lag=0))
        stopped.heartbeat(status(position=1, lag=0))
        stopped.finished()
    with dg.instance_for_test() as instance:
        events = tick(pipeline, instance, None).asset_events
    verdicts = {each.asset_key: each.passed for each in events if isinstance(each, dg.AssetCheckEvaluation)}
    assert verdicts == {BY_KIND["parser"].key: False, BY_KIND["bars"].key: True}


def test_consumer_that_died_hours_ago_stays_failed_beside_one_that_lives(pipeline: Pipeline, jobs: Jobs) -> None:
    # The same record as a live process writes, but two hours old for Kafka too: outside of the hour that is judged.
    long_ago(pipeline, "writer", "1", state=ProcessState.RUNNING)
    long_ago(pipeline, "bars", "0", state=ProcessState.STOPPED)
    with speaking(pipeline, "writer", "0") as lives:
        lives.heartbeat(status(position=1, lag=0))
    passed, text = health(jobs, BY_KIND["writer"])
    assert not passed
    assert "writer/1 said nothing for 7" in text
    assert health(jobs, BY_KIND["bars"]) == (True, "bars/0 was stopped")
    first = tick(pipeline, jobs.instance, None)
    verdicts = {each.asset_key: each.passed for each in first.asset_events if isinstance(each, dg.AssetCheckEvaluation)}
    assert verdicts == {BY_KIND["writer"].key: False, BY_KIND["bars"].key: True}
    # This tick reads the last hour only: the dead one is remembered.
    second = tick(pipeline, jobs.instance, first.cursor)
    assert second.asset_events == []
    assert "writer/1 said nothing" in str(second.skip_message)


def test_sensor_without_a_broker_skips_and_keeps_what_it_knows(pipeline: Pipeline) -> None:
    away = pipeline.settings.model_copy(update={"bootstrap_servers": f"{LOOPBACK}:{choose_free_port()}"})
    with dg.instance_for_test() as instance:
        ticked = tick(pipeline._replace(settings=away), instance, "{}")
    assert "nothing is known of the consumers" in str(ticked.skip_message)
    assert (ticked.cursor, ticked.asset_events) == ("{}", [])


class Clock:
    """A wall clock that a test sets, as seconds before now."""

    def __init__(self) -> None:
        self._ns = time.time_ns()

    def set(self, ago_s: float) -> None:
        """Set it so long before now."""
        self._ns = time.time_ns() - int(ago_s * 1e9)

    def __call__(self) -> int:
        """Return the time in nanoseconds."""
        return self._ns


@contextmanager
def speaking(pipeline: Pipeline, kind: str, slot: str, clock: Clock | None = None) -> Iterator[EventPublisher]:
    """Speak for a process; everything that was said has arrived at the end."""
    identity = ProcessIdentity.of_this_process(kind, slot)
    publisher = EventPublisher(pipeline.settings, pipeline.contracts, identity, clock_ns=clock or time.time_ns)
    try:
        yield publisher
        assert publisher.flush(30) == 0
    finally:
        publisher.close()


def live(pipeline: Pipeline) -> set[str]:
    """Return the slots that have spoken."""
    return {each.partition("@")[0] for each in read_process_states(pipeline.settings, pipeline.contracts)}


def long_ago(pipeline: Pipeline, kind: str, slot: str, *, state: ProcessState) -> None:
    """Leave the last word of a process of two hours ago."""
    when_s = int(time.time()) - 7_200
    kind_of = EventKind.FINISHED if state is ProcessState.STOPPED else EventKind.HEARTBEAT
    event = ProcessEvent(
        process_id=f"{kind}/{slot}@1",
        kind=kind,
        slot=slot,
        host="h",
        pid=1,
        version="1",
        event=kind_of,
        state=state,
        ts_ns=when_s * 10**9,
        assignment=[],
        positions={},
        lag={},
        counters={},
    )
    producer = Producer(producer_config(pipeline.settings))
    producer.produce(pipeline.topic(EVENTS_CONTRACT), msgspec.json.encode(event), timestamp=when_s * 1000)
    assert producer.flush(30) == 0


def status(*, position: int, lag: int) -> ProcessStatus:
    return ProcessStatus(ProcessState.RUNNING, [ITEM], {ITEM: position}, {ITEM: lag})


def tick(pipeline: Pipeline, instance: dg.DagsterInstance, cursor: str | None) -> SensorExecutionData:
    """Evaluate the sensor as the daemon does."""
    resource = Platform(pipeline.settings, pipeline.contracts)
    with dg.build_sensor_context(instance, cursor=cursor, resources={PLATFORM_RESOURCE: resource}) as context:
        return stuck_consumers.evaluate_tick(context)


def health(jobs: Jobs, consumer: Consumer) -> tuple[bool, str]:
    """Check all consumers and return what the check of one says."""
    result = jobs.definitions.resolve_job_def("check_consumers").execute_in_process(instance=jobs.instance)
    assert result.success
    found = {each.asset_key: each for each in result.get_asset_check_evaluations()}
    assert set(found) == {each.key for each in KINDS}
    return found[consumer.key].passed, str(found[consumer.key].description)
