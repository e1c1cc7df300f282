"""Every id that the venue sent and raw lacks must lie in a published gap; one that does not is reported."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import Producer

from streamforge.errors import ConfigurationError
from streamforge.kafka import producer_config
from streamforge.lakehouse.verify_ledger import LedgerComparison, RawChannel, verify_ledger
from streamforge.ledger import Fate, LedgerWriter
from streamforge.market.records import GapKind, MarketGap
from streaming.loaders.binance import trade_ids
from tests.pipeline_support import Pipeline, produce_raw
from tests.replay_support import BTC, ETH, frames

pytestmark = pytest.mark.integration
CHANNELS = {"trade": RawChannel("raw-trades", trade_ids)}


def _sent(folder: Path, symbol: str, ids: Iterable[int], fate: Fate = Fate.SENT, channel: str = "trade") -> None:
    writer = LedgerWriter(folder)
    connection, stream = writer.connection_code("c1"), writer.stream_code(symbol, channel)
    writer.append_connection(connection, Fate.CONNECTED, "", 1)
    for number in ids:
        writer.append(connection, stream, number, number, 1, 1, fate)
    writer.close()


def _gap(pipeline: Pipeline, instrument: str, kind: GapKind, before: int | None, after: int | None) -> None:
    gap = MarketGap(
        gap_id=uuid.uuid4().hex,
        kind=kind,
        venue="SIM",
        channel="trade",
        instrument=instrument,
        ts_start_ns=1,
        ts_end_ns=2,
        id_before=None if before is None else str(before),
        id_after=None if after is None else str(after),
        records_dropped=0,
        bytes_dropped=0,
        detail="test",
        ts_detected_ns=2,
    )
    producer = Producer(producer_config(pipeline.settings))
    producer.produce(pipeline.topic("market-gaps"), msgspec.json.encode(gap), instrument.encode())
    assert producer.flush(30) == 0


def _verify(pipeline: Pipeline, folder: Path) -> LedgerComparison:
    return verify_ledger(pipeline.settings, pipeline.contracts, folder, CHANNELS)


def test_missing_ids_are_unexplained_until_a_gap_covers_them(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    _sent(folder, "BTCUSDT", range(100))
    _sent(folder, "ETHUSDT", range(50))
    _sent(folder, "BTCUSDT", range(5), channel="bookTicker")
    produce_raw(pipeline, [*frames(BTC, [*range(40), *range(45, 90)]), *frames(ETH, range(50))])
    found = _verify(pipeline, folder)
    assert (found.sent, found.in_raw, found.explained) == (150, 135, 0)
    assert (found.unexplained, found.examples) == (5, ("BTCUSDT@trade 40..44",))
    assert found.after_last_raw == 10, "what the next frame or start will tell"
    _gap(pipeline, BTC, GapKind.LATE_TRADE, 39, 45)
    _gap(pipeline, ETH, GapKind.SEQUENCE, 39, 45)
    assert _verify(pipeline, folder).unexplained == 5, "a late trade and another stream's gap explain nothing"
    _gap(pipeline, BTC, GapKind.SEQUENCE, 40, 45)
    found = _verify(pipeline, folder)
    assert (found.unexplained, found.explained) == (1, 4), "the bounds of a gap are ids that raw has"
    _gap(pipeline, BTC, GapKind.RECONNECT, 39, None)
    found = _verify(pipeline, folder)
    assert (found.unexplained, found.explained, found.after_last_raw) == (0, 15, 0)


def test_what_was_held_back_is_not_lost_and_what_was_garbled_was_sent(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    _sent(folder, "BTCUSDT", [*range(10), *range(12, 20)])
    _sent(folder, "BTCUSDT", [10], Fate.DROPPED)
    _sent(folder, "BTCUSDT", [11], Fate.MALFORMED)
    _sent(folder, "BTCUSDT", [3], Fate.DOUBLED)
    produce_raw(pipeline, frames(BTC, [*range(10), *range(12, 20)]))
    found = _verify(pipeline, folder)
    assert (found.sent, found.not_sent, found.unexplained) == (19, 1, 1)
    assert found.examples == ("BTCUSDT@trade 11..11",)


def test_a_folder_without_ledger_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no ledger"):
        _verify(pipeline, tmp_path)
