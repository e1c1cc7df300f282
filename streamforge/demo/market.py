"""The markets of a demo: how the simulator is asked for, and what its ledger says it sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from msgspec.structs import replace

from streamforge.ledger import read_ledger
from streamforge.platform.plan import LOADER, SIMULATOR, PlatformFiles, PlatformPlan, ProcessPlan, make_plan
from streamforge.settings import Settings

SYNTHETIC_INSTRUMENTS = 8
RECORDED = "recordings"
"""Slot, folder and prefix of names of the recorded market and its loader."""

_MESSAGE_FATES = ("sent", "doubled", "reordered", "malformed")
_PLAN_ATTEMPTS = 100
_NS_PER_S = 1e9
_MINUTE_S = 60.0
_START_S = 15.0
"""From the plan of a platform until its market sends, about."""
_SHORTEST_MARKET_S = 25.0
_FASTEST_MARKET = 5_000.0


@dataclass(frozen=True, slots=True)
class Sent:
    """What a market handed to its connections: messages, trades among them, and the seconds it took."""

    messages: int
    trades: int
    span_s: float


def read_sent(ledger: Path) -> Sent:
    """Sum up a ledger.

    Raises:
        ConfigurationError: there is none.
    """
    rows = read_ledger(ledger)
    fates: Any = pa.array(_MESSAGE_FATES)
    rows = rows.filter(pc.is_in(rows["fate"], fates))
    if not rows.num_rows:
        return Sent(0, 0, 0.0)
    bounds: Any = pc.min_max(rows["ts_sent_ns"]).as_py()
    trades = rows.filter(pc.equal(rows["channel"], pa.scalar("trade"))).num_rows
    return Sent(rows.num_rows, trades, (bounds["max"] - bounds["min"]) / _NS_PER_S)


def paced_rate(events: int, now_s: float) -> float:
    """Return the trades per second at which `events` are there when a minute is over and its bars come.

    A faster market would only send more than was asked for until then, and all of it has to be compared. What a laptop
    does not take in for long is not asked for: so many events take longer.

    Args:
        events: messages that are wanted.
        now_s: Unix time at which the platform begins to start.
    """
    first_s = now_s + _START_S
    end_s = math.ceil((first_s + _SHORTEST_MARKET_S) / _MINUTE_S) * _MINUTE_S
    return min(events / (end_s - first_s), _FASTEST_MARKET)


def with_synthetic_market(
    plan: PlatformPlan, *, trades_per_s: float, seed: int, start_minutes_ago: float = 0.0
) -> PlatformPlan:
    """Return `plan` with a simulated market of `trades_per_s` over all its instruments.

    A market that starts minutes ago runs fast until it is now: its first bars are there at once.
    """
    market = ["--instruments", str(SYNTHETIC_INSTRUMENTS), "--seed", str(seed)]
    market += ["--rate", str(trades_per_s / SYNTHETIC_INSTRUMENTS), "--start-minutes-ago", str(start_minutes_ago)]
    return replace(
        plan,
        processes=[
            replace(item, command=[*item.command, *market]) if item.name == SIMULATOR else item
            for item in plan.processes
        ],
    )


def recorded_home(settings: Settings) -> Path:
    """Return the folder of the recorded market's ledger and ports."""
    return settings.home_path / RECORDED


def with_recorded_market(plan: PlatformPlan, settings: Settings, recordings_dir: Path) -> PlatformPlan:
    """Return `plan` with a recorded market and a loader for it, which wait until the supervisor is asked for them.

    The recordings are sent as fast as they are taken; the market ends by itself after the last message.
    """
    own = settings.model_copy(update={"home": recorded_home(settings), "recordings_dir": recordings_dir.resolve()})
    taken = {port for item in plan.processes for port in item.ports.values()}
    for _ in range(_PLAN_ATTEMPTS):
        found = make_plan(own, broker=False, simulator=True, remember=False)
        added = [_renamed(plan, item, recordings_dir) for item in found.processes if item.name in (SIMULATOR, LOADER)]
        if taken.isdisjoint(port for item in added for port in item.ports.values()):
            break
    return replace(plan, processes=[*plan.processes, *added])


def _renamed(plan: PlatformPlan, process: ProcessPlan, recordings_dir: Path) -> ProcessPlan:
    name = f"{RECORDED}-{process.name}"
    command = [*process.command, "--slot", RECORDED]
    if process.name == SIMULATOR:
        command += ["--recordings-dir", str(recordings_dir.resolve()), "--speed", "0", "--exit-at-end"]
    log_file = PlatformFiles(Path(plan.home)).logs / f"{name}.out"
    return replace(process, name=name, slot=RECORDED, command=command, log_file=str(log_file), is_on_demand=True)
