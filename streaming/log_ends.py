"""Where the logs of held topic-partitions end, for the lag that a consumer tells."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future, wait

from confluent_kafka import Consumer, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition
from confluent_kafka.admin import AdminClient, ListOffsetsResultInfo  # type: ignore[attr-defined]

from streamforge.kafka import admin_client
from streamforge.log_reader import ask_log_ends
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings

_ANSWER_S = 1.0
"""Longest wait for the broker's answer, seconds; a later one is taken at the next question."""


class LogEnds:
    """Knows end offsets from fetches where there are any, and asks the broker where there are none.

    The end that librdkafka remembers moves with fetches only: it stands still while the consumer is paused, and
    there is none before the first fetch. An end never moves back, so the highest one heard of is the best known.

    Args:
        settings: which cluster.
        consumer: whose fetches tell ends.
    """

    def __init__(self, settings: Settings, consumer: Consumer) -> None:
        self._settings = settings
        self._consumer = consumer
        self._admin: AdminClient | None = None
        self._asked: Mapping[TopicPartition, Future[ListOffsetsResultInfo]] = {}
        self._known: dict[TopicPartition, int] = {}

    def of(self, items: Collection[TopicPartition], *, is_fetching: bool) -> dict[TopicPartition, int]:
        """Return the end offset of each of `items`; one that is not known yet is left out.

        It waits a second at most. While the broker does not answer, the ends known before are returned.
        """
        self._known = {item: self._known[item] for item in items if item in self._known}
        silent = [item for item in items if not is_fetching or not self._fetched(item)]
        if silent:
            self._ask(silent)
        return {item: self._known[item] for item in items if item in self._known}

    def _fetched(self, item: TopicPartition) -> bool:
        """Take the end that the last fetch told, which costs no request; return whether there is one."""
        try:
            _, end = self._consumer.get_watermark_offsets(KafkaTopicPartition(item.topic, item.partition), cached=True)
        except KafkaException:
            return False
        if end >= 0:
            self._learn(item, end)
        return end >= 0

    def _ask(self, items: Collection[TopicPartition]) -> None:
        if not self._asked:
            self._admin = self._admin or admin_client(self._settings)
            self._asked = ask_log_ends(self._admin, items)
        if wait(self._asked.values(), _ANSWER_S).not_done:
            return
        for item, answer in self._asked.items():
            if answer.exception() is None:
                self._learn(item, answer.result().offset)
        self._asked = {}

    def _learn(self, item: TopicPartition, end: int) -> None:
        self._known[item] = max(end, self._known.get(item, end))
