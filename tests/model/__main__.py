"""Search the model further than the tests do: every fault and all others in each scenario.

All histories up to a depth, then random walks to the end:

    uv run python -m tests.model --depth 8 --walks 200 --output json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tests.model.connected import connected
from tests.model.scenarios import SCENARIOS, larger_scenarios
from tests.model.search import Result, search, walk


def main(arguments: Sequence[str] | None = None) -> int:
    """Search scenario after scenario and print what each reached; 1 where something is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=8, help="steps of the longest history that is searched")
    parser.add_argument("--states", type=int, default=500_000, help="states after which a scenario is given up")
    parser.add_argument("--walks", type=int, default=0, help="random walks through each scenario")
    parser.add_argument("--seed", type=int, default=0, help="of the walks")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), action="append", help="only these")
    parser.add_argument("--as-tested", action="store_true", help="only the faults that the tests have")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    scenarios = SCENARIOS if options.as_tested else larger_scenarios()
    results = []
    for name, scenario in scenarios.items():
        if options.scenario and name not in options.scenario:
            continue
        with connected():
            results.append(search(scenario, depth=options.depth, states_max=options.states))
            _tell("search", results[-1])
            if options.walks:
                results.append(walk(scenario, walks=options.walks, seed=options.seed))
                _tell("walks", results[-1])
    states = sum(result.states for result in results)
    if options.output == "json":
        report = {"states": states, "seed": options.seed, "scenarios": [result.as_dict() for result in results]}
        sys.stdout.write(f"{json.dumps(report, indent=2)}\n")
    else:
        broken = "\n".join(str(result) for result in results if result.broken)
        sys.stdout.write(f"{states:,} states\n{broken}")
    return int(any(result.broken for result in results))


def _tell(how: str, result: Result) -> None:
    reached = "all" if result.is_complete else f"to depth {result.depth}"
    found = f"BROKEN: {result.broken}" if result.broken else "holds"
    line = f"{result.scenario:26} {how:6} {result.states:>9,} states, {reached}, {result.wall_s:.1f} s: {found}"
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
