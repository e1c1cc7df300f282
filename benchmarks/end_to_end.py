"""End to end: what rate of trades the whole line holds on this machine, and how fresh its tables are.

    uv run python -m benchmarks.end_to_end --trades-per-s 20000 --duration-s 120
    uv run python -m benchmarks.end_to_end --sweep 5000,10000,20000

Everything runs here: the broker, the simulated market, loader, parser, bars and writer, kept by the supervisor of
`streamforge up`. Measured are the trades that the market's ledger says it sent, the age of every row at its commit
(from the tables), the lag of every table once a second, and CPU and memory of every process. Then everything lands
and is compared row by row. The rate is held when nothing is lost or doubled, the lag does not grow, and the market
sent what it was asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import CostSampler, emit
from streamforge.contracts import load_contracts
from streamforge.demo.market import SYNTHETIC_INSTRUMENTS, Sent, with_synthetic_market
from streamforge.demo.session import Session
from streamforge.kafka_server import class_path
from streamforge.lakehouse.line import Line
from streamforge.lakehouse.table_freshness import TableAges, quantiles
from streamforge.lakehouse.verify import Comparison, verify_tables
from streamforge.logs import configure as configure_logs
from streamforge.platform.lifecycle import plan_platform, serve
from streamforge.platform.plan import PlatformFiles, PlatformPlan
from streamforge.platform.supervisor import read_history
from streamforge.settings import Settings, build_settings
from streaming.writer import WriterSettings

_SAMPLE_S = 1.0
_RATE_TOLERANCE = 0.9
_LAG_GROWTH = 1.2
_FRESH_ENOUGH_S = 5.0


@dataclass(slots=True)
class _Watched:
    """What was seen while the market ran."""

    costs: CostSampler = field(default_factory=CostSampler)
    at_s: list[float] = field(default_factory=list)
    lag: list[dict[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Outcome:
    """What one run found."""

    watched: _Watched = field(default_factory=_Watched)
    sent: Sent = field(default_factory=lambda: Sent(0, 0, 0.0))
    ages: list[TableAges] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    drain_s: float = 0.0
    restarts: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Run once, or once for each rate of a sweep until one is not held; print one JSON object."""
    arguments = _arguments()
    rates = [float(item) for item in arguments.sweep.split(",")] if arguments.sweep else [arguments.trades_per_s]
    results = []
    for rate in rates:
        results.append(measure(rate, arguments.duration_s, arguments.commit_interval_s, Path(arguments.folder)))
        if not results[-1]["held"]:
            break
    held = [item["asked_trades_per_s"] for item in results if item["held"]]
    parameters = {"duration_s": arguments.duration_s, "commit_interval_s": arguments.commit_interval_s}
    result = results[0] if not arguments.sweep else {"highest_rate_held": max(held, default=None), "runs": results}
    emit("end_to_end", parameters | {"trades_per_s": rates}, result)


def measure(trades_per_s: float, duration_s: float, commit_interval_s: float, folder: Path) -> dict[str, Any]:
    """Run the platform in a home of its own for `duration_s` and return what it did."""
    outcome = _Outcome()
    with tempfile.TemporaryDirectory(prefix="streamforge-end-to-end-", dir=folder) as home:
        settings = build_settings(
            WriterSettings,
            home=Path(home),
            bootstrap_servers=None,
            recordings_dir=None,
            writer_commit_interval_s=commit_interval_s,
            writer_idle_interval_s=1.0,
        )
        configure_logs(settings)
        class_path()
        plan = plan_platform(settings, simulator=True, remember=True)
        plan = with_synthetic_market(plan, trades_per_s=trades_per_s, seed=7)
        serve(
            settings,
            PlatformFiles(settings.home_path),
            plan,
            detach=False,
            tell=lambda text: print(f"  {text}", file=sys.stderr),
            ready=lambda _: None,
            hold=lambda: _hold(settings, plan, duration_s, outcome),
        )
    if not outcome.comparisons:
        sys.exit("stopped before the end")
    return _result(trades_per_s, outcome)


