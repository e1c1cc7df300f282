from __future__ import annotations

import pytest

from streamforge.errors import ConfigurationError
from streamforge.ledger import Fate
from streaming.simulator.faults import Fault, FaultKind, FaultPlan, fault_from_arguments, parse_fault

SECOND_NS = 1_000_000_000


def plan_with(text: str, now_ns: int = 0) -> FaultPlan:
    plan = FaultPlan(seed=1)
    plan.add(parse_fault(text), now_ns)
    assert plan.begin_due(now_ns) == []
    return plan


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("disconnect", Fault(FaultKind.DISCONNECT)),
        ("drop:count=3,channel=trade", Fault(FaultKind.DROP, count=3, channel="trade")),
        ("double:ratio=0.25,symbol=BTCUSDT", Fault(FaultKind.DOUBLE, ratio=0.25, symbol="BTCUSDT")),
        ("stall:duration_s=2.5,at_s=10", Fault(FaultKind.STALL, duration_s=2.5, at_s=10)),
        ("rate:factor=3", Fault(FaultKind.RATE, factor=3)),
        ("listing:symbol=NEWUSDT", Fault(FaultKind.LISTING, symbol="NEWUSDT")),
    ],
)
def test_parse_fault_good_text_gives_the_fault(text: str, expected: Fault) -> None:
    assert parse_fault(text) == expected


def test_fault_from_arguments_is_the_same_grammar() -> None:
    assert fault_from_arguments({"fault": "drop", "count": "3"}) == parse_fault("drop:count=3")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "explode",
        "drop:3",
        "drop:count=many",
        "drop:count=0",
        "drop:ratio=1.5",
        "drop:ratio=-0.1",
        "stall:duration_s=nan",
        "stall:at_s=inf",
        "rate:speed=3",
        "listing",
    ],
)
def test_parse_fault_bad_text_says_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigurationError, match="for instance drop:count=3"):
        parse_fault(text)


@pytest.mark.parametrize(
    ("kind", "fate"),
    [("drop", Fate.DROPPED), ("double", Fate.DOUBLED), ("reorder", Fate.REORDERED), ("malformed", Fate.MALFORMED)],
)
def test_fate_count_hits_the_next_n_that_match(kind: str, fate: Fate) -> None:
    plan = plan_with(f"{kind}:count=2,symbol=BTCUSDT,channel=trade")
    found = [plan.fate(symbol, "trade") for symbol in ("ETHUSDT", "BTCUSDT", "BTCUSDT", "BTCUSDT")]
    assert found == [Fate.SENT, fate, fate, Fate.SENT]
    assert not plan.touches_messages


def test_fate_without_count_or_ratio_hits_one_message() -> None:
    plan = plan_with("drop")
    assert [plan.fate("A", "trade") for _ in range(3)] == [Fate.DROPPED, Fate.SENT, Fate.SENT]


def test_fate_ratio_hits_that_share_and_is_reproducible() -> None:
    first = [plan_with("drop:ratio=0.1").fate("A", "trade") for _ in range(1)]
    plan, again = plan_with("drop:ratio=0.1"), plan_with("drop:ratio=0.1")
    found = [plan.fate("A", "trade") for _ in range(5_000)]
    assert found[:1] == first
    assert found == [again.fate("A", "trade") for _ in range(5_000)]
    assert 400 < found.count(Fate.DROPPED) < 600


def test_begin_due_duration_ends_the_fault() -> None:
    plan = plan_with("drop:duration_s=2")
    assert plan.fate("A", "trade") is Fate.DROPPED
    plan.begin_due(2 * SECOND_NS - 1)
    assert plan.fate("A", "trade") is Fate.DROPPED
    plan.begin_due(2 * SECOND_NS)
    assert plan.fate("A", "trade") is Fate.SENT


def test_begin_due_waits_for_its_time() -> None:
    plan = FaultPlan()
    plan.add(parse_fault("disconnect:at_s=1.5"), 10 * SECOND_NS)
    assert plan.begin_due(11 * SECOND_NS) == []
    assert [fault.kind for fault in plan.begin_due(12 * SECOND_NS)] == [FaultKind.DISCONNECT]
    assert plan.begin_due(13 * SECOND_NS) == []


def test_begin_due_rate_with_duration_goes_back_to_one() -> None:
    plan = FaultPlan()
    plan.add(parse_fault("rate:factor=20,duration_s=3"), 0)
    assert [fault.factor for fault in plan.begin_due(0)] == [20]
    assert plan.begin_due(2 * SECOND_NS) == []
    assert [fault.factor for fault in plan.begin_due(3 * SECOND_NS)] == [1]


def test_begin_due_clear_ends_everything() -> None:
    plan = plan_with("drop:ratio=1")
    plan.add(parse_fault("stall:at_s=5"), 0)
    plan.add(parse_fault("clear"), 0)
    assert [fault.kind for fault in plan.begin_due(0)] == [FaultKind.CLEAR]
    assert plan.fate("A", "trade") is Fate.SENT
    assert plan.begin_due(10 * SECOND_NS) == []
