"""The loader against a real broker and a real WebSocket server: what raw and the ledger have afterwards."""

from __future__ import annotations

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from streamforge.contracts import Contracts
from streamforge.kafka import producer_config
from streamforge.market.records import GapKind
from streamforge.settings import Settings
from streaming.loaders.binance import CHANNELS
from streaming.loaders.sink import topic_name
from streaming.loaders.tail import read_tail
from tests.loader_support import (
    LoaderProcess,
    LoaderThread,
    SmallVenue,
    depth_frame,
    header,
    ids_in_raw,
    outside_of_gaps,
    read_gaps,
    read_topic,
    trade_frame,
    wait_for_gap,
    wait_for_records,
)

pytestmark = pytest.mark.integration


def test_start_does_not_wait_for_a_processor_that_stands_still(platform: Settings, loader_contracts: Contracts) -> None:
    short = {"transaction.timeout.ms": 10_000}
    producer = Producer(producer_config(platform, transactional_id=f"{platform.topic_prefix}bars.0", **short))
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(topic_name(loader_contracts, "market-gaps"), b"{}", b"key", 0)
    assert producer.flush(30) == 0

    assert read_tail(platform, loader_contracts, list(CHANNELS.values()), 100) is not None
    # It is still open: had the start waited, the broker would have ended it meanwhile.
    producer.commit_transaction(30)


def _limit_record_size(admin: AdminClient, topic: str, size_bytes: int) -> None:
    entry = ConfigEntry("max.message.bytes", str(size_bytes), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource]).values():
        future.result()