def _hold(settings: Settings, plan: PlatformPlan, duration_s: float, outcome: _Outcome) -> None:
    contracts = load_contracts(settings.contracts_dir)
    files = PlatformFiles(settings.home_path)
    line, session = Line(settings, contracts), Session(settings, contracts, plan)
    _watch(line, session, duration_s, outcome.watched)
    stopped_s = time.monotonic()
    outcome.sent = session.land(line, files.ledger)
    outcome.drain_s = time.monotonic() - stopped_s
    outcome.ages = line.ages()
    outcome.comparisons = verify_tables(settings, contracts)
    outcome.restarts = {name: item.restarts for name, item in read_history(files).items()}


def _watch(line: Line, session: Session, duration_s: float, watched: _Watched) -> None:
    started_s = time.monotonic()
    while (now_s := time.monotonic() - started_s) < duration_s:
        processes = session.client.processes()
        watched.costs.sample((name, item.pid) for name, item in processes.items() if item.pid)
        watched.at_s.append(round(now_s, 1))
        watched.lag.append(dict(line.look().lag))
        session.require_running()
        time.sleep(max(0.0, _SAMPLE_S - (time.monotonic() - started_s - now_s)))


def _result(trades_per_s: float, outcome: _Outcome) -> dict[str, Any]:
    sent = outcome.sent
    ages = [item for item in outcome.ages if item.table.endswith(("raw_trades", "raw_depth", "trades"))]
    received = quantiles(np.concatenate([item.received for item in ages]))
    trades = next(item for item in outcome.ages if item.table.endswith(".trades"))
    lost = sum(item.tally.lost + item.not_landed for item in outcome.comparisons)
    doubled = sum(item.tally.doubled for item in outcome.comparisons)
    lag = _lag(outcome.watched)
    sent_per_s = sent.trades / sent.span_s if sent.span_s else 0.0
    return {
        "held": not lost and not doubled and not lag["grows"] and sent_per_s >= _RATE_TOLERANCE * trades_per_s,
        "asked_trades_per_s": trades_per_s,
        "instruments": SYNTHETIC_INSTRUMENTS,
        "sent_trades_per_s": round(sent_per_s, 1),
        "sent_messages_per_s": round(sent.messages / sent.span_s, 1) if sent.span_s else 0.0,
        "sent_trades": sent.trades,
        "market_s": round(sent.span_s, 1),
        "drain_s": round(outcome.drain_s, 1),
        "freshness": {item.table: _plain(item) for item in outcome.ages},
        "freshness_all": asdict(received) if received else None,
        "fresh_enough": received is not None and received.p99_s <= _FRESH_ENOUGH_S,
        "trades_landed": trades.rows,
        "lost": lost,
        "doubled": doubled,
        "lag": lag,
        "costs": outcome.watched.costs.result(),
        "restarts": outcome.restarts,
    }


def _plain(ages: TableAges) -> dict[str, Any]:
    received, event = quantiles(ages.received), quantiles(ages.event)
    return {
        "rows": ages.rows,
        "commits": ages.commits,
        "since_receipt": asdict(received) if received else None,
        "since_event": asdict(event) if event else None,
    }


def _lag(watched: _Watched) -> dict[str, Any]:
    """Return the lag of all tables over time: it grows when its last third is well above its second."""
    totals = np.array([sum(item.values()) for item in watched.lag], np.int64)
    thirds = np.array_split(totals, 3) if len(totals) >= 3 else [totals] * 3  # noqa: PLR2004
    means = [float(part.mean()) if len(part) else 0.0 for part in thirds]
    step = max(1, len(totals) // 24)
    return {
        "mean_records_by_third": [round(item) for item in means],
        "grows": means[2] > _LAG_GROWTH * max(means[1], 1.0),
        "records_over_time": [[at, int(total)] for at, total in zip(watched.at_s[::step], totals[::step], strict=True)],
        "at_the_end": watched.lag[-1] if watched.lag else {},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--trades-per-s", type=float, default=20_000.0, help="rate that the market is asked for")
    parser.add_argument("--duration-s", type=float, default=120.0, help="seconds that the market runs")
    parser.add_argument("--commit-interval-s", type=float, default=2.0, help="seconds between commits of a table")
    parser.add_argument("--sweep", default="", help="rates with commas, least first; stops at one that is not held")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where homes are made, and removed")
    return parser.parse_args()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
