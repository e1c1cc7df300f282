"""The whole platform under load in a home of its own, to be mistreated; and the comparison of every row afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.verify import raw_channels
from streamforge.contracts import Contracts, load_contracts
from streamforge.demo.market import Sent, with_synthetic_market
from streamforge.demo.session import Session
from streamforge.kafka_server import class_path
from streamforge.lakehouse.line import Line
from streamforge.lakehouse.verify import Comparison, verify_tables
from streamforge.lakehouse.verify_ledger import LedgerComparison, verify_ledger
from streamforge.platform.lifecycle import plan_platform, serve
from streamforge.platform.plan import PlatformFiles, PlatformPlan
from streamforge.settings import Settings, build_settings
from streaming.writer import WriterSettings
from tests.chaos.order import Disorder, find_disorder
from tests.waiting import wait_until

AWAY_TIMEOUT_S = 240.0
_TRADES_PER_S = 400.0


@dataclass(frozen=True, slots=True)
class RunningLine:
    """A platform that runs, as a test sees it."""

    settings: Settings
    contracts: Contracts
    plan: PlatformPlan
    line: Line
    session: Session

    def pid(self, name: str) -> int | None:
        """Return the pid of a process, None while it is away."""
        return self.session.client.processes()[name].pid

    def has_landed_trades(self) -> bool:
        """Return whether `trades` has rows."""
        return self.line.look().rows["trades"] > 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of everything that the market sent."""

    sent: Sent
    comparisons: list[Comparison]
    ledger: LedgerComparison
    order: Disorder

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as plain values; `ok` only when everything was compared and nothing is wrong."""
        clean = all(item.tally.is_clean and not item.not_landed for item in self.comparisons)
        missing = self.ledger.unexplained + self.ledger.after_last_raw
        return {
            "ok": bool(self.comparisons) and clean and not missing and not self.order.count,
            "messages_sent": self.sent.messages,
            "lost": sum(item.tally.lost + item.not_landed for item in self.comparisons),
            "doubled": sum(item.tally.doubled for item in self.comparisons),
            "wrong": sum(item.tally.different + item.tally.unexpected for item in self.comparisons),
            "disordered": self.order.count,
            "unexplained": missing,
            "order": self.order.as_dict(),
            "comparisons": [item.as_dict() for item in self.comparisons],
            "ledger": self.ledger.as_dict(),
        }


Shape = Callable[[Settings, PlatformPlan], PlatformPlan]
"""Changes the plan of a platform before it is started."""


def run_line(
    home: Path,
    *,
    seed: int,
    trades_per_s: float = _TRADES_PER_S,
    mistreat: Callable[[RunningLine], None],
    shape: Shape = lambda _, plan: plan,
    stop: Callable[[RunningLine], None] | None = None,
) -> Outcome:
    """Start everything, wait for the first rows, call `mistreat`, let everything land, compare, stop everything.

    Args:
        home: folder of the platform.
        seed: of the market.
        trades_per_s: of the market, over all its instruments.
        mistreat: what is done to the line.
        shape: changes what runs.
        stop: stops the market and waits until the loader has taken in what it sent; else all that the ledger says
            was sent is waited for, which does not come where a loader was killed.
    """
    settings = build_settings(
        WriterSettings,
        home=home,
        bootstrap_servers=None,
        recordings_dir=None,
        writer_commit_interval_s=0.5,
        writer_idle_interval_s=1.0,
    )
    class_path()
    files = PlatformFiles(settings.home_path)
    plan = plan_platform(settings, simulator=True, remember=True)
    plan = shape(settings, with_synthetic_market(plan, trades_per_s=trades_per_s, seed=seed))
    contracts = load_contracts(settings.contracts_dir)
    outcomes: list[Outcome] = []

    def hold() -> None:
        running = RunningLine(settings, contracts, plan, Line(settings, contracts), Session(settings, contracts, plan))
        wait_until(running.has_landed_trades, timeout_s=AWAY_TIMEOUT_S, what="the first trades land")
        mistreat(running)
        if stop is not None:
            stop(running)
        sent = running.session.land(running.line, files.ledger, captured_before=-sys.maxsize if stop else 0)
        outcomes.append(
            Outcome(
                sent,
                verify_tables(settings, contracts),
                verify_ledger(settings, contracts, files.ledger, raw_channels()),
                find_disorder(settings, contracts),
            )
        )

    serve(settings, files, plan, detach=False, tell=tell, ready=lambda _: None, hold=hold)
    assert outcomes, "stopped before the end"
    return outcomes[0]


def tell(text: str) -> None:
    """Say what is going on, on standard error."""
    sys.stderr.write(f"{text}\n")
