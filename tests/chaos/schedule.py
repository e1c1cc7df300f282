"""Which faults a run injects: drawn from a seed, written to a file and read back. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from streamforge.lakehouse.replay import REPLAY_STEPS
from streaming.loaders.sink import LOADER_STEPS
from streaming.processors.base import TRANSACTION_STEPS
from streaming.writer import WRITER_STEPS
from tests.chaos.victim import SESSION_TIMEOUT_S, TRANSACTION_TIMEOUT_S

LOADER, PARSER, BARS = "loader", "parser", "bars"
WRITERS = ("writer-0", "writer-1")
PROCESSORS = (PARSER, BARS)
MEMBERS = (*PROCESSORS, *WRITERS)
"""Those that are in a consumer group."""
VICTIMS = (LOADER, *MEMBERS)
BROKER, LAKE = "broker", "lake"
TABLES = ("raw-depth", "raw-trades", "trades", "bars", "market-gaps")
"""Contracts whose tables the line fills."""

TARGETS = (*VICTIMS, BROKER, LAKE, *(f"table {name}" for name in TABLES))
"""What a fault is done to; `lake` is catalog and warehouse. Faults of one target come one after the other."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault.

    Args:
        number: place in the schedule, counted from 1.
        kind: see `KINDS`.
        target: see `TARGETS`.
        gap_s: pause before it, after the target's last one is over; it decides where in its work the target is hit.
        hold_s: how long the trouble lasts, where it does.
        step: named step, where the fault waits for one.
        passage: which passage of the step.
        shift_s: how far a clock jumps.
        again: whether a killed process is killed once more while it starts.
    """

    number: int
    kind: str
    target: str
    gap_s: float
    hold_s: float = 0.0
    step: str = ""
    passage: int = 1
    shift_s: float = 0.0
    again: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault.

    Args:
        targets: whom it can be done to.
        weight: how often it is drawn, against the others.
        hold_s: least and most of `Fault.hold_s`.
    """

    targets: tuple[str, ...]
    weight: float
    hold_s: tuple[float, float] = (0.0, 0.0)


_TABLE_TARGETS = tuple(target for target in TARGETS if target.startswith("table "))
# The heir has to have claimed before the zombie wakes: else nobody was taken for dead.
_BEYOND_SESSION_S = (SESSION_TIMEOUT_S + 2.5, SESSION_TIMEOUT_S + 6.0)
KINDS: Mapping[str, Kind] = {
    "kill": Kind(VICTIMS, 6),
    "kill_at_step": Kind(VICTIMS, 12),
    "freeze": Kind(VICTIMS, 8, (0.2, 2.0)),
    "zombie": Kind(VICTIMS, 2, _BEYOND_SESSION_S),
    "zombie_at_step": Kind(MEMBERS, 3, _BEYOND_SESSION_S),
    "transaction_timeout": Kind(PROCESSORS, 1.5, (TRANSACTION_TIMEOUT_S + 0.3, SESSION_TIMEOUT_S - 0.2)),
    "rebalance": Kind(WRITERS, 1, _BEYOND_SESSION_S),
    "twin": Kind(MEMBERS, 1),
    "pause_resume": Kind(VICTIMS, 6, (0.3, 2.0)),
    "clock_jump": Kind(VICTIMS, 10),
    "slow_disk": Kind(WRITERS, 8, (0.5, 3.0)),
    "full_disk": Kind(WRITERS, 3, (0.5, 2.5)),
    "commit_refused": Kind(WRITERS, 8),
    "answer_lost": Kind(WRITERS, 12),
    "false_conflict": Kind(WRITERS, 8),
    "broker_kill": Kind((BROKER,), 0.3),
    "broker_freeze": Kind((BROKER,), 1.5, (1.0, 8.0)),
    "foreign_commit": Kind(_TABLE_TARGETS, 24),
    "expire_snapshots": Kind(_TABLE_TARGETS, 14),
    "catalog_locked": Kind((LAKE,), 4, (0.5, 2.5)),
    "catalog_away": Kind((LAKE,), 1, (4.0, 6.0)),
    "store_away": Kind((LAKE,), 4, (0.3, 2.5)),
    "replay": Kind((LAKE,), 0.8),
    "replay_killed": Kind((LAKE,), 0.8),
}

