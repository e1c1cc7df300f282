"""What a transactional processor is made of: its step, and the values that go in and out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import msgspec
from confluent_kafka import Message

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Source:
    """The topic-partition that records come from, with Kafka's topic id."""

    topic: str
    topic_id: str
    partition: int


@dataclass(frozen=True, slots=True)
class Output:
    """One record to write: the contract of its topic, key and value."""

    contract_id: str
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """One record, or one event of it, that cannot be processed."""

    message: Message
    index: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """What records of one topic-partition gave.

    Args:
        state: the state after them.
        outputs: records to write, in order.
        changed: keys of the state that have to be saved.
        refused: what goes to the dead letters.
        counters: `duplicates`, and `skipped.<reason>`.
        ts_event_ns: latest event time, None where nothing had one.
    """

    state: S
    outputs: Sequence[Output] = ()
    changed: Collection[str] = ()
    refused: Sequence[Refused] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    ts_event_ns: int | None = None


class Processor(Protocol[S]):
    """A pure step from records and state to outputs and state; one state for each topic-partition."""

    kind: str
    input_id: str
    changelog_id: str
    output_ids: Sequence[str]

    def restore(self, saved: Mapping[str, str]) -> S:
        """Return the state of one topic-partition from its saved texts by state key; empty for a new one."""

    def save(self, state: S, key: str) -> str | None:
        """Return the text of one state key, None where it no longer exists."""

    def process(self, state: S, source: Source, messages: Sequence[Message]) -> Step[S]:
        """Take in records of one topic-partition, in offset order."""


@dataclass(frozen=True, slots=True)
class TransactionOptions:
    """How often and how long.

    Args:
        commit_interval_s: seconds from the first record of a transaction to its commit.
        commit_records: records that end a transaction before that.
        idle_commit_interval_s: seconds until a position that moved without records (markers) is committed.
        transaction_timeout_ms: after which the broker aborts a transaction; below the session timeout, so
            that whoever takes over from a dead slot need not wait for it.
        takeover_timeout_s: longest wait for stable offsets, and for the changelog's end, seconds.
    """

    commit_interval_s: float = 0.2
    commit_records: int = 20_000
    idle_commit_interval_s: float = 1.0
    transaction_timeout_ms: int = 30_000
    takeover_timeout_s: float = 90.0


class ChangelogRecord(msgspec.Struct, frozen=True):
    """One record of a changelog topic; fields as in its contract."""

    state_key: str
    next_offset: int
    state: str
    processor_version: str
    input_topic_id: str | None = None
