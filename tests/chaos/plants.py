"""Bugs of the commit protocol, planted into the harness's processes from outside: each has to be found.

They patch the running code and exist nowhere in the product. `wrong_parser` is no bug of the protocol: a replay with it
spoils rows on purpose, so that the replay after it has something to mend.
"""

# ruff: noqa: PLC0415 - what is imported early cannot be patched any more

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import TopicPartition as KafkaTopicPartition


def plant(name: str) -> None:
    """Plant a bug into this process."""
    PLANTS[name]()


def _no_compare() -> None:
    """Leave the comparison before a commit out: whoever is late is rebased onto what others wrote."""
    from streamforge.lakehouse import commit

    commit.check_batch = lambda *_: None


def _no_fence() -> None:
    """Leave out of the comparison whose the topic-partitions are and where they stand, on the first attempt only."""
    from streamforge.lakehouse import commit

    original = commit.check_batch
    seen: set[int] = set()

    def first_attempt_is_free(view: Any, batch: Any) -> None:
        if id(batch) in seen:
            original(view, batch)
        seen.add(id(batch))

    commit.check_batch = first_attempt_is_free


def _unknown_is_failure() -> None:
    """Take an unknown outcome for a failure: the batch is sent again, as new files on fresh metadata."""
    from streamforge.errors import CommitConflictError, CommitUnknownError
    from streamforge.lakehouse import commit

    send = commit.send_once

    def send_again(table: Any, updates: Any, requirements: Any) -> Any:
        try:
            return send(table, updates, requirements)
        except (CommitUnknownError, CommitConflictError):
            failed.append(table.name())
            raise

    failed: list[Any] = []
    batch_of = commit.commit_batch

    def batch_again(table: Any, batch: Any, **named: Any) -> Any:
        failed.clear()
        try:
            landed = batch_of(table, batch, **named)
        except commit.PositionsMovedError:
            landed = None
        if failed and table.name() in failed:
            check = commit.check_batch
            commit.check_batch = lambda *_: None
            try:
                return batch_of(commit.refresh(table), batch, **named)
            finally:
                commit.check_batch = check
        return landed

    commit.send_once, commit.commit_batch = send_again, batch_again


def _group_offsets() -> None:
    """Start from the offsets of the consumer group, and believe them also when committing."""
    from streamforge.lakehouse import commit
    from streamforge.lakehouse.protocol import Verdict
    from streamforge.offsets import TopicPartition
    from streaming import writer

    assigned, raise_unless = writer.WriterWorker.assigned, commit._raise_unless_clear

    def from_the_group(self: Any, partitions: Sequence[Any]) -> Any:
        starts = dict(assigned(self, partitions))
        wanted = [KafkaTopicPartition(item.topic, item.partition) for item in partitions]
        for found in self._consumer.committed(wanted, 10.0):
            item = TopicPartition(found.topic, found.partition)
            if found.offset >= 0:
                starts[item] = found.offset
                held = self._writers[item.topic]._held[item.partition]
                held.start = held.end = found.offset
        return starts

    def believe(view: Any, found: Any, identity: Any) -> None:
        if found.verdict is not Verdict.MOVED:
            raise_unless(view, found, identity)

    writer.WriterWorker.assigned = from_the_group  # type: ignore[method-assign]
    writer.WriterWorker._confirm_assignment = lambda *_: None  # type: ignore[method-assign]
    commit._raise_unless_clear = believe


def _offsets_outside() -> None:
    """Let processors commit their offsets by the consumer, before the transaction and not in it."""
    from streaming.processors import base

    def send_offsets(self: Any) -> None:
        offsets = [
            KafkaTopicPartition(item.topic, item.partition, offset, metadata=self._sources[item].topic_id)
            for item, offset in self._pending.positions.items()
        ]
        self._consumer.commit(offsets=offsets, asynchronous=False)

    base.TransactionalWorker._send_offsets = send_offsets  # type: ignore[method-assign]


def _gap_untold() -> None:
    """Let the loader keep what it missed to itself."""
    from streaming.loaders import sink

    sink.RawSink._gap = lambda *_: None  # type: ignore[method-assign]


def _wrong_parser() -> None:
    """Invert the aggressor's side of every trade that a replay makes."""
    from streamforge.lakehouse import remake
    from tests.replay_support import inverted

    remake.parse_records = inverted(lambda _: True)  # type: ignore[assignment, attr-defined]


PLANTS: Mapping[str, Callable[[], None]] = {
    "no_compare": _no_compare,
    "no_first_compare": _no_fence,
    "unknown_is_failure": _unknown_is_failure,
    "group_offsets": _group_offsets,
    "offsets_outside": _offsets_outside,
    "gap_untold": _gap_untold,
    "wrong_parser": _wrong_parser,
}
