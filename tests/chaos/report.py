"""What a run found: by kind, over the parts of a long run, and in words. Pure but for the results file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.chaos.schedule import Fault

FINDINGS = ("lost", "doubled", "wrong", "disordered", "unexplained")
_COUNTED = ("faults", "not_reached", "steps", "started_by_hand")
_ADDED = ("messages_sent", "rows", "wall_s", *FINDINGS)


class Suffered(msgspec.Struct, frozen=True, kw_only=True):
    """One fault that was done.

    Args:
        at_s: seconds since the first fault could come.
        recovery_s: from the end of the trouble until all victims were at work and their positions moved; None where
            the step was not reached, so that nothing was done.
    """

    fault: Fault
    at_s: float
    recovery_s: float | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run, or the sum of several.

    Args:
        seeds: of the runs.
        faults: done, by kind.
        not_reached: faults whose step was not passed in time, by kind.
        recovery_s: of each fault, by kind.
        steps: kills and stops at each named step.
        started_by_hand: processes that ended with an exit code that a supervisor leaves alone, as a fenced one does.
        violation: what made the run end early; empty where nothing did.
    """

    seeds: list[int]
    faults: dict[str, int]
    not_reached: dict[str, int]
    recovery_s: dict[str, list[float]]
    steps: dict[str, int]
    started_by_hand: dict[str, int]
    messages_sent: int = 0
    rows: int = 0
    wall_s: float = 0.0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    disordered: int = 0
    unexplained: int = 0
    violation: str = ""

    @property
    def is_clean(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.violation and not any(getattr(self, name) for name in FINDINGS)


def count(suffered: Sequence[Suffered], *, seed: int, started_by_hand: dict[str, int]) -> Result:
    """Return what was done, before anything is known of the rows."""
    done = [item for item in suffered if item.recovery_s is not None]
    recovery_s: dict[str, list[float]] = {}
    for item in done:
        recovery_s.setdefault(item.fault.kind, []).append(round(item.recovery_s or 0.0, 2))
    return Result(
        seeds=[seed],
        faults=dict(Counter(item.fault.kind for item in done)),
        not_reached=dict(Counter(item.fault.kind for item in suffered if item.recovery_s is None)),
        recovery_s=recovery_s,
        steps=dict(Counter(item.fault.step for item in done if item.fault.step)),
        started_by_hand=started_by_hand,
    )


def add_up(results: Iterable[Result]) -> Result:
    """Return the sum of several runs."""
    total = Result(seeds=[], faults={}, not_reached={}, recovery_s={}, steps={}, started_by_hand={})
    for item in results:
        recovery_s = dict(total.recovery_s)
        for kind, values in item.recovery_s.items():
            recovery_s[kind] = [*recovery_s.get(kind, []), *values]
        sums: dict[str, Any] = {
            **{name: dict(Counter(getattr(total, name)) + Counter(getattr(item, name))) for name in _COUNTED},
            **{name: getattr(total, name) + getattr(item, name) for name in _ADDED},
        }
        violation = "; ".join(filter(None, (total.violation, item.violation)))
        total = Result(seeds=[*total.seeds, *item.seeds], recovery_s=recovery_s, violation=violation, **sums)
    return total


def append(path: Path, result: Result) -> Result:
    """Write the result of a part behind those before it, and return the sum of all."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(result) + b"\n")
    return read_sum(path)


def read_sum(path: Path) -> Result:
    """Return the sum of all parts in a results file."""
    return add_up(msgspec.json.Decoder(Result).decode_lines(path.read_bytes()))


def as_text(result: Result) -> str:
    """Return a table of kinds and a line with what was found."""
    lines = [f"{'fault':<22}{'done':>7}{'recovery p50':>14}{'p99':>9}"]
    for kind, done in sorted(result.faults.items(), key=lambda item: -item[1]):
        p50_s, p99_s = np.quantile(result.recovery_s[kind], (0.5, 0.99))
        lines.append(f"{kind:<22}{done:>7}{p50_s:>12.1f} s{p99_s:>7.1f} s")
    fenced, not_reached = sum(result.started_by_hand.values()), sum(result.not_reached.values())
    lines += [
        f"{'all':<22}{sum(result.faults.values()):>7}",
        f"not reached: {not_reached}; started by hand after a fence: {fenced}; named steps hit: {len(result.steps)}",
        f"{result.messages_sent:,} messages sent, {result.rows:,} rows compared, {result.wall_s:,.0f} s",
        f"seeds {', '.join(map(str, result.seeds))}",
        ", ".join(f"{getattr(result, name)} {name}" for name in FINDINGS),
    ]
    if result.violation:
        lines.append(f"VIOLATION: {result.violation}")
    return "\n".join(lines) + "\n"
