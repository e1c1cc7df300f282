"""The loader while its broker does not answer: a broker of its own, stopped by SIGSTOP and let go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamforge import broker
from streamforge.contracts import Contracts
from streamforge.market.records import GapKind
from streamforge.settings import Settings
from tests.conftest import MakeTopics
from tests.loader_support import (
    LOADER_CONTRACTS,
    LoaderProcess,
    SmallVenue,
    depth_frame,
    ids_in_raw,
    outside_of_gaps,
    read_events,
    read_gaps,
    trade_frame,
    wait_for_gap,
    wait_for_records,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

BUFFER_BYTES = 262_144


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    settings = Settings(_env_file=None, home=tmp_path_factory.mktemp("own-broker"))  # type: ignore[call-arg]
    try:
        broker.start(settings)
        yield settings
    finally:
        pid = broker.status(settings).pid
        if pid is not None:
            os.kill(pid, signal.SIGCONT)
        broker.stop(settings)


@pytest.fixture
def platform(own_broker: Settings, tmp_path: Path) -> Settings:
    """Return the platform of the shared fixtures, on the broker of this module."""
    return Settings(
        _env_file=None,  # type: ignore[call-arg]
        home=tmp_path / "home",
        topic_prefix=f"{tmp_path.name[-12:]}.",
        bootstrap_servers=broker.status(own_broker).address,
    )


@pytest.fixture
def contracts(make_topics: MakeTopics) -> Contracts:
    return make_topics(*LOADER_CONTRACTS)


class Broker:
    """Stops and continues the broker's process."""

    def __init__(self, settings: Settings) -> None:
        pid = broker.status(settings).pid
        assert pid is not None
        self._pid = pid

    def goes_away(self) -> None:
        """Let it answer nobody; its sockets stay open."""
        os.kill(self._pid, signal.SIGSTOP)

    def comes_back(self) -> None:
        """Let it go on where it stood."""
        os.kill(self._pid, signal.SIGCONT)


def loader_of(platform: Settings, venue: SmallVenue) -> LoaderProcess:
    return LoaderProcess(
        platform,
        (venue.ws_url, venue.rest_url),
        ("--symbols", "BTCUSDT", "--metrics-port", "0"),
        {"STREAMFORGE_LOADER_BUFFER_BYTES": str(BUFFER_BYTES), "STREAMFORGE_LOADER_STOP_DEADLINE_S": "1"},
    )


def metrics_of(platform: Settings, contracts: Contracts) -> str:
    """Return the URL of the loader's metrics, as its events say."""
    event = wait_until(
        lambda: next((event for event in read_events(platform, contracts) if event.metrics_port), None),
        what="an event with a metrics port",
    )
    return f"http://127.0.0.1:{event.metrics_port}/metrics"


def counters(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(url).text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_broker_away_never_blocks_ingest_and_ends_in_one_counted_gap_per_stream(
    platform: Settings, contracts: Contracts, own_broker: Settings
) -> None:
    kafka = Broker(own_broker)
    with SmallVenue() as venue, loader_of(platform, venue) as loader:
        venue.wait_subscribed(2)
        venue.send(trade_frame(1), depth_frame(1, 5))
        wait_for_records(platform, contracts, "raw-trades", 1)
        wait_for_records(platform, contracts, "raw-depth", 1)
        url = metrics_of(platform, contracts)

        kafka.goes_away()
        venue.send(*(trade_frame(number) for number in range(2, 52)))
        wait_until(lambda: counters(url)["streamforge_loader_frames_total"] == 52, what="frames taken in")
        assert counters(url)["streamforge_loader_dropped_total"] == 0
        kafka.comes_back()
        wait_for_records(platform, contracts, "raw-trades", 51)
        assert {gap.kind for gap in read_gaps(platform, contracts)} == {GapKind.START}, "it all had room"

        kafka.goes_away()
        for start in range(52, 5052, 100):
            venue.send(*(trade_frame(number) for number in range(start, start + 100)))
            venue.send(*(depth_frame(number, number) for number in range(start, start + 10)))
        wait_until(lambda: counters(url)["streamforge_loader_frames_total"] == 5552, what="all frames taken in")
        found = counters(url)
        assert 0 < found["streamforge_loader_buffered_bytes"] <= BUFFER_BYTES
        assert found["streamforge_loader_dropped_total"] > 4000
        kafka.comes_back()
        for channel in ("trade", "depth@100ms"):
            wait_for_gap(
                platform,
                contracts,
                lambda gap, channel=channel: gap.kind is GapKind.BUFFER_OVERFLOW and gap.channel == channel,  # type: ignore[misc]
            )
        venue.send(*(trade_frame(number) for number in range(5052, 5062)))
        wait_until(lambda: 5061 in ids_in_raw(platform, contracts), what="trades after the outage")
        output = loader.stop()
    gaps = [gap for gap in read_gaps(platform, contracts) if gap.kind is GapKind.BUFFER_OVERFLOW]
    assert sorted(gap.channel for gap in gaps) == ["depth@100ms", "trade"]
    assert sum(gap.records_dropped for gap in gaps) == found["streamforge_loader_dropped_total"]
    have = ids_in_raw(platform, contracts)
    trades = next(gap for gap in gaps if gap.channel == "trade")
    lacking = set(range(1, 5062)) - have
    assert len(lacking) == trades.records_dropped
    assert (int(trades.id_before or 0), int(trades.id_after or 0)) == (min(lacking) - 1, max(lacking) + 1)
    assert outside_of_gaps(lacking, gaps) == []
    assert '"rejected": 0' in output


def test_stop_while_the_broker_is_away_ends_in_time_and_the_next_start_says_what_is_missing(
    platform: Settings, contracts: Contracts, own_broker: Settings
) -> None:
    kafka = Broker(own_broker)
    with SmallVenue() as venue:
        with loader_of(platform, venue) as loader:
            venue.wait_subscribed(2)
            venue.send(trade_frame(1))
            wait_for_records(platform, contracts, "raw-trades", 1)
            url = metrics_of(platform, contracts)
            kafka.goes_away()
            venue.send(*(trade_frame(number) for number in range(2, 12)))
            wait_until(lambda: counters(url)["streamforge_loader_frames_total"] == 11, what="frames taken in")
            loader.stop(timeout_s=30)
        kafka.comes_back()
        with loader_of(platform, venue) as loader:
            venue.wait_subscribed(2, connections=2)
            venue.send(trade_frame(20))
            wait_until(lambda: 20 in ids_in_raw(platform, contracts), what="a trade after the restart")
            loader.stop()
    lacking = set(range(1, 21)) - ids_in_raw(platform, contracts)
    gaps = read_gaps(platform, contracts)
    assert outside_of_gaps(lacking, gaps) == []
    assert any(gap.kind is GapKind.START and gap.id_after == "20" and gap.id_before is not None for gap in gaps)
