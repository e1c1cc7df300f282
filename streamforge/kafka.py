"""Kafka clients made from settings; the one place that knows librdkafka's configuration keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka.admin import AdminClient

from streamforge.errors import ConfigurationError, RetryableSourceError
from streamforge.settings import Settings

PARTITIONER = "murmur2_random"
REQUEST_TIMEOUT_S = 30.0
BROKER_ADDRESS_FILE = "broker/address"

_ABSENT = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART})


@dataclass(frozen=True, slots=True)
class TopicIdentity:
    """What tells a topic from another of the same name: the cluster and Kafka's topic id."""

    cluster_id: str
    topic: str
    topic_id: str
    partitions: int


def bootstrap_servers(settings: Settings) -> str:
    """Return the brokers' addresses: the setting, or those that the embedded broker remembered.

    Raises:
        ConfigurationError: neither is there.
    """
    if settings.bootstrap_servers:
        return settings.bootstrap_servers
    address = settings.home_path / BROKER_ADDRESS_FILE
    try:
        return address.read_text(encoding="utf-8").strip()
    except OSError as error:
        msg = (
            f"no Kafka: STREAMFORGE_BOOTSTRAP_SERVERS is not set and no embedded broker has run in "
            f"{settings.home_path}. Run `streamforge broker start`, or set the variable"
        )
        raise ConfigurationError(msg) from error


def client_config(settings: Settings, **extra: Any) -> dict[str, Any]:
    """Return what every client needs to reach the cluster, with `extra` on top."""
    config: dict[str, Any] = {
        "bootstrap.servers": bootstrap_servers(settings),
        "security.protocol": settings.security_protocol,
    }
    secured = {
        "sasl.mechanism": settings.sasl_mechanism,
        "sasl.username": settings.sasl_username,
        "sasl.password": settings.sasl_password and settings.sasl_password.get_secret_value(),
        "ssl.ca.location": settings.ssl_ca_location,
        "ssl.certificate.location": settings.ssl_certificate_location,
        "ssl.key.location": settings.ssl_key_location,
        "ssl.key.password": settings.ssl_key_password and settings.ssl_key_password.get_secret_value(),
    }
    config |= {key: str(value) for key, value in secured.items() if value}
    return config | extra


def consumer_config(settings: Settings, *, group: str, slot: str, **extra: Any) -> dict[str, Any]:
    """Return the configuration of a member of consumer group `group`.

    `slot` is the replica's name, stable over restarts: it is the static membership, so that a killed
    process has its topic-partitions back at once. Positions are never reset by Kafka
    (`auto.offset.reset=error`) and end-of-partition events are on: they carry the position behind
    commit markers.
    """
    return client_config(
        settings,
        **{
            "group.id": group,
            "group.instance.id": f"{group}.{slot}",
            "group.protocol": "classic",
            "partition.assignment.strategy": "range",
            "session.timeout.ms": 45_000,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "fetch.queue.backoff.ms": 2,
            "queued.max.messages.kbytes": 16_384,  # the client's 64 MiB of small records are 200 MiB of memory
            "fetch.max.bytes": 8_388_608,
            **extra,
        },
    )


def reader_config(settings: Settings, **extra: Any) -> dict[str, Any]:
    """Return the configuration of a consumer that assigns by hand and never commits."""
    return client_config(
        settings,
        **{
            "group.id": "streamforge-reader",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "fetch.queue.backoff.ms": 2,
            **extra,
        },
    )


def producer_config(settings: Settings, *, transactional_id: str | None = None, **extra: Any) -> dict[str, Any]:
    """Return the configuration of an idempotent producer, transactional where an id is given."""
    config = client_config(
        settings,
        **{
            "enable.idempotence": True,
            "acks": "all",
            "partitioner": PARTITIONER,
            "linger.ms": 5,
            "compression.type": "lz4",
            **extra,
        },
    )
    if transactional_id is not None:
        config["transactional.id"] = transactional_id
    return config


def admin_client(settings: Settings) -> AdminClient:
    """Return an admin client of the cluster."""
    # Below "info": a client that is let go says there how many of its own events nobody asked for.
    return AdminClient(client_config(settings, log_level=5))


def describe_topics(admin: AdminClient, topics: Iterable[str]) -> Mapping[str, TopicIdentity]:
    """Return the identity of each of `topics` that exists; a topic that does not exist is left out.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    names = list(topics)
    if not names:
        return {}
    try:
        cluster_id = admin.describe_cluster(request_timeout=REQUEST_TIMEOUT_S).result().cluster_id
        futures = admin.describe_topics(TopicCollection(names), request_timeout=REQUEST_TIMEOUT_S)
        found = {}
        for name, future in futures.items():
            try:
                description = future.result()
            except KafkaException as error:
                if error.args[0].code() in _ABSENT:
                    continue
                raise
            found[name] = TopicIdentity(cluster_id, name, str(description.topic_id), len(description.partitions))
        return found
    except KafkaException as error:
        msg = (
            f"the broker does not describe topics {', '.join(names)}: {error.args[0].str()}. "
            "Is it up? `streamforge broker status`"
        )
        raise RetryableSourceError(msg) from error


__all__ = [
    "Consumer",
    "Producer",
    "TopicIdentity",
    "admin_client",
    "bootstrap_servers",
    "client_config",
    "consumer_config",
    "describe_topics",
    "producer_config",
    "reader_config",
]
