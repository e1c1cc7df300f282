"""Kill the running line at random moments and compare every row afterwards: nothing lost, nothing doubled.

    uv run python -m tests.chaos --kills 200 --seed 1 --output json

The whole platform runs under load, as `streamforge up` starts it. Writer, parser and bars get SIGKILL at moments that
the seed chooses; the supervisor brings them back. At the end the market stops, everything lands, and topics, tables
and the market's ledger are compared. Exit code 0 when nothing is lost or doubled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from streamforge.logs import configure as configure_logs
from streamforge.platform.plan import consumer_kinds
from streamforge.settings import load_settings
from tests.chaos.line import AWAY_TIMEOUT_S, RunningLine, run_line, tell
from tests.waiting import wait_until

_LONGEST_PAUSE_S = 1.5
_AT_WORK_RATIO = 0.75


def run(home: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Run the platform in `home`, kill `kills` times as `seed` says, and return what became of every row."""
    killed: Counter[str] = Counter()

    def mistreat(running: RunningLine) -> None:
        choice = random.Random(seed)
        for number in range(1, kills + 1):
            name = choice.choice(consumer_kinds())
            if choice.random() < _AT_WORK_RATIO:
                wait_until(lambda name=name: _is_at_work(running, name), timeout_s=AWAY_TIMEOUT_S, what=f"{name} works")  # type: ignore[misc]
            # A moment of the schedule, not a wait for something: it decides where in its work the victim is hit.
            time.sleep(choice.uniform(0.0, _LONGEST_PAUSE_S))
            pid = wait_until(lambda name=name: running.pid(name), timeout_s=AWAY_TIMEOUT_S, what=f"{name} is back")  # type: ignore[misc]
            os.kill(pid, signal.SIGKILL)
            killed[name] += 1
            tell(f"kill {number}/{kills}: {name} (pid {pid})")

    return run_line(home, seed=seed, mistreat=mistreat).as_dict() | {"seed": seed, "kills": dict(killed)}


def _is_at_work(running: RunningLine, name: str) -> bool:
    """Return whether a consumer has its topic-partitions; without this most kills would hit one that is starting."""
    process = running.plan.named(name)
    assert process is not None
    try:
        return httpx.get(process.ready_url or "", timeout=2.0).is_success
    except httpx.HTTPError:
        return False


def main() -> int:
    """Run once and say what became of every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=20, help="how many times a consumer is killed")
    parser.add_argument("--seed", type=int, default=1, help="chooses victims and moments")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the home is made")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    configure_logs(load_settings())
    with tempfile.TemporaryDirectory(prefix="streamforge-chaos-", dir=arguments.folder) as home:
        result = run(Path(home), kills=arguments.kills, seed=arguments.seed)
    if arguments.output == "json":
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        kills = ", ".join(f"{name} {count}" for name, count in sorted(result["kills"].items())) or "none"
        sys.stdout.write(
            f"seed {arguments.seed}, kills: {kills}; {result['messages_sent']:,} messages sent, "
            f"{result['lost']} lost, {result['doubled']} doubled: {'ok' if result['ok'] else 'NOT ok'}\n"
        )
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
