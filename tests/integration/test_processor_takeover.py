"""What a processor starts from: positions before states, and only those of the topic that is there."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge.events import EventKind
from streamforge.kafka import admin_client, consumer_config, describe_topics, producer_config, reader_config
from streamforge.offsets import TopicPartition
from streamforge.supervision import read_process_states
from streamforge.topics import create_topics
from streaming.processors.parser import Parser
from streaming.processors.types import ChangelogRecord
from tests.kafka_records import create_topic
from tests.pipeline_support import (
    INSTRUMENTS,
    PARTITIONS,
    Pipeline,
    RawFrame,
    WorkerThread,
    make_worker,
    produce_raw,
    running,
    trade_frame,
    wait_for_positions,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

STATE = "[0,0,10]"


def test_takeover_by_a_new_slot_takes_positions_before_states(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the old slot write its state and commit only after the heir has asked for its positions.

    States read before the positions would be those from before that transaction, beside positions from after it.
    """
    group, item = f"{pipeline.settings.topic_prefix}parser", TopicPartition(pipeline.topic("raw-trades"), 0)
    asked = threading.Event()

    class Heir(Consumer):
        def committed(self, *arguments: Any) -> list[KafkaTopicPartition]:
            asked.set()
            return super().committed(*arguments)

    saved: list[Mapping[str, str]] = []
    restore = Parser.restore

    def remember(parser: Parser, texts: Mapping[str, str]) -> Any:
        saved.append(dict(texts))
        return restore(parser, texts)

    monkeypatch.setattr(Parser, "restore", remember)
    old = Producer(producer_config(pipeline.settings, transactional_id=f"{group}.0"))
    old.init_transactions(30)
    old.begin_transaction()
    with Consumer(reader_config(pipeline.settings, **{"group.id": group})) as member:
        offsets = [KafkaTopicPartition(item.topic, item.partition, 10)]
        old.send_offsets_to_transaction(offsets, member.consumer_group_metadata(), 30)
    worker = make_worker(pipeline, "parser", slot="1")
    starts: list[Mapping[TopicPartition, int]] = []
    with Heir(consumer_config(pipeline.settings, group=group, slot="1")) as heir:
        worker.open(heir)
        takeover = threading.Thread(target=lambda: starts.append(worker.assigned([item])), daemon=True)
        takeover.start()
        wait_until(asked.is_set, what="the heir asks for its positions")
        record = ChangelogRecord(INSTRUMENTS[0], 10, STATE, "1")
        old.produce(pipeline.topic("parser-changelog"), msgspec.json.encode(record), INSTRUMENTS[0].encode(), 0)
        old.commit_transaction(30)
        takeover.join(60)
        worker.close()
    assert (starts, saved) == ([{item: 10}], [{INSTRUMENTS[0]: STATE}])


def test_input_topic_made_anew_is_refused_until_changelog_and_offsets_are_gone(pipeline: Pipeline) -> None:
    produce_raw(pipeline, [RawFrame(INSTRUMENTS[0], trade_frame(INSTRUMENTS[0], number)) for number in range(20)])
    with running(pipeline, "parser") as thread:
        wait_for_positions(pipeline, thread, "raw-trades")
    before = topic_id(pipeline, "raw-trades")
    delete_topic(pipeline, "raw-trades")
    after = create_topic(admin_client(pipeline.settings), pipeline.topic("raw-trades"), PARTITIONS)
    # As many records as before: the saved positions fit the new topic, only its id does not.
    produce_raw(pipeline, [RawFrame(INSTRUMENTS[0], trade_frame(INSTRUMENTS[0], number)) for number in range(50)])
    assert WorkerThread(pipeline, make_worker(pipeline, "parser")).join() == 1
    states = read_process_states(pipeline.settings, pipeline.contracts).values()
    [failed] = [event for event in states if event.event is EventKind.ERROR]
    for part in ("TopicIdentityError", str(before), after, pipeline.topic("parser-changelog"), "group's offsets"):
        assert part in failed.detail

    delete_topic(pipeline, "parser-changelog")
    create_topics(pipeline.settings, pipeline.contracts, ["parser-changelog"])
    with running(pipeline, "parser") as thread:
        wait_for_positions(pipeline, thread, "raw-trades")


def topic_id(pipeline: Pipeline, contract_id: str) -> str | None:
    name = pipeline.topic(contract_id)
    found = describe_topics(admin_client(pipeline.settings), [name]).get(name)
    return found.topic_id if found else None


def delete_topic(pipeline: Pipeline, contract_id: str) -> None:
    admin = admin_client(pipeline.settings)
    for gone in admin.delete_topics([pipeline.topic(contract_id)]).values():
        gone.result()
    wait_until(lambda: topic_id(pipeline, contract_id) is None, what=f"{contract_id} is gone")
