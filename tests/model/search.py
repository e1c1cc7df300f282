"""A breadth-first search over all interleavings, so that the first history found is a shortest one; random walks."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

from tests.model.invariants import BrokenError, check_end
from tests.model.state import Scenario, State
from tests.model.steps import Model
from tests.model.world import forget_interned


@dataclass(frozen=True, slots=True)
class Result:
    """What a search found.

    Args:
        scenario: its name.
        states: different states that were reached.
        steps: steps that were taken.
        depth: steps of the longest shortest history.
        is_complete: every state that the scenario allows was reached.
        wall_s: how long it took.
        broken: what does not hold; None: all does.
        history: the shortest steps that lead there.
    """

    scenario: str
    states: int
    steps: int
    depth: int
    is_complete: bool
    wall_s: float
    broken: str | None = None
    history: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        steps = "\n".join(f"  {number:2}. {label}" for number, label in enumerate(self.history, start=1))
        return f"{self.scenario}: {self.broken}\n{steps}"


def search(scenario: Scenario, *, depth: int | None = None, states_max: int | None = None) -> Result:
    """Take every step from every state, until nothing is new or something is broken.

    Args:
        scenario: who is there and what may happen.
        depth: longest history; None: no bound.
        states_max: states after which the search is given up; None: no bound.
    """
    started_s = time.perf_counter()
    forget_interned()
    model = Model(scenario)
    first = model.first()
    came_from: dict[State, tuple[State, str] | None] = {first: None}
    layer, deep, taken = [first], 0, 0

    def result(*, is_complete: bool, broken: str | None = None, history: tuple[str, ...] = ()) -> Result:
        wall_s = round(time.perf_counter() - started_s, 3)
        return Result(scenario.name, len(came_from), taken, deep, is_complete, wall_s, broken, history)

    while layer and (depth is None or deep < depth):
        following: list[State] = []
        for state in layer:
            if states_max is not None and len(came_from) >= states_max:
                return result(is_complete=False)
            goes_on = False
            try:
                for step in model.steps(state):
                    taken += 1
                    goes_on |= not step.is_fault and step.state != state
                    if step.state not in came_from:
                        came_from[step.state] = (state, step.label)
                        following.append(step.state)
                if not goes_on:
                    check_end(state, scenario)
            except BrokenError as broken:
                return result(is_complete=False, broken=str(broken), history=_history(came_from, state))
        layer = following
        deep += 1 if following else 0
    return result(is_complete=not layer)


def walk(scenario: Scenario, *, walks: int, seed: int, length_max: int = 500) -> Result:
    """Go at random from the beginning to the end, again and again: deeper than a search of a large scenario gets.

    Every step from every state on the way is taken, so what one step aside would break is found too.

    Args:
        scenario: who is there and what may happen.
        walks: how often.
        seed: of the choices.
        length_max: steps after which a walk is given up.
    """
    started_s = time.perf_counter()
    forget_interned()
    model, choices = Model(scenario), random.Random(seed)
    first = model.first()
    seen, taken, deep = {first}, 0, 0

    def result(broken: str | None = None, history: tuple[str, ...] = ()) -> Result:
        wall_s = round(time.perf_counter() - started_s, 3)
        return Result(
            scenario.name, len(seen), taken, deep, is_complete=False, wall_s=wall_s, broken=broken, history=history
        )

    for _ in range(walks):
        state, labels = first, list[str]()
        while len(labels) < length_max:
            try:
                steps = [step for step in model.steps(state) if step.state != state]
                if all(step.is_fault for step in steps):
                    check_end(state, scenario)
            except BrokenError as broken:
                return result(str(broken), tuple(labels))
            seen.update(step.state for step in steps)
            taken += len(steps)
            if not steps:
                break
            step = choices.choice(steps)
            state = step.state
            labels.append(step.label)
        deep = max(deep, len(labels))
    return result()


def _history(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    labels = []
    while (step := came_from[state]) is not None:
        state, label = step
        labels.append(label)
    return tuple(reversed(labels))