_INSIDE_TRANSACTION = ("after_begin", "after_outputs", "after_changelog", "after_flush", "after_offsets")
_SLOW_STEPS = ("writer.data_written", "writer.commit_staged", "writer.claim_staged", "writer.after_dead_letters")
_LONGEST_GAP_S = 1.0
_MOST_PASSAGES = 4
_SHIFTS_S = (-3_600.0, -20.0, -1.0, 1.0, 20.0, 3_600.0)
# The parser refuses an event that is a minute ahead of its receipt, and says so; here every row is expected.
_LOADER_SHIFTS_S = (-20.0, -1.0, 1.0, 20.0)
_AGAIN_RATIO = 0.2


def steps_of(target: str) -> tuple[str, ...]:
    """Return the named steps that a victim passes."""
    if target == LOADER:
        return LOADER_STEPS
    if target in WRITERS:
        return WRITER_STEPS
    return tuple(f"{target}.{step}" for step in TRANSACTION_STEPS)


def draw(seed: int, count: int, kinds: Sequence[str] = tuple(KINDS)) -> list[Fault]:
    """Draw `count` faults of `kinds`: each kind once in random order, from then on by weight.

    Targets, and of each target its named steps, go round, so that a long run passes each of them equally often.
    """
    choice = random.Random(seed)
    rounds: dict[str, Iterator[str]] = {}

    def following(name: str, items: Sequence[str]) -> str:
        if name not in rounds:
            rounds[name] = _shuffled_for_ever(choice, items)
        return next(rounds[name])

    names = list(kinds)
    first = choice.sample(names, len(names))
    rest = choice.choices(names, [KINDS[name].weight for name in names], k=max(0, count - len(first)))
    faults = []
    for number, name in enumerate([*first, *rest][:count], 1):
        kind = KINDS[name]
        target = following(f"target of {name}", kind.targets)
        step = ""
        if name in {"kill_at_step", "zombie_at_step"}:
            step = following(f"step of {name} {target}", steps_of(target))
        elif name == "transaction_timeout":
            step = f"{target}.{following(f'step of {name} {target}', _INSIDE_TRANSACTION)}"
        elif name == "slow_disk":
            step = following(f"step of {name}", _SLOW_STEPS)
        elif name == "replay_killed":
            step = following(f"step of {name}", REPLAY_STEPS)
        faults.append(
            Fault(
                number=number,
                kind=name,
                target=target,
                gap_s=round(choice.uniform(0.0, _LONGEST_GAP_S), 3),
                hold_s=round(choice.uniform(*kind.hold_s), 3),
                step=step,
                passage=1 if _is_at_start(step) else choice.randint(1, _MOST_PASSAGES),
                shift_s=_shift(choice, name, target),
                again=name == "kill" and choice.random() < _AGAIN_RATIO,
            )
        )
    return faults


def is_at_start(fault: Fault) -> bool:
    """Return whether the fault's step is one that a process passes only when it starts or takes over."""
    return _is_at_start(fault.step)


def chosen(faults: Iterable[Fault], numbers: str | None) -> list[Fault]:
    """Return the faults whose numbers are in `K..L`, both included; all where it is None.

    Raises:
        ValueError: it is not of this form.
    """
    if numbers is None:
        return list(faults)
    first, last = (int(text) for text in numbers.split(".."))
    return [fault for fault in faults if first <= fault.number <= last]


def write_schedule(path: Path, faults: Sequence[Fault]) -> None:
    """Write a schedule, one fault a line."""
    path.write_bytes(msgspec.json.Encoder().encode_lines(faults))


def read_schedule(path: Path) -> list[Fault]:
    """Read a schedule."""
    return msgspec.json.Decoder(Fault).decode_lines(path.read_bytes())


def _is_at_start(step: str) -> bool:
    return "claim" in step or "takeover" in step or step in LOADER_STEPS


def _shift(choice: random.Random, kind: str, target: str) -> float:
    if kind != "clock_jump":
        return 0.0
    return choice.choice(_LOADER_SHIFTS_S if target == LOADER else _SHIFTS_S)


def _shuffled_for_ever(choice: random.Random, items: Sequence[str]) -> Iterator[str]:
    while True:
        yield from choice.sample(items, len(items))
