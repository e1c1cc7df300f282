"""Take over topic-partitions of a transactional processor: stable positions first, then the state.

The other order loses the last transaction of a zombie: state read before its commit, positions after it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from confluent_kafka import Consumer, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streamforge.contracts import Contracts, TopicSettings
from streamforge.errors import (
    CommitError,
    ContractError,
    PermanentSourceError,
    TopicIdentityError,
)
from streamforge.kafka import admin_client, describe_topics
from streamforge.log_reader import log_ends, log_starts, read_range
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.retention_gaps import ConsumerKind
from streamforge.settings import Settings
from streamforge.supervision import ProcessIdentity
from streaming.kafka_errors import is_passing, kafka_error
from streaming.processors.types import ChangelogRecord
from streaming.retention import Retention

_CALL_TIMEOUT_S = 10.0
_CHANGELOG_DECODER = msgspec.json.Decoder(ChangelogRecord)


@dataclass(frozen=True, slots=True)
class Takeover:
    """How to take over topic-partitions of `input_topic` whose state lies in `changelog`.

    Args:
        settings: which cluster.
        input_topic: topic that is processed.
        changelog: its state, on the same topic-partition numbers.
        timeout_s: longest wait for stable offsets, and for the changelog's end, seconds.
    """

    settings: Settings
    input_topic: TopicSettings
    changelog: TopicSettings
    timeout_s: float

    def topic_id(self) -> str:
        """Return Kafka's id of the input topic.

        Raises:
            PermanentSourceError: there is no such topic.
        """
        name = self.input_topic.name
        identity = describe_topics(admin_client(self.settings), [name]).get(name)
        if identity is None:
            msg = f"topic {name} does not exist. Create the topics with `streamforge contracts apply`"
            raise PermanentSourceError(msg)
        return identity.topic_id

    def positions(
        self, consumer: Consumer, partitions: Sequence[TopicPartition], topic_id: str
    ) -> dict[TopicPartition, int]:
        """Return the stable committed offset of each topic-partition, the log start where there is none.

        Raises:
            TopicIdentityError: an offset was committed for a topic of this name with another id.
            RetryableSourceError: an open transaction or the broker kept the answer back for `timeout_s`.
        """
        found = self._committed(consumer, partitions)
        for each in found:
            if each.offset >= 0 and each.metadata and each.metadata != topic_id:
                what = f"the committed offset {each.offset}"
                raise self._made_anew(TopicPartition(each.topic, each.partition), what, each.metadata, topic_id)
        starts = {TopicPartition(each.topic, each.partition): each.offset for each in found if each.offset >= 0}
        return starts | log_starts(self.settings, [item for item in partitions if item not in starts])

    def within_log(
        self, starts: Mapping[TopicPartition, int], topic_id: str, retention: Retention, metrics: ProcessMetrics
    ) -> dict[TopicPartition, int]:
        """Return `starts`, moved to the log start where retention has removed more and that is accepted.

        Raises:
            RetentionGapError: it has, and it is not.
            CommitError: it is, but cannot be recorded.
        """
        first = log_starts(self.settings, starts)
        removed = [
            OffsetRange(item.topic, item.partition, start, first[item])
            for item, start in sorted(starts.items())
            if start < first[item]
        ]
        retention.pass_over(removed, metrics, topic_id=topic_id)
        return {**starts, **{gap.topic_partition: gap.end for gap in removed}}

    def states(self, starts: Mapping[TopicPartition, int], topic_id: str) -> dict[TopicPartition, dict[str, str]]:
        """Return the saved texts by state key of each topic-partition, as of the end of the changelog.

        Kafka forgets a group's offsets with the topic, so it is the state that tells a topic made anew.

        Raises:
            TopicIdentityError: a state belongs to a topic of this name with another id.
            CommitError: a state belongs to a later position than the one to start from.
            ContractError: a changelog record is not one.
            RetryableSourceError: the end was not reached within `timeout_s`.
        """
        inputs = {TopicPartition(self.changelog.name, item.partition): item for item in starts}
        ends = log_ends(self.settings, inputs)
        begins = log_starts(self.settings, inputs)
        found: dict[TopicPartition, dict[str, ChangelogRecord]] = {item: {} for item in starts}
        for messages in read_range(self.settings, begins, ends, timeout_s=self.timeout_s):
            for message in messages:
                partition = message.partition() or 0
                records = found[inputs[TopicPartition(self.changelog.name, partition)]]
                value = message.value()
                if value is None:
                    records.pop((message.key() or b"").decode(), None)
                    continue
                try:
                    record = _CHANGELOG_DECODER.decode(value)
                except msgspec.MsgspecError as error:
                    where = f"{self.changelog.name}-{partition}, offset {message.offset()}"
                    msg = f"{where}: not a changelog record: {error}. Delete the topic to start over"
                    raise ContractError(msg) from error
                records[record.state_key] = record
        for item, records in found.items():
            for record in records.values():
                self._check(item, record, starts[item], topic_id)
        return {item: {r.state_key: r.state for r in records.values()} for item, records in found.items()}

    def _committed(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> list[KafkaTopicPartition]:
        wanted = [KafkaTopicPartition(item.topic, item.partition) for item in partitions]
        deadline_s = time.monotonic() + self.timeout_s
        while True:
            try:
                found = consumer.committed(wanted, _CALL_TIMEOUT_S)
                failure = next((each.error for each in found if each.error is not None), None)
            except KafkaException as error:
                failure = error.args[0]
            if failure is None:
                return found
            if not is_passing(failure) or time.monotonic() > deadline_s:
                names = ", ".join(str(item) for item in partitions)
                raise kafka_error(f"the committed offsets of {names} cannot be read", failure)

    def _check(self, item: TopicPartition, record: ChangelogRecord, start: int, topic_id: str) -> None:
        if record.input_topic_id is not None and record.input_topic_id != topic_id:
            what = f"state {record.state_key!r} in {self.changelog.name}-{item.partition}"
            raise self._made_anew(item, what, record.input_topic_id, topic_id)
        if record.next_offset <= start:
            return
        msg = (
            f"{item}: state {record.state_key!r} in {self.changelog.name}-{item.partition} belongs to position "
            f"{record.next_offset}, but the position to start from is {start}: the group's offset was moved or "
            f"has expired. Set it to {record.next_offset} to go on. To process everything again instead, delete "
            f"both the topic {self.changelog.name} and the group's offsets of {item.topic}"
        )
        raise CommitError(msg)

    def _made_anew(self, item: TopicPartition, what: str, known: str, found: str) -> TopicIdentityError:
        return TopicIdentityError(
            f"{item}: {what} belongs to topic id {known}, the topic now has {found}: it was made anew. To start "
            f"over with the new one, delete both the topic {self.changelog.name} (then `streamforge contracts apply`) "
            f"and the group's offsets of {item.topic}; one without the other gives wrong results"
        )


def retention_of(kind: str, settings: Settings, contracts: Contracts, topic: TopicSettings, *, slot: str) -> Retention:
    """Return how a processor deals with what retention has removed of its input."""
    return Retention(
        settings,
        contracts,
        ConsumerKind.GROUP,
        f"{settings.topic_prefix}{kind}",
        topic,
        who=ProcessIdentity.of_this_process(kind, slot).owner(settings.topic_prefix),
        accepts=settings.processor_accept_retention_gap,
        advice="Nothing brings them back into this topic. To go on at the log start without them, set "
        "STREAMFORGE_PROCESSOR_ACCEPT_RETENTION_GAP=true; a table that is made from a raw table which still has them "
        "gets their rows by `streamforge replay`",
    )
