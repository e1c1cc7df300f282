"""Kafka topics as their contracts say: what differs, and the creation of what is missing.

Two things are never changed on a live topic, because records already lie where the old setting put them:
the partition count of a keyed topic (a key's records would spread over two topic-partitions and lose their
order) and a cleanup policy that adds or removes compaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import stamina
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from streamforge.contracts import Contract, Contracts, TopicSettings
from streamforge.errors import ConfigurationError, RetryableSourceError, SchemaMismatchError, SourceError
from streamforge.kafka import REQUEST_TIMEOUT_S, admin_client, describe_topics
from streamforge.settings import Settings

_VISIBLE_TIMEOUT_S = 30.0


class TopicAction(StrEnum):
    """What a topic needs to be as its contract says."""

    CREATE = "create"
    ALTER = "alter"
    KEEP = "keep"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class TopicChange:
    """One topic, what it needs, and why.

    Args:
        config: settings to change, `{name: (found, expected)}`.
        add_partitions_to: new partition count of a topic without keys, or None.
        refusal: why nothing can be changed, and what to do; empty unless the action is `refuse`.
    """

    contract_id: str
    topic: str
    action: TopicAction
    partitions: int
    config: Mapping[str, tuple[str | None, str]]
    add_partitions_to: int | None = None
    refusal: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the change as plain values for a JSON report."""
        return {
            "contract": self.contract_id,
            "topic": self.topic,
            "action": str(self.action),
            "partitions": self.add_partitions_to or self.partitions,
            "config": {name: {"found": found, "expected": expected} for name, (found, expected) in self.config.items()},
            "refusal": self.refusal,
        }


