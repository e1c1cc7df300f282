"""The runner on a real broker: signals, commands, desired state, positions, gaps, fencing, rebalances."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge.events import CommandKind, EventKind, ProcessEvent, ProcessState, decode_command
from streamforge.kafka import admin_client, consumer_config, producer_config
from streamforge.lakehouse.pipeline_gaps import read_gaps
from streamforge.log_reader import log_ends
from streamforge.market.records import Trade
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.retention_gaps import open_gaps
from streamforge.supervision import read_process_states, send_command, wait_for_answer
from streaming.runner import RunnerOptions, run_worker
from tests.pipeline_support import (
    INSTRUMENTS,
    START_MS,
    Pipeline,
    RawFrame,
    WorkerThread,
    committed,
    dead_letters,
    make_trade,
    make_worker,
    process,
    produce_raw,
    produce_trades,
    running,
    trade_frame,
    wait_for_positions,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


def frames(ids: Iterable[int]) -> list[RawFrame]:
    return [RawFrame(name, trade_frame(name, number)) for number in ids for name in INSTRUMENTS]


def states(pipeline: Pipeline, kind: str) -> list[ProcessEvent]:
    found = read_process_states(pipeline.settings, pipeline.contracts)
    return [event for event in found.values() if event.kind == kind]


def wait_for_state(pipeline: Pipeline, kind: str, state: ProcessState) -> ProcessEvent:
    def latest() -> ProcessEvent | None:
        return next((event for event in states(pipeline, kind) if event.state is state), None)

    return wait_until(latest, what=f"a {kind} says that it is {state}")


def trade_ids(pipeline: Pipeline, instrument: str) -> list[int]:
    """Return the trade ids of an instrument in `trades`, in the order of the log."""
    trades = (msgspec.json.decode(m.value() or b"", type=Trade) for m in committed(pipeline, "trades"))
    return [int(trade.trade_id) for trade in trades if trade.instrument == instrument]


def tell(pipeline: Pipeline, target: str, command: CommandKind) -> ProcessEvent:
    sent = send_command(pipeline.settings, pipeline.contracts, target=target, command=command, issued_by="test")
    return wait_for_answer(pipeline.settings, pipeline.contracts, sent)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_on_a_signal_commits_says_finished_and_exits_0(
    pipeline: Pipeline, number: signal.Signals, tmp_path: Path
) -> None:
    produce_raw(pipeline, frames(range(50)))
    with process(pipeline, "parser", log=tmp_path / "log") as running_process:
        wait_until(lambda: committed(pipeline, "trades"), what=f"trades come; {running_process.said()}")
        running_process.send_signal(number)
        assert running_process.wait() == 0, running_process.said()
    assert trade_ids(pipeline, INSTRUMENTS[0]) == list(range(50))
    [event] = states(pipeline, "parser")
    assert (event.event, event.state, event.exit_code) == (EventKind.FINISHED, ProcessState.STOPPED, 0)


def test_commands_ping_pause_resume_stop_are_obeyed_and_answered(pipeline: Pipeline) -> None:
    produce_raw(pipeline, frames(range(10)))
    thread = WorkerThread(pipeline, make_worker(pipeline, "parser"))
    wait_for_positions(pipeline, thread, "raw-trades")

    answer = tell(pipeline, "parser/0", CommandKind.PING)
    assert answer.state is ProcessState.RUNNING
    assert answer.positions == {str(item): offset for item, offset in thread.worker.positions().items()}
    assert answer.assignment == sorted(str(item) for item in pipeline.partitions("raw-trades"))
    assert set(answer.lag.values()) == {0}

    assert tell(pipeline, "parser", CommandKind.PAUSE).state is ProcessState.PAUSED
    produce_raw(pipeline, frames(range(10, 20)))
    assert tell(pipeline, "*", CommandKind.PING).state is ProcessState.PAUSED
    assert trade_ids(pipeline, INSTRUMENTS[0]) == list(range(10)), "a paused parser went on"

    assert tell(pipeline, "parser", CommandKind.RESUME).state is ProcessState.RUNNING
    wait_for_positions(pipeline, thread, "raw-trades")
    assert trade_ids(pipeline, INSTRUMENTS[0]) == list(range(20))

    assert tell(pipeline, answer.process_id, CommandKind.STOP).state is ProcessState.STOPPING
    assert thread.join() == 0


def test_commands_to_others_are_not_obeyed(pipeline: Pipeline) -> None:
    with running(pipeline, "parser") as thread:
        for target in ("bars", "parser/1", "parser/0@1"):
            send_command(
                pipeline.settings, pipeline.contracts, target=target, command=CommandKind.STOP, issued_by="test"
            )
        assert tell(pipeline, "parser/0", CommandKind.PING).state is ProcessState.RUNNING
        assert thread.exit_code is None


def test_desired_state_survives_a_restart_and_an_old_stop_does_not(pipeline: Pipeline) -> None:
    for command in (CommandKind.PAUSE, CommandKind.STOP):
        send_command(pipeline.settings, pipeline.contracts, target="parser", command=command, issued_by="test")
    produce_raw(pipeline, frames(range(5)))
    with running(pipeline, "parser") as thread:
        event = wait_for_state(pipeline, "parser", ProcessState.PAUSED)
        wait_until(thread.worker.positions, what="the paused parser has its assignment")
        assert tell(pipeline, event.process_id, CommandKind.PING).state is ProcessState.PAUSED
        assert not committed(pipeline, "trades")
        tell(pipeline, "parser", CommandKind.RESUME)
        wait_for_positions(pipeline, thread, "raw-trades")
    assert trade_ids(pipeline, INSTRUMENTS[0]) == list(range(5))


def test_run_without_knowing_its_desired_state_is_an_error_and_takes_nothing_in(pipeline: Pipeline) -> None:
    send_command(pipeline.settings, pipeline.contracts, target="parser", command=CommandKind.PAUSE, issued_by="test")
    produce_raw(pipeline, frames(range(5)))
    code = run_worker(
        make_worker(pipeline, "parser"),
        pipeline.settings,
        pipeline.contracts,
        slot="0",
        metrics=ProcessMetrics("parser", "0"),
        options=RunnerOptions(control_timeout_s=0),
    )
    assert code == 1
    [event] = states(pipeline, "parser")
    assert "RetryableSourceError" in event.detail
    assert f"{pipeline.topic('queue-control')} was not read to its end" in event.detail
    assert not committed(pipeline, "trades"), "a paused parser went on"


def test_commands_done_once_leave_tombstones_and_desired_state_stays(pipeline: Pipeline) -> None:
    for command in CommandKind:
        send_command(pipeline.settings, pipeline.contracts, target="bars", command=command, issued_by="test")
    last = {message.key(): message.value() for message in committed(pipeline, "queue-control")}
    kept = {key: value for key, value in last.items() if value is not None}
    assert set(kept) == {b"bars"}, "what compaction leaves"
    assert decode_command(kept[b"bars"]).command is CommandKind.RESUME
    assert len(last) == 1 + len(set(CommandKind) - {CommandKind.PAUSE, CommandKind.RESUME})


def test_position_passes_commit_markers_and_aborted_records(pipeline: Pipeline) -> None:
    produce_trades(pipeline, [make_trade(name, 1, START_MS) for name in INSTRUMENTS])
    produce_trades(pipeline, [make_trade(name, 2, START_MS) for name in INSTRUMENTS], abort=True)
    with running(pipeline, "bars") as thread:
        wait_for_positions(pipeline, thread, "trades")
        ends = log_ends(pipeline.settings, pipeline.partitions("trades"))
        assert dict(thread.worker.positions()) == ends
        # Markers alone move the position too, with nothing to process.
        produce_trades(pipeline, [make_trade(name, 3, START_MS) for name in INSTRUMENTS], abort=True)
        wait_for_positions(pipeline, thread, "trades")
    group = f"{pipeline.settings.topic_prefix}bars"
    assert committed_offsets(pipeline, group, "trades") == log_ends(pipeline.settings, pipeline.partitions("trades"))


def committed_offsets(pipeline: Pipeline, group: str, contract_id: str) -> dict[TopicPartition, int]:
    items = [KafkaTopicPartition(item.topic, item.partition) for item in pipeline.partitions(contract_id)]
    with Consumer(consumer_config(pipeline.settings, group=group, slot="reader")) as consumer:
        return {TopicPartition(o.topic, o.partition): o.offset for o in consumer.committed(items, 30)}


def cut_off(pipeline: Pipeline) -> dict[TopicPartition, int]:
    """Remove every record of `raw-trades`, as retention does; return where its logs start now."""
    ends = log_ends(pipeline.settings, pipeline.partitions("raw-trades"))
    cut = [KafkaTopicPartition(item.topic, item.partition, end) for item, end in ends.items()]
    admin = admin_client(pipeline.settings)  # kept until the answers are in: its end cancels them
    for future in admin.delete_records(cut).values():
        future.result()
    return ends


def failure(pipeline: Pipeline) -> ProcessEvent:
    [failed] = [event for event in states(pipeline, "parser") if event.event is EventKind.ERROR]
    assert failed.exit_code == 1
    assert "RetentionGapError" in failed.detail
    return failed


def test_retention_gap_under_a_running_consumer_is_an_error_that_names_it(pipeline: Pipeline) -> None:
    produce_raw(pipeline, frames(range(5)))
    thread = WorkerThread(pipeline, make_worker(pipeline, "parser"))
    wait_for_positions(pipeline, thread, "raw-trades")
    tell(pipeline, "parser", CommandKind.PAUSE)
    produce_raw(pipeline, frames(range(5, 10)))
    ends = cut_off(pipeline)
    send_command(pipeline.settings, pipeline.contracts, target="parser", command=CommandKind.RESUME, issued_by="test")
    assert thread.join() == 1
    said = failure(pipeline).detail
    end = next(end for item, end in ends.items() if str(item) in said)
    assert f"which holds [{end},{end})" in said
    assert "STREAMFORGE_PROCESSOR_ACCEPT_RETENTION_GAP" in said


def test_retention_gap_at_the_start_is_refused_and_can_be_accepted(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    produce_raw(pipeline, frames(range(5)))
    with running(pipeline, "parser") as thread:
        wait_for_positions(pipeline, thread, "raw-trades")
        before = dict(thread.worker.positions())
    produce_raw(pipeline, frames(range(5, 10)))
    ends = cut_off(pipeline)
    produce_raw(pipeline, frames(range(10, 15)))
    assert WorkerThread(pipeline, make_worker(pipeline, "parser")).join() == 1
    said = failure(pipeline).detail
    item = next(item for item in ends if str(item) in said)
    assert f"offsets [{before[item]},{ends[item]}) were removed by retention" in said
    assert "STREAMFORGE_PROCESSOR_ACCEPT_RETENTION_GAP=true" in said
    gaps = read_gaps(pipeline.settings, pipeline.contracts)
    expected = {f"group {pipeline.settings.topic_prefix}parser: {i}[{before[i]},{ends[i]})" for i in ends if ends[i]}
    assert {str(gap) for gap in open_gaps(gaps)} == expected
    assert sum(gap.records_removed or 0 for gap in gaps) == 5 * len(INSTRUMENTS)

    accepting = pipeline.settings.model_copy(update={"processor_accept_retention_gap": True})
    metrics = ProcessMetrics("parser", "0")
    worker = make_worker(pipeline._replace(settings=accepting), "parser", metrics=metrics)
    thread = WorkerThread(pipeline, worker, metrics=metrics)
    wait_for_positions(pipeline, thread, "raw-trades")
    removed = sum(ends.values()) - sum(before.values())
    answer = tell(pipeline, "parser", CommandKind.STOP)
    assert answer.counters["retention_gap_offsets"] == removed == 5 * len(INSTRUMENTS)
    assert thread.join() == 0
    labels = {"topic": pipeline.topic("raw-trades")}
    assert metrics.registry.get_sample_value("streamforge_retention_gap_offsets_total", labels) == removed
    assert trade_ids(pipeline, INSTRUMENTS[0]) == [*range(5), *range(10, 15)]
    assert "retention gap accepted" in "".join(capfd.readouterr())
    assert open_gaps(read_gaps(pipeline.settings, pipeline.contracts)) == []


def test_second_process_with_the_same_slot_fences_the_first(pipeline: Pipeline, tmp_path: Path) -> None:
    produce_raw(pipeline, frames(range(20)))
    with process(pipeline, "parser", log=tmp_path / "zombie") as zombie:
        wait_until(lambda: len(trade_ids(pipeline, INSTRUMENTS[0])) == 20, what=f"it works; {zombie.said()}")
        zombie.send_signal(signal.SIGSTOP)
        produce_raw(pipeline, frames(range(20, 40)))
        with running(pipeline, "parser") as thread:
            wait_for_positions(pipeline, thread, "raw-trades")
            produce_raw(pipeline, frames(range(40, 60)))
            zombie.send_signal(signal.SIGCONT)
            assert zombie.wait() == 3, zombie.said()
            wait_for_positions(pipeline, thread, "raw-trades")
        assert thread.exit_code == 0
    for name in INSTRUMENTS:
        assert trade_ids(pipeline, name) == list(range(60))


def test_rebalance_between_two_slots_keeps_order_and_loses_nothing(pipeline: Pipeline) -> None:
    produce_raw(pipeline, frames(range(100)))
    with running(pipeline, "parser", slot="0") as first:
        wait_for_positions(pipeline, first, "raw-trades")
        with running(pipeline, "parser", slot="1") as second:

            def both_work() -> bool:
                produce_raw(pipeline, frames([both_work.next_id]))  # type: ignore[attr-defined]
                both_work.next_id += 1  # type: ignore[attr-defined]
                return len(first.worker.positions()) == len(second.worker.positions()) == 1

            both_work.next_id = 100  # type: ignore[attr-defined]
            wait_until(both_work, what="each slot has one topic-partition")
            last = both_work.next_id  # type: ignore[attr-defined]
            produce_raw(pipeline, frames(range(last, last + 100)))
            ends = log_ends(pipeline.settings, pipeline.partitions("raw-trades"))
            wait_until(
                lambda: {**first.worker.positions(), **second.worker.positions()} == ends,
                what="both slots together reach the end",
            )
        assert (second.exit_code, first.exit_code) == (0, None)
    for name in INSTRUMENTS:
        assert trade_ids(pipeline, name) == list(range(last + 100))


def test_dead_letters_have_position_reason_and_bytes(pipeline: Pipeline) -> None:
    bad = b'{"stream":"btcusdt@trade","data":{"p":\xff}}'
    large = b"x" * 9_000_000
    producer = Producer(producer_config(pipeline.settings) | {"message.max.bytes": 12_000_000})
    headers: list[tuple[str, str | bytes | None]] = [
        ("venue", b"SIM"),
        ("channel", b"trade"),
        ("connection_id", b"c"),
        ("sequence_in_connection", b"0"),
    ]
    producer.produce(pipeline.topic("raw-trades"), bad, b"BTC-USDT.SIM", 0, headers=[*headers, ("ts_receive_ns", b"1")])
    producer.produce(pipeline.topic("raw-trades"), b"{}", None, 0, headers=[*headers, ("ts_receive_ns", b"1")])
    producer.produce(pipeline.topic("raw-trades"), None, b"BTC-USDT.SIM", 0)
    producer.produce(pipeline.topic("raw-trades"), large[:8_000_000], b"BTC-USDT.SIM", 0, headers=headers)
    assert producer.flush(30) == 0
    with running(pipeline, "parser") as thread:
        wait_for_positions(pipeline, thread, "raw-trades")
    letters = {letter.offset: letter for letter in dead_letters(pipeline, "raw-trades")}
    assert {offset: letter.reason for offset, letter in letters.items()} == {
        0: "malformed_json",
        1: "missing_key",
        2: "missing_header",
        3: "missing_header",
    }
    assert base64.b64decode(letters[0].payload_base64) == bad
    assert (letters[0].topic, letters[0].partition, letters[0].processor) == (pipeline.topic("raw-trades"), 0, "parser")
    assert letters[0].headers["venue"] == "SIM"
    assert base64.b64decode(letters[0].key_base64 or "") == b"BTC-USDT.SIM"
    assert base64.b64decode(letters[3].payload_base64) == large[:8_000_000]
