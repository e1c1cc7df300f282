"""What the writer refuses to do: go on with another topic of that name, claim over its heir, pass a letter in doubt."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

from streamforge.contracts import Contracts
from streamforge.errors import FencedError
from streamforge.events import CommandKind, ProcessState
from streamforge.kafka import producer_config
from streamforge.lakehouse.catalog import open_catalog
from streamforge.lakehouse.commit import PositionsMovedError
from streamforge.lakehouse.table_writer import TableWriter
from streamforge.log_reader import log_starts
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import send_command, topic_of, wait_for_answer
from streaming import writer as writer_module
from tests.conftest import MakeTopics
from tests.lax_catalog import let_the_last_write_win
from tests.waiting import wait_until
from tests.writer_support import (
    TRADE_TOPICS,
    WriterThread,
    next_offsets,
    produce,
    recreate_topic,
    running_writer,
    table_identities,
    topic_identities,
    trades,
    wait_for_landed,
    writer_settings,
)

pytestmark = pytest.mark.integration


def test_topic_made_anew_while_the_writer_is_paused_is_refused_with_both_ids(
    platform: Settings, make_topics: MakeTopics, admin: AdminClient, capfd: pytest.CaptureFixture[str]
) -> None:
    """The new topic reaches past the old `next_offset`s, so no offset is out of range and only the id tells."""
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades")
    produce(settings, topic.name, trades(20))
    with running_writer(settings, contracts) as writer:
        wait_for_landed(settings, contracts, topic.name, writer=writer)
        landed = table_identities(settings, contracts)
        assert _tell(settings, contracts, CommandKind.PAUSE) is ProcessState.PAUSED
        before, after = recreate_topic(admin, topic.name, topic.partitions)
        for number in range(3):
            produce(settings, topic.name, trades(20, start=1_000 + 20 * number))
        send_command(settings, contracts, target="writer", command=CommandKind.RESUME, issued_by="test")
        assert writer.join(60) == 1
    said = "".join(capfd.readouterr())
    assert all(text in said for text in (before, after, "streamforge rebind"))
    assert table_identities(settings, contracts) == landed


@pytest.mark.parametrize("store", ["local"], indirect=True)  # what is patched is the client of SQL catalogs
def test_catalog_where_the_last_write_wins_is_refused_before_anything_is_claimed(
    platform: Settings, make_topics: MakeTopics, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    let_the_last_write_win(monkeypatch)
    contracts = make_topics(*TRADE_TOPICS)
    with running_writer(writer_settings(platform), contracts) as writer:
        assert writer.join() == 1
    assert "does not compare and set" in "".join(capfd.readouterr())
    assert open_catalog(platform).list_tables(platform.namespace) == []


def test_dead_letter_behind_a_full_queue_is_waited_for(
    platform: Settings, make_topics: MakeTopics, admin: AdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue holds one letter: the second waits for the first, and is itself refused by the broker."""

    def tiny_queue(settings: Settings, **extra: Any) -> dict[str, Any]:
        tiny: dict[str, Any] = {"queue.buffering.max.messages": 1, "linger.ms": 10_000}
        return producer_config(settings, **extra, **tiny)

    monkeypatch.setattr(writer_module, "producer_config", tiny_queue)
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic, letters = topic_of(contracts, "trades").name, topic_of(contracts, "trades.dlq").name
    limit = ConfigEntry("max.message.bytes", "4096", incremental_operation=AlterConfigOpType.SET)
    for future in admin.incremental_alter_configs(
        [ConfigResource(ConfigResource.Type.TOPIC, letters, incremental_configs=[limit])]
    ).values():
        future.result()
    produce(settings, topic, [*trades(5), b"{", b"{" + os.urandom(8_192)], partitions=1)
    with running_writer(settings, contracts) as writer:
        assert writer.join(60) == 1
    assert set(next_offsets(settings, contracts).values()) == {0}
    assert sum(topic_identities(settings, letters).values()) == 1


def test_process_that_stood_still_after_its_assignment_does_not_claim_over_its_heir(
    platform: Settings, make_topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the owner epochs only after the heir has claimed: the group alone can tell that it is late."""
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    produce(settings, topic, trades(10))
    assigned, thawed = threading.Event(), threading.Event()
    real = log_starts

    def stand_still(*arguments: Any) -> Mapping[TopicPartition, int]:
        if not assigned.is_set():
            assigned.set()
            assert thawed.wait(60)
        return real(*arguments)

    monkeypatch.setattr(writer_module, "log_starts", stand_still)
    frozen = WriterThread(settings, contracts).start()
    try:
        wait_until(assigned.is_set, what="the first writer is assigned")
        with running_writer(settings, contracts) as heir:
            wait_for_landed(settings, contracts, topic, writer=heir)
            thawed.set()
            assert frozen.join(60) == 3
            produce(settings, topic, trades(10, start=10))
            wait_for_landed(settings, contracts, topic, writer=heir)
    finally:
        thawed.set()
        frozen.stop()
    assert heir.exit_code == 0
    assert table_identities(settings, contracts) == topic_identities(settings, topic)


def test_batch_forgotten_but_not_sought_stops_the_writer(
    platform: Settings, make_topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name

    class Unseekable:
        """The worker's consumer, whose seeks fail."""

        def __init__(self, consumer: Consumer) -> None:
            self._consumer = consumer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._consumer, name)

        def seek(self, _partition: object) -> None:
            raise KafkaException(KafkaError(KafkaError._STATE, "not now"))

    def elsewhere(_: TableWriter) -> None:
        msg = "the table is elsewhere"
        raise PositionsMovedError(msg)

    produce(settings, topic, trades(10))
    with monkeypatch.context() as patch:
        patch.setattr(TableWriter, "commit", elsewhere)
        patch.setattr(writer_module.WriterWorker, "_opened", lambda worker: Unseekable(worker._consumer))
        with running_writer(settings, contracts) as writer:
            assert writer.join(60) == 1
    with running_writer(settings, contracts) as again:
        wait_for_landed(settings, contracts, topic, writer=again)
    assert table_identities(settings, contracts) == topic_identities(settings, topic)


def test_error_in_the_revocation_of_the_close_keeps_its_exit_code(platform: Settings, make_topics: MakeTopics) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    produce(settings, topic, trades(4))
    writer = WriterThread(settings, contracts)

    def revoked(partitions: Sequence[TopicPartition], *, lost: bool) -> None:
        assert partitions
        msg = f"another has claimed, lost={lost}"
        raise FencedError(msg)

    writer.worker.revoked = revoked  # type: ignore[method-assign]
    writer.start()
    try:
        wait_for_landed(settings, contracts, topic, writer=writer)
    finally:
        code = writer.stop()
    assert code == 3


def _tell(settings: Settings, contracts: Contracts, command: CommandKind) -> ProcessState:
    sent = send_command(settings, contracts, target="writer", command=command, issued_by="test")
    return wait_for_answer(settings, contracts, sent).state
