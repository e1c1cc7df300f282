"""What a consumer says of itself while nothing moves: lag when paused, readiness, ages, its place in the group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamforge.events import CommandKind, ProcessEvent, ProcessState
from streamforge.kafka import admin_client
from streamforge.supervision import read_process_states, send_command, wait_for_answer
from tests.forked import Forked
from tests.pipeline_support import (
    INSTRUMENTS,
    Pipeline,
    RawFrame,
    WorkerThread,
    make_worker,
    process,
    produce_raw,
    running,
    trade_frame,
    wait_for_positions,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


def produce(pipeline: Pipeline, ids: range) -> int:
    """Produce a trade of each id for each instrument; return how many."""
    frames = [RawFrame(name, trade_frame(name, number)) for number in ids for name in INSTRUMENTS]
    produce_raw(pipeline, frames)
    return len(frames)


def wait_for_word(pipeline: Pipeline, what: str, condition: Callable[[ProcessEvent], bool]) -> ProcessEvent:
    """Return the first latest word of a parser that fulfils `condition`."""

    def found() -> ProcessEvent | None:
        states = read_process_states(pipeline.settings, pipeline.contracts).values()
        return next((event for event in states if event.kind == "parser" and condition(event)), None)

    return wait_until(found, what=what)


def tell(pipeline: Pipeline, command: CommandKind) -> ProcessEvent:
    sent = send_command(pipeline.settings, pipeline.contracts, target="parser", command=command, issued_by="test")
    return wait_for_answer(pipeline.settings, pipeline.contracts, sent)


def url_of(pipeline: Pipeline, of: Forked) -> str:
    """Return where a process serves its metrics, by its own word."""
    word = wait_for_word(pipeline, f"a live parser; {of.said()}", lambda event: event.exit_code is None)
    return f"http://127.0.0.1:{word.metrics_port}"


def samples(url: str, name: str) -> list[float]:
    """Return every sample called `name` that is served now."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return [sample.value for family in families for sample in family.samples if sample.name == name]


def test_paused_consumer_says_its_true_lag_also_after_a_restart(pipeline: Pipeline, tmp_path: Path) -> None:
    produce(pipeline, range(5))
    with process(pipeline, "parser", log=tmp_path / "log") as parser:
        url = url_of(pipeline, parser)
        wait_for_word(pipeline, "all is parsed", lambda event: sum(event.positions.values()) == 5 * len(INSTRUMENTS))
        assert tell(pipeline, CommandKind.PAUSE).state is ProcessState.PAUSED
        count = produce(pipeline, range(5, 12))
        word = wait_for_word(pipeline, "its lag is what was produced", lambda event: sum(event.lag.values()) == count)
        assert word.state is ProcessState.PAUSED
        assert sum(samples(url, "streamforge_lag_records")) == count
    stopped = word.process_id
    with process(pipeline, "parser", log=tmp_path / "log") as parser:
        word = wait_for_word(
            pipeline,
            f"the next one says the same lag; {parser.said()}",
            lambda event: event.process_id != stopped and sum(event.lag.values()) == count,
        )
        assert word.state is ProcessState.PAUSED
        assert sum(samples(f"http://127.0.0.1:{word.metrics_port}", "streamforge_lag_records")) == count


def test_running_process_serves_ages_that_grow_and_is_not_ready_once_it_holds_nothing(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    # Topic-partitions go to the members in the order of their slots: the last of three has none of two.
    with process(pipeline, "parser", slot="9", log=tmp_path / "log") as parser:
        url = url_of(pipeline, parser)
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200, what=f"it is ready; {parser.said()}")
        assert samples(url, "streamforge_freshness_seconds") == [], "the age of what it has never seen"
        produce(pipeline, range(3))
        [age_s] = wait_until(lambda: samples(url, "streamforge_freshness_seconds"), what="trades have an age")
        assert 'product="trades"' in httpx.get(f"{url}/metrics").text
        wait_until(lambda: samples(url, "streamforge_freshness_seconds") > [age_s], what="the age grows by itself")
        with running(pipeline, "parser", slot="0"), running(pipeline, "parser", slot="1"):
            wait_until(
                lambda: httpx.get(f"{url}/ready").status_code == 503,
                what=f"it is not ready without topic-partitions; {parser.said()}",
            )
            assert samples(url, "streamforge_freshness_seconds") == [], "an age of what another one holds"
            wait_until(lambda: not samples(url, "streamforge_next_offset"), what="its positions are gone")
            assert samples(url, "streamforge_lag_records") == []


def test_paused_consumer_keeps_its_place_in_the_group_beyond_the_poll_interval(pipeline: Pipeline) -> None:
    limit_ms = 6_000
    limits = {"max.poll.interval.ms": limit_ms, "session.timeout.ms": limit_ms}
    produce(pipeline, range(3))
    thread = WorkerThread(pipeline, make_worker(pipeline, "parser"), consumer=limits)
    try:
        wait_for_positions(pipeline, thread, "raw-trades")
        paused = tell(pipeline, CommandKind.PAUSE)
        # One that does not poll stops its own heartbeats after the first limit and is given up after the second.
        until_ns = paused.ts_ns + 3 * limit_ms * 1_000_000
        word = wait_for_word(pipeline, "it speaks on", lambda event: event.ts_ns > until_ns)
        assert word.process_id == paused.process_id
        assert word.state is ProcessState.PAUSED
        assert word.assignment == sorted(str(item) for item in pipeline.partitions("raw-trades"))
        assert members(pipeline) == {("parser.0", tuple(word.assignment))}, "the group has given it up"
    finally:
        thread.stop()


def members(pipeline: Pipeline) -> set[tuple[str, tuple[str, ...]]]:
    """Return slot and topic-partitions of each member of the parsers' group, as its coordinator knows them."""
    prefix = pipeline.settings.topic_prefix
    admin = admin_client(pipeline.settings)  # kept until the answer is in: its end cancels it
    group = admin.describe_consumer_groups([f"{prefix}parser"])[f"{prefix}parser"].result()
    return {
        (
            member.group_instance_id.removeprefix(prefix),
            tuple(sorted(f"{item.topic}-{item.partition}" for item in member.assignment.topic_partitions)),
        )
        for member in group.members
    }
