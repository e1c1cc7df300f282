"""Kafka records as values (librdkafka makes messages only from a broker), and topics made by hand."""

from __future__ import annotations

from typing import Any

from confluent_kafka.admin import AdminClient, NewTopic

from streamforge.kafka import describe_topics
from streamforge.log_reader import KeptRecord
from tests.waiting import wait_until

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


def create_topic(admin: AdminClient, name: str, partitions: int) -> str:
    """Create a topic that no contract describes, wait until the broker knows it, and return its id."""
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result()
    return wait_until(lambda: describe_topics(admin, [name]).get(name), what=f"topic {name} is known").topic_id
