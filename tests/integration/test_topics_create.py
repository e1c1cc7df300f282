"""Topics on a real broker are made and altered as their contracts say; what cannot be altered is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType  # type: ignore[attr-defined]

from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import ConfigurationError, RetryableSourceError, SchemaMismatchError
from streamforge.kafka import describe_topics
from streamforge.settings import Settings
from streamforge.topics import TopicAction, create_topics, plan_topics
from tests.kafka_records import create_topic
from tests.waiting import wait_until

pytestmark = pytest.mark.integration
IDS = ("market-gaps", "queue-control")


@pytest.fixture
def contracts(platform: Settings) -> Contracts:
    return load_contracts(platform.contracts_dir, topic_prefix=platform.topic_prefix)


def _with_topic(contracts: Contracts, contract_id: str, **changes: Any) -> Contracts:
    contract = contracts[contract_id]
    assert contract.topic is not None
    return Contracts({**contracts, contract_id: replace(contract, topic=replace(contract.topic, **changes))})


def _config(admin: AdminClient, topic: str) -> dict[str, str | None]:
    [future] = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    return {name: entry.value for name, entry in future.result().items()}


def test_missing_topics_are_made_as_their_contracts_say(
    platform: Settings, admin: AdminClient, contracts: Contracts
) -> None:
    plan = plan_topics(platform, contracts, IDS)
    assert [change.action for change in plan.changes] == [TopicAction.CREATE] * 2
    create_topics(platform, contracts, IDS)
    for contract_id in IDS:
        topic = contracts[contract_id].topic
        assert topic is not None
        found = describe_topics(admin, [topic.name])[topic.name]
        assert found.partitions == topic.partitions
        config = _config(admin, topic.name)
        assert {name: config[name] for name in topic.config} == topic.config
    assert plan_topics(platform, contracts, IDS).is_empty
    assert create_topics(platform, contracts, IDS).is_empty


def test_settings_that_differ_are_altered_and_topic_and_other_settings_stay(
    platform: Settings, admin: AdminClient, contracts: Contracts
) -> None:
    create_topics(platform, contracts, ["market-gaps"])
    topic = contracts["market-gaps"].topic
    assert topic is not None
    before = describe_topics(admin, [topic.name])[topic.name].topic_id
    longer = _with_topic(contracts, "market-gaps", retention_ms=topic.retention_ms * 2)
    [change] = plan_topics(platform, longer, ["market-gaps"]).changes
    assert dict(change.config) == {"retention.ms": (str(topic.retention_ms), str(topic.retention_ms * 2))}
    assert create_topics(platform, longer, ["market-gaps"]).with_action(TopicAction.ALTER)
    config = _config(admin, topic.name)
    assert config["retention.ms"] == str(topic.retention_ms * 2)
    assert config["max.message.bytes"] == topic.config["max.message.bytes"]
    assert describe_topics(admin, [topic.name])[topic.name].topic_id == before


@pytest.mark.parametrize("partitions", [2, 8])
def test_another_partition_count_of_a_keyed_topic_is_refused_and_nothing_is_made(
    platform: Settings, admin: AdminClient, contracts: Contracts, partitions: int
) -> None:
    create_topics(platform, contracts, ["market-gaps"])
    changed = _with_topic(contracts, "market-gaps", partitions=partitions)
    with pytest.raises(SchemaMismatchError, match=f"has 4 partitions, its contract says {partitions}"):
        create_topics(platform, changed, IDS)
    other = contracts["queue-control"].topic
    assert other is not None
    assert not describe_topics(admin, [other.name])


def test_compaction_is_never_switched_on_a_live_topic(platform: Settings, contracts: Contracts) -> None:
    create_topics(platform, contracts, ["queue-control"])
    changed = _with_topic(contracts, "queue-control", cleanup_policy="delete")
    with pytest.raises(SchemaMismatchError, match=r"cleanup\.policy=compact, its contract says delete"):
        create_topics(platform, changed, ["queue-control"])


def test_a_topic_without_keys_may_grow_and_never_shrink(
    platform: Settings, admin: AdminClient, contracts: Contracts
) -> None:
    keyless = _with_topic(contracts, "market-gaps", key=())
    create_topics(platform, keyless, ["market-gaps"])
    grown = _with_topic(keyless, "market-gaps", partitions=6)
    create_topics(platform, grown, ["market-gaps"])
    topic = grown["market-gaps"].topic
    assert topic is not None
    wait_until(lambda: describe_topics(admin, [topic.name])[topic.name].partitions == 6, what="6 partitions")
    with pytest.raises(SchemaMismatchError, match="has 6 partitions, its contract says 4"):
        create_topics(platform, keyless, ["market-gaps"])


def test_processes_that_start_together_all_succeed(platform: Settings, contracts: Contracts) -> None:
    with ThreadPoolExecutor(4) as executor:
        for future in [executor.submit(create_topics, platform, contracts, IDS) for _ in range(4)]:
            future.result(60)
    assert plan_topics(platform, contracts, IDS).is_empty


def test_a_topic_made_by_hand_with_other_partitions_is_refused(
    platform: Settings, admin: AdminClient, contracts: Contracts
) -> None:
    topic = contracts["market-gaps"].topic
    assert topic is not None
    create_topic(admin, topic.name, 1)
    [change] = plan_topics(platform, contracts, ["market-gaps"]).changes
    assert change.action is TopicAction.REFUSE


def test_more_replicas_than_brokers_are_refused_by_name(platform: Settings, contracts: Contracts) -> None:
    with pytest.raises(ConfigurationError, match="STREAMFORGE_REPLICATION_FACTOR"):
        create_topics(platform.model_copy(update={"replication_factor": 3}), contracts, ["market-gaps"])


@pytest.mark.parametrize(("ids", "said"), [(["nothing"], "no contract 'nothing'"), (["commits"], "has no topic")])
def test_bad_ids_are_refused(platform: Settings, contracts: Contracts, ids: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        create_topics(platform, contracts, ids)


def test_a_broker_that_is_away_is_retryable(
    platform: Settings, contracts: Contracts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streamforge.kafka.REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr("streamforge.topics.REQUEST_TIMEOUT_S", 1.0)
    away = platform.model_copy(update={"bootstrap_servers": "127.0.0.1:1", "home": tmp_path})
    with pytest.raises(RetryableSourceError, match="streamforge broker status"):
        plan_topics(away, contracts, IDS)
