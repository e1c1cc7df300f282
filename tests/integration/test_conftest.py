"""The fixtures themselves: topics of a test are its own, with the partitions it asked for."""

from __future__ import annotations

import pytest

from streamforge.kafka import admin_client, describe_topics
from streamforge.settings import Settings
from tests.conftest import MakeTopics

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("partitions", [1, 3])
def test_make_topics_creates_prefixed_topics_with_few_partitions(
    platform: Settings, make_topics: MakeTopics, partitions: int
) -> None:
    contracts = make_topics("trades", "bars", partitions=partitions)
    names = [topic.name for topic in (contracts["trades"].topic, contracts["bars"].topic) if topic is not None]
    assert all(name.startswith(platform.topic_prefix) for name in names)
    found = describe_topics(admin_client(platform), names)
    assert {name: identity.partitions for name, identity in found.items()} == dict.fromkeys(names, partitions)
