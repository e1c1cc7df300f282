"""Who is silent, who is stuck, and who only looks like it."""

from __future__ import annotations

from typing import Any

import pytest

from streamforge.events import EventKind, ProcessEvent, ProcessState
from streamforge.liveness import Health, Judgement, judge, words_that_count

NOW_S = 10_000.0


def said(ago_s: float, *, position: int = 100, lag: int = 0, start: int = 1, **changes: Any) -> ProcessEvent:
    """Return what writer/0 said `ago_s` before now."""
    given: dict[str, Any] = {
        "process_id": f"writer/0@{start}",
        "kind": "writer",
        "slot": "0",
        "host": "h",
        "pid": 1,
        "version": "1",
        "event": EventKind.HEARTBEAT,
        "state": ProcessState.RUNNING,
        "ts_ns": int((NOW_S - ago_s) * 1e9),
        "assignment": ["trades-0"],
        "positions": {"trades-0": position},
        "lag": {"trades-0": lag},
        "counters": {},
    }
    return ProcessEvent(**(given | changes))


def judged(*events: ProcessEvent) -> Judgement:
    [found] = judge(events, int(NOW_S * 1e9))
    return found


STANDING = [said(ago_s, lag=lag) for ago_s, lag in ((90, 10), (60, 500), (2, 900))]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([said(70), said(2)], Health.WELL),
        ([said(90), said(61)], Health.SILENT),
        (STANDING, Health.STUCK),
        # It moved, if only a little: slow is not stuck.
        ([said(90, lag=10), said(2, position=101, lag=900)], Health.WELL),
        # Nothing new came: there is nothing to do.
        ([said(90, lag=10), said(2, lag=10)], Health.WELL),
        # Not long enough.
        ([said(50, lag=10), said(2, lag=900)], Health.WELL),
        # Told to stand still.
        ([said(ago_s, lag=lag, state=ProcessState.PAUSED) for ago_s, lag in ((90, 10), (2, 900))], Health.PAUSED),
        # Just resumed: what stood still before was wanted.
        ([said(90, lag=10, state=ProcessState.PAUSED), said(30, lag=500), said(2, lag=900)], Health.WELL),
        # Started again: another process, whose time has just begun.
        ([*STANDING[:2], said(2, lag=900, start=2)], Health.WELL),
        ([*STANDING, said(1, state=ProcessState.STOPPED, event=EventKind.FINISHED)], Health.STOPPED),
        ([said(900, state=ProcessState.STOPPED, event=EventKind.FINISHED)], Health.STOPPED),
        ([said(900, state=ProcessState.FAILED, event=EventKind.ERROR, exit_code=1, detail="x")], Health.FAILED),
        ([said(61, state=ProcessState.PAUSED)], Health.SILENT),
    ],
)
def test_health_is_told_from_the_words_of_the_latest_start(events: list[ProcessEvent], expected: Health) -> None:
    assert judged(*events).health is expected
    assert judged(*reversed(events)).health is expected, "the order in which words are read decides"


def test_verdict_says_its_figures() -> None:
    assert judged(*STANDING).text == "writer/0 stands still at 100 for 88 s while its lag grew to 900"
    assert judged(said(75)).text == "writer/0 said nothing for 75 s; its last word was heartbeat, running"
    failed = judged(said(1, state=ProcessState.FAILED, event=EventKind.ERROR, exit_code=3, detail="fenced"))
    assert failed.text == "writer/0 ended with exit code 3: fenced"


def test_each_slot_is_judged_alone() -> None:
    other = [said(2, process_id="writer/1@1", slot="1")]
    found = {each.last.slot: each.health for each in judge([*STANDING, *other], int(NOW_S * 1e9))}
    assert found == {"0": Health.STUCK, "1": Health.WELL}


def test_what_was_said_long_ago_counts_by_the_last_word_of_each_slot() -> None:
    old = [said(9_000, position=n) for n in (1, 2)]
    gone = said(8_000, process_id="writer/1@1", slot="1")
    stopped = said(7_000, state=ProcessState.STOPPED, event=EventKind.FINISHED, process_id="bars/0@1", kind="bars")
    counted = words_that_count([gone, *reversed(old), said(9_500), stopped, *STANDING], int((NOW_S - 3_600) * 1e9))
    assert len(counted) == 3 + len(STANDING)
    health = {(each.last.kind, each.last.slot): each.health for each in judge(counted, int(NOW_S * 1e9))}
    assert health == {("bars", "0"): Health.STOPPED, ("writer", "0"): Health.STUCK, ("writer", "1"): Health.SILENT}
