"""The chaos harness itself: what it draws, what it finds out of order, how it adds up, how it shortens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamforge.market.records import AggressorSide, Bar, GapKind, MarketGap, Trade
from tests.chaos.order import Disorder, check_bar_counts, check_order
from tests.chaos.report import Result, Suffered, append, as_text, count
from tests.chaos.schedule import KINDS, VICTIMS, Fault, chosen, draw, read_schedule, steps_of, write_schedule
from tests.chaos.shrink import shrink
from tests.chaos.victim import Agent, Order, obeyed_file, order_file

MINUTE_NS = 60_000_000_000


def test_draw_begins_with_each_kind_once_and_depends_on_the_seed_alone() -> None:
    faults = draw(7, 60)
    assert sorted(item.kind for item in faults[: len(KINDS)]) == sorted(KINDS)
    assert all(item.target in KINDS[item.kind].targets for item in faults)
    assert [item.number for item in faults] == list(range(1, 61))
    assert draw(7, 60) == faults != draw(8, 60)


def test_draw_of_a_long_run_kills_each_victim_at_each_of_its_steps() -> None:
    hit = {(item.target, item.step) for item in draw(1, 2_000) if item.kind == "kill_at_step"}
    assert hit == {(name, step) for name in VICTIMS for step in steps_of(name)}


def test_schedule_is_read_back_and_cut_by_numbers(tmp_path: Path) -> None:
    faults = draw(3, 30)
    write_schedule(tmp_path / "schedule", faults)
    assert read_schedule(tmp_path / "schedule") == faults
    assert chosen(faults, "5..7") == faults[4:7]
    assert chosen(faults, None) == faults


def test_order_within_a_key_is_found_broken_by_going_back_and_by_repeating() -> None:
    found = Disorder()
    check_order(found, "x", [("a", (1, 0)), ("b", (9, 0)), ("a", (1, 1)), ("b", (3, 0)), ("a", (1, 1)), ("a", (2, 0))])
    assert (found.count, found.compared["x"]) == (2, 4)
    assert found.examples == ["x: b: (3, 0) behind (9, 0)", "x: a: (1, 1) behind (1, 1)"]


@pytest.mark.parametrize(("counted", "late", "wrong"), [(3, 0, 0), (2, 1, 0), (2, 0, 1), (4, 0, 1)])
def test_bar_counts_each_trade_once_but_those_that_a_gap_calls_late(counted: int, late: int, wrong: int) -> None:
    trades = [_trade(second * 1_000_000_000) for second in (0, 30, 59)]
    not_closed = _trade(MINUTE_NS)
    found = Disorder()
    check_bar_counts(found, [*trades, not_closed], [_bar(9, 0), _bar(counted, 1)], [_late_trade()] * late)
    assert found.count == wrong


def test_results_of_parts_add_up(tmp_path: Path) -> None:
    kill, freeze = (_fault(1, kind) for kind in ("kill", "freeze"))
    first = count([_suffered(kill, 1.0), _suffered(kill, 3.0)], seed=1, started_by_hand={"parser, exit code 3": 1})
    second = count([_suffered(kill, 2.0), _suffered(freeze, None)], seed=2, started_by_hand={})
    append(tmp_path / "results", first)
    total = append(tmp_path / "results", msgspec.structs.replace(second, lost=4))
    assert (total.seeds, total.faults, total.not_reached) == ([1, 2], {"kill": 3}, {"freeze": 1})
    assert total.recovery_s == {"kill": [1.0, 3.0, 2.0]}
    assert (total.lost, total.is_clean, first.is_clean) == (4, False, True)
    assert "4 lost" in as_text(total)


def test_result_with_a_violation_is_not_clean() -> None:
    clean: Result = count([], seed=1, started_by_hand={})
    assert clean.is_clean
    assert not msgspec.structs.replace(clean, violation="two survived").is_clean
    assert not msgspec.structs.replace(clean, disordered=1).is_clean


def test_shrink_finds_the_two_faults_that_are_needed_together() -> None:
    faults = draw(1, 24)

    def fails(part: Sequence[Fault]) -> bool:
        return {5, 19} <= {item.number for item in part}

    assert [item.number for item in shrink(faults, fails, tries=500)] == [5, 19]
    assert fails(shrink(faults, fails, tries=3))


def test_agent_obeys_an_order_once_at_the_passage_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    agent = Agent(tmp_path, "writer-0")
    order_file(tmp_path, "writer-0").write_bytes(msgspec.json.encode(Order(1, "slow", "here", 2, 0.5)))
    agent.look()
    for name in ("here", "there", "here", "here"):
        agent.step(name)
    assert slept == [0.5]
    assert obeyed_file(tmp_path, "writer-0").exists()


def test_agent_leaves_an_order_alone_that_was_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    agent = Agent(tmp_path, "writer-0")
    order = order_file(tmp_path, "writer-0")
    order.write_bytes(msgspec.json.encode(Order(1, "slow", "here", 1, 0.5)))
    agent.look()
    order.unlink()
    agent.step("here")
    assert not slept


def _fault(number: int, kind: str) -> Fault:
    return Fault(number=number, kind=kind, target="parser", gap_s=0.0)


def _suffered(fault: Fault, recovery_s: float | None) -> Suffered:
    return Suffered(fault=fault, at_s=0.0, recovery_s=recovery_s)


def _trade(ts_ns: int) -> Trade:
    values: dict[str, Any] = {
        **dict.fromkeys(("venue", "symbol", "trade_id", "price", "size", "raw_topic_id", "parser_version"), "1"),
        **dict.fromkeys(("ts_receive_ns", "raw_partition", "raw_offset", "raw_index"), 0),
    }
    return Trade(instrument="A", aggressor_side=AggressorSide.BUY, ts_event_ns=ts_ns, **values)


def _bar(trade_count: int, revision: int) -> Bar:
    values = dict.fromkeys(set(Bar.__struct_fields__), "1") | dict.fromkeys(
        ("replay_epoch", "trades_partition", "trades_start_offset", "trades_end_offset"), 0
    )
    values |= {"instrument": "A", "ts_start_ns": 0, "ts_end_ns": MINUTE_NS}
    return Bar(**values | {"trade_count": trade_count, "revision": revision})  # type: ignore[arg-type]


def _late_trade() -> MarketGap:
    values: dict[str, Any] = dict.fromkeys(("gap_id", "venue", "channel", "detail"), "1")
    numbers: dict[str, Any] = dict.fromkeys(("ts_start_ns", "records_dropped", "bytes_dropped", "ts_detected_ns"), 0)
    return MarketGap(kind=GapKind.LATE_TRADE, instrument="A", ts_end_ns=MINUTE_NS, **values, **numbers)
