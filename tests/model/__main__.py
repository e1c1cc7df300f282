"""Search the model further than the tests do: every fault and all others in each scenario, up to a depth.

uv run python -m tests.model --depth 12 --output json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tests.model.connected import connected
from tests.model.scenarios import SCENARIOS, larger
from tests.model.search import Result, search


def main(arguments: Sequence[str] | None = None) -> int:
    """Search scenario after scenario and print what each reached; 1 where something is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--depth", type=int, default=10, help="steps of the longest history")
    parser.add_argument("--states", type=int, default=500_000, help="states of one scenario after which it is given up")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), action="append", help="only these")
    parser.add_argument("--as-tested", action="store_true", help="only the faults that the tests have")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    results = []
    for name in options.scenario or SCENARIOS:
        scenario = SCENARIOS[name] if options.as_tested else larger(SCENARIOS[name])
        with connected():
            results.append(search(scenario, depth=options.depth, states_max=options.states))
        sys.stderr.write(f"{_line(results[-1])}\n")
    states = sum(result.states for result in results)
    if options.output == "json":
        report = {"states": states, "scenarios": [result.as_dict() for result in results]}
        sys.stdout.write(f"{json.dumps(report, indent=2)}\n")
    else:
        broken = "\n".join(str(result) for result in results if result.broken)
        sys.stdout.write(f"{states:,} states\n{broken}")
    return int(any(result.broken for result in results))


def _line(result: Result) -> str:
    reached = "all" if result.is_complete else f"to depth {result.depth}"
    found = f"BROKEN: {result.broken}" if result.broken else "holds"
    return f"{result.scenario:26} {result.states:>9,} states, {reached}, {result.wall_s:.1f} s: {found}"


if __name__ == "__main__":
    sys.exit(main())
