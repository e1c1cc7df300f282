"""Kafka records as values: librdkafka makes messages only from a broker."""

from __future__ import annotations

from typing import Any

from streamforge.log_reader import KeptRecord

HEADERS = [
    ("venue", b"SIM"),
    ("channel", b"btcusdt@trade"),
    ("connection_id", b"c-1"),
    ("sequence_in_connection", b"12"),
    ("ts_receive_ns", b"1700000000000000001"),
]


class Record(KeptRecord):
    """A record with what a test does not care about filled in."""

    def __init__(
        self,
        value: bytes | None,
        offset: int = 0,
        partition: int = 0,
        *,
        key: bytes | None = b"BTC-USDT.SIM",
        headers: Any = None,
    ) -> None:
        super().__init__(partition, offset, key, value, headers)