def test_frames_of_every_kind_reach_raw_untouched(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    odd = [
        b'{"stream":"btcusdt@trade","data":\xff\xfe not JSON and not UTF-8',
        b'{"stream":"dogeusdt@trade","data":{"t":1}}',
        b"",
        b'{"result":null,"id":4711}',
        b"garbage",
    ]
    with LoaderThread(platform, loader_contracts, venue, symbols=("BTCUSDT", "ETHUSDT")) as loader:
        venue.wait_subscribed(4)
        venue.send(trade_frame(7), depth_frame(20, 25), trade_frame(3, symbol="ETHUSDT"), *odd)
        whole = trade_frame(8)
        venue.send_in_parts(whole[:30], whole[30:60], whole[60:])
        wait_for_records(platform, loader_contracts, "raw-trades", 8)
        loader.stop()
    trades = read_topic(platform, loader_contracts, "raw-trades")
    depth = read_topic(platform, loader_contracts, "raw-depth")
    expected = {trade_frame(7), trade_frame(3, symbol="ETHUSDT"), whole, *odd} - {b""}
    assert {message.value() for message in trades if message.value()} == expected
    assert [(message.key(), message.value()) for message in depth] == [(b"BTC-USDT.SIM", depth_frame(20, 25))]
    assert header(depth[0], "channel") == "depth@100ms"
    unknown = [message for message in trades if message.key() == b"UNKNOWN.SIM"]
    assert {message.value() or b"" for message in unknown} == set(odd[1:])
    assert {header(message, "channel") for message in unknown} == {"unknown"}
    by_sequence = {int(header(message, "sequence_in_connection")) for message in [*trades, *depth]}
    assert by_sequence == set(range(9))
    assert len({header(message, "connection_id") for message in [*trades, *depth]}) == 1
    assert {header(message, "venue") for message in [*trades, *depth]} == {"SIM"}


def test_reconnect_publishes_the_span_that_was_not_heard(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    with LoaderThread(platform, loader_contracts, venue) as loader:
        venue.wait_subscribed(2)
        venue.send(trade_frame(1), trade_frame(2), trade_frame(3), depth_frame(10, 12))
        wait_for_records(platform, loader_contracts, "raw-trades", 3)
        venue.drop()
        venue.wait_subscribed(2, connections=2)
        venue.send(trade_frame(6), depth_frame(13, 14), trade_frame(7))
        gap = wait_for_gap(platform, loader_contracts, lambda item: item.kind is GapKind.RECONNECT)
        wait_for_records(platform, loader_contracts, "raw-trades", 5)
        loader.stop()
    assert (gap.id_before, gap.id_after, gap.channel, gap.instrument) == ("3", "6", "trade", "BTC-USDT.SIM")
    records = read_topic(platform, loader_contracts, "raw-trades")
    connections = [header(message, "connection_id") for message in records]
    assert len(set(connections)) == 2
    assert gap.connection_id == connections[-1]
    assert [int(header(message, "sequence_in_connection")) for message in records if message.value() == trade_frame(6)]
    received = {message.value(): int(header(message, "ts_receive_ns")) for message in records}
    assert gap.ts_start_ns <= received[trade_frame(3)] < gap.ts_end_ns <= received[trade_frame(6)]
    others = [item for item in read_gaps(platform, loader_contracts) if item.kind is not GapKind.START and item != gap]
    assert not others, "depth went on without a hole, so its reconnect is no gap"


def test_jump_in_a_connection_is_published_and_late_or_doubled_frames_are_not(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    with LoaderThread(platform, loader_contracts, venue) as loader:
        venue.wait_subscribed(2)
        venue.send(trade_frame(1), trade_frame(2), trade_frame(5), trade_frame(3), trade_frame(5), trade_frame(6))
        venue.send(depth_frame(1, 5), depth_frame(6, 9), depth_frame(12, 15))
        wait_for_records(platform, loader_contracts, "raw-trades", 6)
        wait_for_records(platform, loader_contracts, "raw-depth", 3)
        loader.stop()
    jumps = {
        (gap.channel, gap.id_before, gap.id_after)
        for gap in read_gaps(platform, loader_contracts)
        if gap.kind is GapKind.SEQUENCE
    }
    assert jumps == {("trade", "2", "5"), ("depth@100ms", "9", "12")}


def test_sigkill_at_any_moment_leaves_no_id_outside_of_a_gap(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue
) -> None:
    sent = 0
    for start in range(1, 4):
        with LoaderProcess(platform, (venue.ws_url, venue.rest_url), ("--symbols", "BTCUSDT")) as loader:
            venue.wait_subscribed(2, connections=start)
            for _ in range(20):
                venue.send(*(trade_frame(number) for number in range(sent + 1, sent + 101)))
                sent += 100
            loader.kill()
            sent += 5
    with LoaderProcess(platform, (venue.ws_url, venue.rest_url), ("--symbols", "BTCUSDT")) as loader:
        venue.wait_subscribed(2, connections=4)
        venue.send(trade_frame(sent + 1))
        sent += 1
        wait_for_gap(platform, loader_contracts, lambda item: item.id_after == str(sent))
        loader.stop()
    have = ids_in_raw(platform, loader_contracts)
    lacking = set(range(1, sent + 1)) - have
    assert sent in have
    assert len(lacking) >= 15, "the kills were to cost something"
    assert outside_of_gaps(lacking, read_gaps(platform, loader_contracts)) == []


def test_frame_that_the_broker_refuses_is_a_gap_and_the_rest_goes_on(
    platform: Settings, loader_contracts: Contracts, venue: SmallVenue, admin: AdminClient
) -> None:
    _limit_record_size(admin, topic_name(loader_contracts, "raw-trades"), 100_000)
    with LoaderThread(platform, loader_contracts, venue) as loader:
        venue.wait_subscribed(2)
        venue.send(trade_frame(1))
        wait_for_records(platform, loader_contracts, "raw-trades", 1)
        large = trade_frame(2, pad_bytes=300_000)
        venue.send(large)
        gap = wait_for_gap(platform, loader_contracts, lambda item: item.kind is GapKind.BROKER_REJECTED)
        venue.send(trade_frame(3))
        wait_for_records(platform, loader_contracts, "raw-trades", 2)
        loader.stop()
    assert (gap.id_before, gap.id_after, gap.records_dropped) == ("1", "3", 1)
    assert gap.bytes_dropped == len(large)
    assert ids_in_raw(platform, loader_contracts) == {1, 3}