@dataclass(frozen=True, slots=True)
class TopicPlan:
    """What all topics need; after `create_topics`, what was done."""

    changes: tuple[TopicChange, ...]

    def with_action(self, action: TopicAction) -> tuple[TopicChange, ...]:
        """Return the changes of one kind."""
        return tuple(change for change in self.changes if change.action is action)

    @property
    def is_empty(self) -> bool:
        """Return whether every topic already is as its contract says."""
        return all(change.action is TopicAction.KEEP for change in self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for a JSON report."""
        return {"topics": [change.as_dict() for change in self.changes]}


def plan_topics(
    settings: Settings, contracts: Contracts, ids: Iterable[str] | None = None, *, admin: AdminClient | None = None
) -> TopicPlan:
    """Compare the topics of the contracts (all, or those of `ids`) with the cluster; change nothing.

    Raises:
        ConfigurationError: an id is unknown or its contract has no topic.
        RetryableSourceError: the broker does not answer.
    """
    wanted = _wanted(contracts, ids)
    admin = admin or admin_client(settings)
    existing = describe_topics(admin, [topic.name for _, topic in wanted])
    configs = _describe_configs(admin, existing)
    return TopicPlan(
        tuple(
            compare_topic(contract, topic, existing[topic.name].partitions, configs[topic.name])
            if topic.name in existing
            else TopicChange(contract.id, topic.name, TopicAction.CREATE, topic.partitions, _all_new(topic))
            for contract, topic in wanted
        )
    )


def create_topics(settings: Settings, contracts: Contracts, ids: Iterable[str] | None = None) -> TopicPlan:
    """Create the missing topics of the contracts (all, or those of `ids`) and alter settings that differ.

    Returns when the broker knows every topic. Several processes may call it at once: a topic that another
    has just created counts as created. Nothing is changed when any topic has to be refused.

    Returns:
        What was done.

    Raises:
        SchemaMismatchError: a topic exists with a partition count or cleanup policy that cannot be changed.
        ConfigurationError: an id is unknown, or the cluster refuses the settings.
        RetryableSourceError: the broker does not answer.
    """
    admin = admin_client(settings)
    chosen = None if ids is None else list(ids)
    plan = plan_topics(settings, contracts, chosen, admin=admin)
    require_applicable(plan)
    _create(admin, settings, plan.with_action(TopicAction.CREATE))
    for change in plan.with_action(TopicAction.ALTER):
        _alter(admin, change)
    if not plan.is_empty:
        _wait_until_visible(admin, [change.topic for change in plan.changes])
        require_applicable(plan_topics(settings, contracts, chosen, admin=admin))
    return plan


def require_applicable(plan: TopicPlan) -> None:
    """Refuse a plan with a topic that cannot be made as its contract says.

    Raises:
        SchemaMismatchError: names each such topic, expected and found.
    """
    refused = plan.with_action(TopicAction.REFUSE)
    if refused:
        raise SchemaMismatchError("; ".join(change.refusal for change in refused))


def compare_topic(
    contract: Contract, topic: TopicSettings, partitions: int, config: Mapping[str, str | None]
) -> TopicChange:
    """Return what a live topic with `partitions` and `config` needs to be as its contract says."""
    differing = {
        name: (config.get(name), expected) for name, expected in topic.config.items() if config.get(name) != expected
    }
    refusal = _partition_refusal(topic, partitions) or _cleanup_refusal(topic, differing)
    if refusal:
        return TopicChange(contract.id, topic.name, TopicAction.REFUSE, partitions, differing, refusal=refusal)
    grown = topic.partitions if topic.partitions > partitions else None
    action = TopicAction.ALTER if differing or grown else TopicAction.KEEP
    return TopicChange(contract.id, topic.name, action, partitions, differing, add_partitions_to=grown)


def _wanted(contracts: Contracts, ids: Iterable[str] | None) -> list[tuple[Contract, TopicSettings]]:
    chosen = contracts.with_topic if ids is None else tuple(contracts[item] for item in ids)
    wanted = []
    for contract in chosen:
        if contract.topic is None:
            msg = f"contract {contract.id} ({contract.path}) has no topic; name one with topic.partitions"
            raise ConfigurationError(msg)
        wanted.append((contract, contract.topic))
    return wanted


def _all_new(topic: TopicSettings) -> dict[str, tuple[str | None, str]]:
    return {name: (None, value) for name, value in topic.config.items()}


def _partition_refusal(topic: TopicSettings, partitions: int) -> str:
    if topic.partitions == partitions or (not topic.key and topic.partitions > partitions):
        return ""
    keyed = f"keyed by {', '.join(topic.key)}" if topic.key else "without keys"
    return (
        f"topic {topic.name} ({keyed}) has {partitions} partitions, its contract says {topic.partitions}: changing "
        "the count would break the order within a key. Put the old count back into the contract, or make a new "
        "topic with another id and move readers over"
    )


def _cleanup_refusal(topic: TopicSettings, differing: Mapping[str, tuple[str | None, str]]) -> str:
    found, expected = differing.get("cleanup.policy", (None, ""))
    if found is None or ("compact" in found) == ("compact" in expected):
        return ""
    return (
        f"topic {topic.name} has cleanup.policy={found}, its contract says {expected}: records that readers "
        "count on would vanish or stay for ever. Put the old policy back into the contract, or make a new topic"
    )


def _describe_configs(admin: AdminClient, topics: Iterable[str]) -> dict[str, dict[str, str | None]]:
    resources = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
    if not resources:
        return {}
    try:
        futures = admin.describe_configs(resources, request_timeout=REQUEST_TIMEOUT_S)
        return {
            resource.name: {name: entry.value for name, entry in future.result().items()}
            for resource, future in futures.items()
        }
    except KafkaException as error:
        raise _kafka_error("read the settings of topics", error) from error


def _create(admin: AdminClient, settings: Settings, changes: Sequence[TopicChange]) -> None:
    if not changes:
        return
    new = [
        NewTopic(
            change.topic,
            num_partitions=change.partitions,
            replication_factor=settings.replication_factor,
            config={name: expected for name, (_, expected) in change.config.items()},
        )
        for change in changes
    ]
    futures = admin.create_topics(new, operation_timeout=REQUEST_TIMEOUT_S, request_timeout=REQUEST_TIMEOUT_S)
    for topic, future in futures.items():
        _result(future, f"create topic {topic}", ignore=KafkaError.TOPIC_ALREADY_EXISTS)


def _alter(admin: AdminClient, change: TopicChange) -> None:
    if change.add_partitions_to is not None:
        grown = admin.create_partitions(
            [NewPartitions(change.topic, change.add_partitions_to)], request_timeout=REQUEST_TIMEOUT_S
        )
        _result(grown[change.topic], f"add partitions to topic {change.topic}")
    if change.config:
        entries = [
            ConfigEntry(name, expected, incremental_operation=AlterConfigOpType.SET)
            for name, (_, expected) in change.config.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, change.topic, incremental_configs=entries)
        futures = admin.incremental_alter_configs([resource], request_timeout=REQUEST_TIMEOUT_S)
        for future in futures.values():
            _result(future, f"alter topic {change.topic}")


def _wait_until_visible(admin: AdminClient, topics: Sequence[str]) -> None:
    """Wait until the broker that answers knows all `topics`: creation is acknowledged by the controller."""
    for attempt in stamina.retry_context(
        on=RetryableSourceError, attempts=None, timeout=_VISIBLE_TIMEOUT_S, wait_initial=0.05, wait_max=1.0
    ):
        with attempt:
            absent = sorted(set(topics) - set(describe_topics(admin, topics)))
            if absent:
                msg = f"topics {', '.join(absent)} were created but the broker does not know them yet; try again"
                raise RetryableSourceError(msg)


def _result(future: Future[Any], what: str, *, ignore: int | None = None) -> None:
    try:
        future.result()
    except KafkaException as error:
        if error.args[0].code() != ignore:
            raise _kafka_error(what, error) from error


def _kafka_error(what: str, error: KafkaException) -> SourceError | ConfigurationError:
    cause: KafkaError = error.args[0]
    if cause.retriable() or cause.code() < 0:
        return RetryableSourceError(f"cannot {what}: {cause.str()}. Is the broker up? `streamforge broker status`")
    return ConfigurationError(
        f"cannot {what}: the cluster refuses it, {cause.name()}: {cause.str()}. Change the contract or "
        "STREAMFORGE_REPLICATION_FACTOR"
    )
