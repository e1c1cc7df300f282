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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.verify import raw_channels
from streamforge.contracts import load_contracts
from streamforge.demo.market import Sent, with_synthetic_market
from streamforge.demo.session import Session
from streamforge.kafka_server import class_path
from streamforge.lakehouse.line import Line
from streamforge.lakehouse.verify import Comparison, verify_tables
from streamforge.lakehouse.verify_ledger import LedgerComparison, verify_ledger
from streamforge.platform.lifecycle import plan_platform, serve
from streamforge.platform.plan import CONSUMERS, PlatformFiles, PlatformPlan
from streamforge.settings import Settings, build_settings
from streaming.writer import WriterSettings
from tests.waiting import wait_until

_LONGEST_PAUSE_S = 1.5
_RESTART_TIMEOUT_S = 120.0
_TRADES_PER_S = 500.0


@dataclass(slots=True)
class Outcome:
    """What one run did and found."""

    killed: Counter[str] = field(default_factory=Counter)
    sent: Sent | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    ledger: LedgerComparison | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as plain values; `ok` only when everything was compared and nothing is wrong."""
        clean = all(item.tally.is_clean and not item.not_landed for item in self.comparisons)
        missing = self.ledger.unexplained + self.ledger.after_last_raw if self.ledger else 0
        return {
            "ok": bool(self.comparisons) and self.ledger is not None and clean and not missing,
            "kills": dict(self.killed),
            "messages_sent": self.sent.messages if self.sent else 0,
            "lost": sum(item.tally.lost + item.not_landed for item in self.comparisons) + missing,
            "doubled": sum(item.tally.doubled for item in self.comparisons),
            "comparisons": [item.as_dict() for item in self.comparisons],
            "ledger": self.ledger.as_dict() if self.ledger else None,
        }


def run(home: Path, *, kills: int, seed: int) -> Outcome:
    """Run the platform in `home`, kill `kills` times as `seed` says, let everything land, compare."""
    settings = build_settings(
        WriterSettings,
        home=home,
        bootstrap_servers=None,
        recordings_dir=None,
        writer_commit_interval_s=0.5,
        writer_idle_interval_s=1.0,
    )
    class_path()
    plan = plan_platform(settings, simulator=True, remember=True)
    plan = with_synthetic_market(plan, trades_per_s=_TRADES_PER_S, seed=seed)
    outcome = Outcome()
    serve(
        settings,
        PlatformFiles(settings.home_path),
        plan,
        detach=False,
        tell=_tell,
        ready=lambda _: None,
        hold=lambda: _hold(settings, plan, kills, random.Random(seed), outcome),
    )
    return outcome


def _hold(settings: Settings, plan: PlatformPlan, kills: int, choice: random.Random, outcome: Outcome) -> None:
    contracts = load_contracts(settings.contracts_dir)
    line, session = Line(settings, contracts), Session(settings, contracts, plan)
    wait_until(lambda: line.look().rows["trades"], timeout_s=_RESTART_TIMEOUT_S, what="the first trades land")
    for number in range(1, kills + 1):
        # A moment of the schedule, not a wait for something: it decides where in its work the victim is hit.
        time.sleep(choice.uniform(0.0, _LONGEST_PAUSE_S))
        name = choice.choice(CONSUMERS)
        pid = wait_until(lambda name=name: _pid(session, name), timeout_s=_RESTART_TIMEOUT_S, what=f"{name} runs")  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
        outcome.killed[name] += 1
        _tell(f"kill {number}/{kills}: {name} (pid {pid})")
    outcome.sent = session.land(line, PlatformFiles(settings.home_path).ledger)
    outcome.comparisons = verify_tables(settings, contracts)
    outcome.ledger = verify_ledger(settings, contracts, PlatformFiles(settings.home_path).ledger, raw_channels())


def _pid(session: Session, name: str) -> int | None:
    """Return the pid of a consumer that is at work, None while it is away."""
    return session.client.processes()[name].pid


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> int:
    """Run once and say what became of every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=20, help="how many times a consumer is killed")
    parser.add_argument("--seed", type=int, default=1, help="chooses victims and moments")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the home is made")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streamforge-chaos-", dir=arguments.folder) as home:
        result = run(Path(home), kills=arguments.kills, seed=arguments.seed).as_dict() | {"seed": arguments.seed}
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
