"""The loader against the simulated market with everything that can go wrong: the ledgers have to agree."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest

from streamforge.contracts import Contracts
from streamforge.events import CommandKind
from streamforge.ledger import ARRIVING_FATES, read_ledger
from streamforge.market.gaps import VenueIds
from streamforge.market.records import GapKind
from streamforge.settings import Settings
from streamforge.supervision import send_command
from tests.conftest import MakeTopics
from tests.loader_support import (
    LOADER_CONTRACTS,
    LoaderThread,
    loader_environment,
    outside_of_gaps,
    read_gaps,
    read_topic,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

FAULTS = (
    "drop:ratio=0.05",
    "double:ratio=0.05",
    "reorder:ratio=0.05",
    "malformed:ratio=0.02",
)
CHANNELS = {"trade": "raw-trades", "depth@100ms": "raw-depth"}


@pytest.fixture
def contracts(make_topics: MakeTopics) -> Contracts:
    return make_topics(*LOADER_CONTRACTS)


class Simulator:
    """Where a simulator process listens, and how it is ended."""

    def __init__(self, folder: Path, environment: dict[str, str], *arguments: str) -> None:
        address = folder / "address.json"
        command = [sys.executable, "-m", "cli", "simulate", "--kafka", "--output", "json"]
        command += ["--address-file", str(address), "--ledger", str(folder / "ledger"), *arguments]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(address.exists, what="the simulator listens")
        found = msgspec.json.decode(address.read_bytes(), type=dict[str, str])
        self.ws_url, self.rest_url = found["ws_url"], found["rest_url"]

    def __enter__(self) -> Simulator:  # noqa: PYI034 - it is final
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def ids_held(values: Iterable[bytes], symbol: str, ids_of: Callable[[dict[str, int]], VenueIds]) -> set[int]:
    """Return the ids that raw has of a symbol, from the frames that a parser could read."""
    held: set[int] = set()
    for value in values:
        try:
            data = msgspec.json.decode(value)["data"]
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if data["s"] == symbol:
            ids = ids_of(data)
            held.update(range(ids.first, ids.last + 1))
    return held


def test_every_id_that_the_market_sent_is_in_raw_or_inside_a_gap(
    platform: Settings, contracts: Contracts, tmp_path: Path
) -> None:
    arguments = [part for fault in FAULTS for part in ("--fault", fault)]
    market = ("--instruments", "2", "--rate", "40", "--start-streams", "4", *arguments)
    with (
        Simulator(tmp_path, loader_environment(platform), *market) as simulator,
        LoaderThread(platform, contracts, simulator, symbols=None, tuning={"stale_after_s": 1.0}) as loader,
    ):
        wait_until(lambda: _kinds(platform, contracts) >= {GapKind.START, GapKind.SEQUENCE}, what="gaps by ids")
        _fault(platform, contracts, fault="disconnect")
        wait_until(lambda: _connections(platform, contracts) >= 2, what="frames after the disconnect")
        _fault(platform, contracts, fault="stall", duration_s="30")
        wait_until(lambda: _connections(platform, contracts) >= 3, what="frames after the silence")
        wait_until(lambda: GapKind.RECONNECT in _kinds(platform, contracts), what="gaps of the reconnects")
        report = loader.stop()
    assert report.unsaid == 0
    rows = read_ledger(tmp_path / "ledger").to_pylist()
    gaps = read_gaps(platform, contracts)
    reads = {"trade": lambda data: VenueIds(data["t"], data["t"]), "depth@100ms": lambda d: VenueIds(d["U"], d["u"])}
    for channel, contract_id in CHANNELS.items():
        values = [message.value() or b"" for message in read_topic(platform, contracts, contract_id)]
        for symbol in ("BTCUSDT", "ETHUSDT"):
            sent = [row for row in rows if (row["symbol"], row["channel"]) == (symbol, channel)]
            held = ids_held(values, symbol, reads[channel])
            last_held = max(held)
            lacking = set(range(min(row["first_id"] for row in sent), last_held)) - held
            own = [gap for gap in gaps if gap.channel == channel and gap.instrument == f"{symbol[:-4]}-USDT.SIM"]
            assert len(held) > 50
            assert lacking, "the faults were to cost something"
            assert outside_of_gaps(lacking, own) == []
            arrived = {row["first_id"] for row in sent if row["fate"] in ARRIVING_FATES and row["last_id"] <= last_held}
            # What arrived is held, but for what was on its way at a disconnect; and a gap covers what is lacking, not
            # what is held, but for messages out of order (one in twenty).
            assert len(arrived - held) <= len(arrived) // 20
            assert len([number for number in held if not outside_of_gaps([number], own)]) <= len(held) // 10


def _fault(platform: Settings, contracts: Contracts, **arguments: str) -> None:
    send_command(
        platform,
        contracts,
        target="simulator",
        command=CommandKind.FAULT,
        issued_by="test",
        arguments=arguments,
    )


def _kinds(platform: Settings, contracts: Contracts) -> set[GapKind]:
    return {gap.kind for gap in read_gaps(platform, contracts)}


def _connections(platform: Settings, contracts: Contracts) -> int:
    ids = {dict(message.headers() or ())["connection_id"] for message in read_topic(platform, contracts, "raw-trades")}
    return len(ids)
