"""Kafka as Spark reads it: committed records only, and never fewer than were asked for."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
from confluent_kafka import Message

from streamforge.errors import ConfigurationError
from streamforge.kafka import bootstrap_servers
from streamforge.log_reader import KeptRecord
from streamforge.offsets import OffsetRange
from streamforge.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

COMMITTED_AND_COMPLETE = {"failOnDataLoss": "true", "kafka.isolation.level": "read_committed"}
"""Options of every read from Kafka: committed records only, and an error where some are gone."""

_COLUMNS = ("partition", "offset", "key", "value", "headers")


def records_of(session: SparkSession, settings: Settings, ranges: Sequence[OffsetRange]) -> DataFrame:
    """Return the records of `ranges` (merged, of one topic); each topic-partition is one task, in offset order.

    No `minPartitions`: it would split a topic-partition over tasks, and the state of a re-run with it. Of a
    topic-partition with several ranges the records between them come too.
    """
    return session.read.format("kafka").options(**read_options(settings, ranges)).load().select(*_COLUMNS)


def read_options(settings: Settings, ranges: Sequence[OffsetRange]) -> dict[str, str]:
    """Return the options of every read from Kafka: committed records only, and an error where some are gone."""
    topic = ranges[0].topic
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for each in ranges:
        starts.setdefault(str(each.partition), each.start)
        ends[str(each.partition)] = each.end
    return {
        **client_options(settings),
        "assign": json.dumps({topic: [int(partition) for partition in starts]}),
        "startingOffsets": json.dumps({topic: starts}),
        "endingOffsets": json.dumps({topic: ends}),
        "includeHeaders": "true",
        **COMMITTED_AND_COMPLETE,
    }


def client_options(settings: Settings) -> dict[str, str]:
    """Return how Kafka's Java client reaches the cluster.

    Raises:
        ConfigurationError: the settings have a client certificate.
    """
    if settings.ssl_certificate_location:
        msg = (
            "STREAMFORGE_SSL_CERTIFICATE_LOCATION: Spark's reads from Kafka do not take client certificates. "
            "Replay with --engine local"
        )
        raise ConfigurationError(msg)
    options = {
        "kafka.bootstrap.servers": bootstrap_servers(settings),
        "kafka.security.protocol": settings.security_protocol,
    }
    if settings.ssl_ca_location:
        options |= {
            "kafka.ssl.truststore.type": "PEM",
            "kafka.ssl.truststore.location": str(settings.ssl_ca_location),
        }
    if settings.sasl_mechanism:
        options["kafka.sasl.mechanism"] = settings.sasl_mechanism
    if settings.sasl_username and settings.sasl_password:
        module = "scram.ScramLoginModule" if "SCRAM" in (settings.sasl_mechanism or "") else "plain.PlainLoginModule"
        user, password = (_quoted(text) for text in (settings.sasl_username, settings.sasl_password.get_secret_value()))
        options["kafka.sasl.jaas.config"] = (
            f"org.apache.kafka.common.security.{module} required username={user} password={password};"
        )
    return options


class RecordStream:
    """The records of one topic-partition as Spark hands them to a task, range by range.

    Args:
        batches: of the columns of `records_of`, in offset order.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = iter(batches)
        self._held: deque[KeptRecord] = deque()

    def partition(self) -> int | None:
        """Return the topic-partition's number, known from its first record; None: there is no record."""
        return self._held[0].partition() if self._held or self._fetch() else None

    def read(self, wanted: OffsetRange) -> Iterator[Sequence[Message]]:
        """Yield the records of a range, in lists; ranges have to be asked for in order."""
        while self._held or self._fetch():
            found = []
            while self._held and self._held[0].offset() < wanted.end:
                record = self._held.popleft()
                if record.offset() >= wanted.start:
                    found.append(record)
            if found:
                yield cast("list[Message]", found)
            if self._held:
                return

    def _fetch(self) -> bool:
        for batch in self._batches:
            if batch.num_rows:
                columns = (batch.column(name).to_pylist() for name in _COLUMNS)
                self._held.extend(_record(*values) for values in zip(*columns, strict=True))
                return True
        return False


def _record(
    partition: int, offset: int, key: bytes | None, value: bytes | None, headers: list[dict[str, Any]] | None
) -> KeptRecord:
    """Return a row of Spark's Kafka source as a record."""
    pairs = [(each["key"], each["value"]) for each in headers] if headers else None
    return KeptRecord(partition, offset, key, value, pairs)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
