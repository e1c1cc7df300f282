"""Tell from what processes said whether they live and get on: pure, from the events of `queue-events`.

A process is judged by the words of its last start alone. It is silent where its words end without a good-bye, and
stuck where it speaks, is not paused, and its positions stand still while its lag grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, takewhile

from streamforge.events import ProcessEvent, ProcessState

_NS_PER_S = 1e9


class Health(StrEnum):
    """How a process is; only the last three need a person."""

    WELL = "well"
    PAUSED = "paused"
    STOPPED = "stopped"
    FAILED = "failed"
    SILENT = "silent"
    STUCK = "stuck"

    @property
    def needs_a_person(self) -> bool:
        """Return whether it is not as somebody wanted it to be."""
        return self in (Health.FAILED, Health.SILENT, Health.STUCK)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited before a process is called silent or stuck, in seconds; heartbeats come every 3 to 5."""

    silent_s: float = 60.0
    stuck_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """How the process of one slot is.

    Args:
        last: what it said last.
        health: the verdict.
        text: the verdict as a sentence, with its figures.
        silent_s: seconds since it spoke.
    """

    last: ProcessEvent
    health: Health
    text: str
    silent_s: float

    @property
    def lag_records(self) -> int:
        """Return how many records it is behind, over its topic-partitions."""
        return sum(self.last.lag.values())


def judge(events: Iterable[ProcessEvent], now_ns: int, patience: Patience | None = None) -> list[Judgement]:
    """Return one judgement for each kind and slot that spoke, in that order, about its latest start."""
    ordered = sorted(events, key=lambda each: (each.kind, each.slot, each.ts_ns))
    return [
        _judge_slot(list(said), now_ns, patience or Patience())
        for _, said in groupby(ordered, key=lambda each: (each.kind, each.slot))
    ]


def words_that_count(events: Iterable[ProcessEvent], since_ns: int) -> list[ProcessEvent]:
    """Return what was said since then and, of what was said before, the last word of each slot.

    A process that died long ago is still told by its last word, and a long history takes no memory.
    """
    last: dict[tuple[str, str], ProcessEvent] = {}
    recent: list[ProcessEvent] = []
    for event in events:
        if event.ts_ns >= since_ns:
            recent.append(event)
            continue
        slot = (event.kind, event.slot)
        if slot not in last or event.ts_ns >= last[slot].ts_ns:
            last[slot] = event
    return [*last.values(), *recent]


def _judge_slot(said: Sequence[ProcessEvent], now_ns: int, patience: Patience) -> Judgement:
    last = said[-1]
    silent_s = max(0.0, (now_ns - last.ts_ns) / _NS_PER_S)
    name = f"{last.kind}/{last.slot}"
    if last.state is ProcessState.STOPPED:
        return Judgement(last, Health.STOPPED, f"{name} was stopped", silent_s)
    if last.state is ProcessState.FAILED:
        return Judgement(last, Health.FAILED, f"{name} ended with exit code {last.exit_code}: {last.detail}", silent_s)
    if silent_s > patience.silent_s:
        text = f"{name} said nothing for {silent_s:.0f} s; its last word was {last.event}, {last.state}"
        return Judgement(last, Health.SILENT, text, silent_s)
    if last.state is ProcessState.PAUSED:
        return Judgement(last, Health.PAUSED, f"{name} is paused", silent_s)
    stuck = _stuck(said, patience)
    if stuck is not None:
        return Judgement(last, Health.STUCK, f"{name} {stuck}", silent_s)
    return Judgement(last, Health.WELL, f"{name} is {last.state}", silent_s)


def _stuck(said: Sequence[ProcessEvent], patience: Patience) -> str | None:
    """Return what stands still, or None: the words since its positions last moved span too little, or no lag grew."""
    last = said[-1]
    still = list(
        takewhile(
            lambda each: (
                each.process_id == last.process_id
                and each.positions == last.positions
                and each.state is ProcessState.RUNNING
            ),
            reversed(said),
        )
    )
    if not still:
        return None
    since, behind = still[-1], sum(last.lag.values())
    still_s, grown = (last.ts_ns - since.ts_ns) / _NS_PER_S, behind - sum(since.lag.values())
    if still_s < patience.stuck_s or grown <= 0:
        return None
    return f"stands still at {sum(last.positions.values()):,} for {still_s:.0f} s while its lag grew to {behind:,}"
