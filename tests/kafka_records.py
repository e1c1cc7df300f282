"""Kafka records as values: librdkafka makes messages only from a broker."""

from __future__ import annotations

from typing import Any

HEADERS = [
    ("venue", b"SIM"),
    ("channel", b"btcusdt@trade"),
    ("connection_id", b"c-1"),
    ("sequence_in_connection", b"12"),
    ("ts_receive_ns", b"1700000000000000001"),
]


class Record:
    """What is used of `confluent_kafka.Message`."""

    def __init__(self, value: bytes | None, offset: int = 0, partition: int = 0, **other: Any) -> None:
        self._value, self._offset, self._partition = value, offset, partition
        self._key, self._headers = other.get("key", b"BTC-USDT.SIM"), other.get("headers")

    def value(self) -> bytes | None:
        """Return the value."""
        return self._value

    def offset(self) -> int:
        """Return the offset."""
        return self._offset

    def partition(self) -> int:
        """Return the topic-partition number."""
        return self._partition

    def key(self) -> bytes | None:
        """Return the key."""
        return self._key  # type: ignore[no-any-return]

    def headers(self) -> Any:
        """Return the headers."""
        return self._headers
