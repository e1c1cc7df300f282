"""What a loader says, hears and notices: commands, silence, listings, limits, bad arguments, SIGTERM."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cli.app import app
from streamforge.contracts import Contracts
from streamforge.errors import ConfigurationError
from streamforge.events import CommandKind, EventKind, ProcessState
from streamforge.market.records import GapKind
from streamforge.settings import Settings
from streamforge.supervision import wait_for_answer
from tests.conftest import MakeTopics
from tests.loader_support import (
    LoaderProcess,
    LoaderThread,
    SmallVenue,
    ids_in_raw,
    read_events,
    read_gaps,
    trade_frame,
    wait_for_gap,
    wait_for_records,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


def test_pause_leaves_the_venue_and_resume_publishes_what_was_not_heard(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    with LoaderThread(platform, loader_contracts, venue) as loader:
        venue.wait_subscribed(2)
        venue.send(trade_frame(1))
        wait_for_records(platform, loader_contracts, "raw-trades", 1)
        answer = wait_for_answer(platform, loader_contracts, loader.tell(CommandKind.PING), timeout_s=60)
        assert (answer.state, answer.kind) == (ProcessState.RUNNING, "loader")
        assert answer.counters["acked"] == 1
        answer = wait_for_answer(platform, loader_contracts, loader.tell(CommandKind.PAUSE), timeout_s=60)
        assert answer.state is ProcessState.PAUSED
        wait_until(lambda: not venue.clients, what="the loader has left")
        loader.tell(CommandKind.RESUME)
        venue.wait_subscribed(2, connections=2)
        venue.send(trade_frame(9))
        gap = wait_for_gap(platform, loader_contracts, lambda item: item.kind is GapKind.RECONNECT)
        report = loader.stop()
    assert (gap.id_before, gap.id_after) == ("1", "9")
    assert report.unsaid == 0
    said = [event.event for event in read_events(platform, loader_contracts)]
    assert {EventKind.STARTED, EventKind.PROGRESS, EventKind.HEARTBEAT, EventKind.FINISHED} <= set(said)


def test_paused_loader_stays_paused_over_a_restart(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    with LoaderThread(platform, loader_contracts, venue) as loader:
        loader.tell(CommandKind.PAUSE)
        wait_until(
            lambda: any(event.state is ProcessState.PAUSED for event in read_events(platform, loader_contracts)),
            what="paused",
        )
        loader.stop()
    before = venue.connections
    with LoaderThread(platform, loader_contracts, venue) as loader:
        answer = wait_for_answer(platform, loader_contracts, loader.tell(CommandKind.PING), timeout_s=60)
        assert answer.state is ProcessState.PAUSED
        assert venue.connections == before
        loader.stop()


def test_connection_that_goes_silent_is_made_anew(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    with LoaderThread(platform, loader_contracts, venue, tuning={"stale_after_s": 0.3}) as loader:
        venue.wait_subscribed(2)
        venue.send(trade_frame(1))
        venue.wait_subscribed(2, connections=2)
        report = loader.stop()
    assert report.counters["reconnects"] >= 1


def test_new_listing_is_subscribed_where_every_symbol_is_loaded(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    quick = {"listing_interval_s": 0.2, "streams_per_connection": 2}
    with LoaderThread(platform, loader_contracts, venue, symbols=None, channels=("trade",), tuning=quick) as loader:
        venue.wait_subscribed(2)
        venue.symbols.append("NEWUSDT")
        venue.wait_subscribed(3, connections=2)
        venue.send(trade_frame(5, symbol="NEWUSDT"))
        wait_until(
            lambda: ids_in_raw(platform, loader_contracts, symbol="NEWUSDT") == {5}, what="the new symbol's trade"
        )
        loader.stop()
    subscribed = [name for client in venue.clients for name in client.subscribed]
    assert len(subscribed) == len(set(subscribed))
    assert [gap.id_after for gap in read_gaps(platform, loader_contracts) if gap.instrument == "NEW-USDT.SIM"] == ["5"]


def test_rest_limits_are_respected(platform: Settings, loader_contracts: Contracts, venue: SmallVenue) -> None:
    venue.refuse_rest = [(429, {"Retry-After": "1"}), (503, {}), (418, {"Retry-After": "1"})]
    with LoaderThread(platform, loader_contracts, venue) as loader:
        venue.wait_subscribed(2)
        loader.stop()
    waits = [later - earlier for earlier, later in zip(venue.rest_calls, venue.rest_calls[1:], strict=False)]
    assert len(waits) == 3
    assert waits[0] >= 1
    assert waits[2] >= 1


def test_topics_that_do_not_exist_are_named(platform: Settings, make_topics: MakeTopics, venue: SmallVenue) -> None:
    contracts = make_topics("queue-events", "queue-control")
    with (
        LoaderThread(platform, contracts, venue) as loader,
        pytest.raises(ConfigurationError, match="raw-trades"),
    ):
        loader.outcome.result(60)


def test_sigterm_waits_for_acknowledgements_and_says_finished(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    with LoaderProcess(platform, (venue.ws_url, venue.rest_url), ("--symbols", "BTCUSDT")) as loader:
        venue.wait_subscribed(2)
        venue.send(*(trade_frame(number) for number in range(1, 501)))
        wait_for_records(platform, loader_contracts, "raw-trades", 1)
        result = json.loads(loader.stop().splitlines()[-1])
    assert len(ids_in_raw(platform, loader_contracts)) == result["acked"]
    assert (result["unsaid"], result["rejected"], result["buffered_bytes"]) == (0, 0, 0)
    assert read_events(platform, loader_contracts)[-1].state in (ProcessState.STOPPED, ProcessState.STOPPING)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--symbols", "BTCUSD"), "BTCUSDT"),
        (("--symbols", ","), "--symbols"),
        (("--channels", "trades"), "did you mean trade"),
        (("--channels", ""), "--channels"),
        (("--venue", "bin/ance"), "--venue"),
        (("--ws-url", "http://x"), "ws://"),
        (("--rest-url", "ftp://x"), "https://"),
    ],
)
def test_bad_arguments_are_said_and_end_in_exit_code_2(
    venue: SmallVenue, arguments: tuple[str, ...], said: str
) -> None:
    urls = ("--ws-url", venue.ws_url, "--rest-url", venue.rest_url)
    result = CliRunner().invoke(app, ["load", *urls, *arguments, "--dry-run", "--output", "json"])
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_dry_run_says_what_would_be_subscribed(venue: SmallVenue) -> None:
    urls = ("--ws-url", venue.ws_url, "--rest-url", venue.rest_url)
    result = CliRunner().invoke(app, ["load", *urls, "--symbols", "all", "--dry-run", "--output", "json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["streams"]["btcusdt@trade"] == "BTC-USDT.BINANCE"
    assert len(found["streams"]) == 4
    assert venue.connections == 0
