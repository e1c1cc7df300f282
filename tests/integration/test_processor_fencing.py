"""Who has a slot: a producer fenced by the broker goes on, a slot taken by another ends the process with 3."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer

from streamforge import faults
from streamforge.events import EventKind
from streamforge.kafka import producer_config
from streamforge.log_reader import log_ends, stable_ends
from streamforge.market.records import Trade
from streamforge.supervision import read_process_states
from streaming import runner
from streaming.processors.types import TransactionOptions
from tests.pipeline_support import (
    INSTRUMENTS,
    Pipeline,
    RawFrame,
    WorkerThread,
    committed,
    make_worker,
    produce_raw,
    running,
    trade_frame,
    wait_for_positions,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


def feed(pipeline: Pipeline, ids: Iterable[int]) -> None:
    produce_raw(pipeline, [RawFrame(name, trade_frame(name, number)) for number in ids for name in INSTRUMENTS])


def assert_each_once(pipeline: Pipeline, count: int) -> None:
    """Every trade once, in order: nothing of the transaction that was given up is lost or doubled."""
    trades = [msgspec.json.decode(m.value() or b"", type=Trade) for m in committed(pipeline, "trades")]
    for name in INSTRUMENTS:
        assert [int(trade.trade_id) for trade in trades if trade.instrument == name] == list(range(count))


def once_at(monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[], object]) -> threading.Event:
    """Let `act` happen the first time that a processor passes `step`; the event says that it has happened."""
    done = threading.Event()
    lock = threading.Lock()

    def passed(name: str) -> None:
        if name == step and not done.is_set() and lock.acquire(blocking=False):
            act()
            done.set()

    monkeypatch.setattr(faults, "step", passed)
    return done


def fence(pipeline: Pipeline) -> None:
    """Move the producer's epoch on, as the broker does after a transaction's timeout; no member joins the group."""
    other = Producer(producer_config(pipeline.settings, transactional_id=f"{pipeline.settings.topic_prefix}parser.0"))
    other.init_transactions(30)


@pytest.mark.parametrize(
    "step", ["before_begin", "after_begin", "after_outputs", "after_changelog", "after_flush", "after_offsets"]
)
def test_producer_fenced_while_the_slot_is_ours_goes_on_in_place(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    feed(pipeline, range(20))
    with running(pipeline, "parser") as thread:
        wait_for_positions(pipeline, thread, "raw-trades")
        done = once_at(monkeypatch, f"parser.{step}", lambda: fence(pipeline))
        feed(pipeline, range(20, 40))
        wait_until(done.is_set, what=f"the producer is fenced at {step}")
        wait_for_positions(pipeline, thread, "raw-trades")
    assert thread.exit_code == 0
    assert_each_once(pipeline, 40)


def test_transaction_that_outlived_its_timeout_is_made_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(pipeline, range(20))
    typed = pipeline.partitions("trades")

    def ended_by_the_broker() -> bool:
        ends = log_ends(pipeline.settings, typed)
        return sum(ends.values()) > 0 and stable_ends(pipeline.settings, typed) == ends

    done = once_at(
        monkeypatch,
        "parser.after_flush",
        lambda: wait_until(ended_by_the_broker, what="the broker aborts the transaction"),
    )
    options = TransactionOptions(commit_interval_s=0.05, idle_commit_interval_s=60.0, transaction_timeout_ms=1_000)
    thread = WorkerThread(pipeline, make_worker(pipeline, "parser", options=options))
    wait_until(done.is_set, what="the transaction was aborted")
    wait_for_positions(pipeline, thread, "raw-trades")
    assert thread.stop() == 0
    assert_each_once(pipeline, 20)


def test_slot_taken_by_another_ends_the_first_with_3_and_leaves_the_other_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hears it from its producer, before it polls its consumer again."""
    feed(pipeline, range(20))
    release = threading.Event()
    standing = threading.Event()

    def stand_still() -> None:
        standing.set()
        assert release.wait(60)

    once_at(monkeypatch, "parser.after_flush", stand_still)
    first = WorkerThread(pipeline, make_worker(pipeline, "parser"))
    wait_until(standing.is_set, what="the first stands still amid a transaction")
    heir = make_worker(pipeline, "parser")
    second = WorkerThread(pipeline, heir)
    try:
        wait_for_positions(pipeline, second, "raw-trades")
        release.set()
        assert first.join() == 3
        feed(pipeline, range(20, 40))
        wait_for_positions(pipeline, second, "raw-trades")
        assert "commit_conflicts" not in heir._metrics.counters()
    finally:
        assert second.stop() == 0
    assert_each_once(pipeline, 40)


def test_seek_that_fails_while_the_partition_is_held_is_an_error(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unseekable(Consumer):
        def seek(self, *_: Any) -> None:
            raise KafkaException(KafkaError(KafkaError._STATE, "no seek today"))

    monkeypatch.setattr(runner, "Consumer", Unseekable)
    once_at(monkeypatch, "parser.after_flush", lambda: fence(pipeline))
    feed(pipeline, range(20))
    assert WorkerThread(pipeline, make_worker(pipeline, "parser")).join() == 1
    states = read_process_states(pipeline.settings, pipeline.contracts).values()
    [failed] = [event for event in states if event.event is EventKind.ERROR]
    assert "no seek today" in failed.detail
