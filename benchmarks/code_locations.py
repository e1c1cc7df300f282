"""How long a Dagster code location takes to load: processor and wall time, beside Dagster alone.

    uv run python -m benchmarks.code_locations

Every Dagster run loads its location again, so this is part of the time until a run starts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import emit
from streamforge.platform.control_plane import code_locations


def main() -> None:
    """Load each location in new processes, in turn with Dagster alone, and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="how many times each is loaded")
    arguments = parser.parse_args()
    programs = {"dagster alone": "import dagster"} | {
        item.name: f"import {item.module} as location; location.defs.get_repository_def()" for item in code_locations()
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name, program in programs.items():
            found[name].append(_seconds(program))
    emit("code_locations", vars(arguments), {name: _medians(seconds) for name, seconds in found.items()})


def _seconds(program: str) -> tuple[float, float]:
    """Return processor and wall seconds of a new process."""
    began_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"import time; {program}; print(time.process_time())"],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout), time.perf_counter() - began_s


def _medians(seconds: list[tuple[float, float]]) -> dict[str, Any]:
    processor_s, wall_s = zip(*seconds, strict=True)
    return {"cpu_s": round(statistics.median(processor_s), 2), "wall_s": round(statistics.median(wall_s), 2)}


if __name__ == "__main__":
    main()
