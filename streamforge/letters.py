"""Dead letters together: each counted once, and what was decided about it.

A letter is known by the record that was refused and who refused it: (topic id, topic-partition, offset, index,
processor). Dead letters are at least once, so several records of a `<topic>.dlq` may be one letter. It is open until
a decision about it lies in the topic `letter-decisions`: redriven (`streamforge.lakehouse.redrive`) or discarded. The
latest decision counts; nothing is ever deleted.

Memory: some 1,000 bytes a letter; payloads are not kept.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import msgspec
from confluent_kafka import Message

from streamforge.contract_model import Contracts
from streamforge.dead_letters import UNREADABLE, readable
from streamforge.errors import ConfigurationError, RetryableSourceError
from streamforge.letter_decisions import DecisionKind, LetterDecision, latest_decisions, record_decisions
from streamforge.log_reader import Progress, read_records_at, read_topics
from streamforge.market.records import DeadLetter
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings

DLQ_SUFFIX = ".dlq"
_ID_BYTES = 8
_LETTER = msgspec.json.Decoder(DeadLetter)


class LetterState(StrEnum):
    """How a letter stands."""

    OPEN = "open"
    REDRIVEN = "redriven"
    DISCARDED = "discarded"


class RawPlace(msgspec.Struct, frozen=True):
    """Where the raw record of a typed record lies, as the typed record says."""

    raw_topic_id: str
    raw_partition: int
    raw_offset: int
    raw_index: int


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    Args:
        topic: topic of the refused record.
        topic_id: Kafka's id of that topic.
        index: place in the record, 0 where the record as a whole was refused.
        processor: kind of process that refused it.
        reason: short code; of the last record about it.
        first_ns: when it was first refused, nanoseconds since 1970 UTC.
        last_ns: when it was last refused.
        records: dead-letter records about it.
        kept_at: topic-partition and offset of the last of them.
        raw: its raw record, where the refused record is a typed one that can be read so far.
        decision: the latest about it; None: it is open.
    """

    topic: str
    topic_id: str
    partition: int
    offset: int
    index: int
    processor: str
    reason: str
    first_ns: int
    last_ns: int
    records: int
    kept_at: tuple[TopicPartition, int]
    raw: RawPlace | None = None
    decision: LetterDecision | None = None

    @property
    def letter_id(self) -> str:
        """Return its short name: the same for every record about it."""
        identity = f"{self.topic_id} {self.partition} {self.offset} {self.index} {self.processor}"
        return hashlib.blake2b(identity.encode(), digest_size=_ID_BYTES).hexdigest()

    @property
    def state(self) -> LetterState:
        """Return how it stands."""
        return LetterState.OPEN if self.decision is None else LetterState(self.decision.decision)

    @property
    def place(self) -> str:
        """Return where the refused record lies, for people."""
        return f"{self.topic}-{self.partition} offset {self.offset} index {self.index}"


@dataclass(frozen=True, slots=True)
class Letters:
    """Every letter, oldest first, and how many records of the dead-letter topics are none."""

    letters: Sequence[Letter]
    unreadable: int


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which letters are meant; what is not given says nothing, and several things must all hold.

    Args:
        ids: ids, or beginnings of ids.
        topics: full names of topics of refused records.
    """

    ids: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    partition: int | None = None
    offset: int | None = None
    reason: str | None = None
    processor: str | None = None
    states: Collection[LetterState] = field(default_factory=lambda: frozenset(LetterState))

    def matches(self, letter: Letter) -> bool:
        """Return whether `letter` is meant."""
        return (
            (not self.ids or letter.letter_id.startswith(self.ids))
            and (not self.topics or letter.topic in self.topics)
            and self.partition in (None, letter.partition)
            and self.offset in (None, letter.offset)
            and self.reason in (None, letter.reason)
            and self.processor in (None, letter.processor)
            and letter.state in self.states
        )


@dataclass(frozen=True, slots=True)
class LetterCount:
    """Letters of one kind in one state; times in nanoseconds since 1970 UTC."""

    topic: str
    reason: str
    processor: str
    state: LetterState
    letters: int
    first_ns: int
    last_ns: int


def read_letters(
    settings: Settings,
    contracts: Contracts,
    wanted: LetterFilter | None = None,
    *,
    progress: Progress = lambda *_: None,
) -> Letters:
    """Read every dead-letter topic that exists, and the decisions; return the letters that are meant.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    by_id: dict[str, Letter] = {}
    unreadable = 0
    for message, record in dead_letters(settings, dead_letter_topics(contracts), progress=progress):
        if record is None:
            unreadable += 1
            continue
        letter = letter_from(message, record)
        by_id[letter.letter_id] = merged(by_id.get(letter.letter_id), letter)
    for letter_id, decision in latest_decisions(settings, contracts).items():
        if letter_id in by_id:
            by_id[letter_id] = replace(by_id[letter_id], decision=decision)
    found = [each for each in by_id.values() if wanted is None or wanted.matches(each)]
    return Letters(sorted(found, key=lambda each: (each.first_ns, each.place, each.processor)), unreadable)


def dead_letters(
    settings: Settings, topics: Iterable[str], *, progress: Progress = lambda *_: None
) -> Iterator[tuple[Message, DeadLetter | None]]:
    """Yield every record of dead-letter topics, and the letter in it; None where it is not one of ours.

    Topics that do not exist are passed over.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    for message in read_topics(settings, topics, progress=progress):
        try:
            yield message, _LETTER.decode(message.value() or b"")
        except UNREADABLE:
            yield message, None


def dead_letter_topics(contracts: Contracts) -> list[str]:
    """Return the names of the dead-letter topics that the contracts ask for."""
    return [item.topic.name for item in contracts.with_topic if item.id.endswith(DLQ_SUFFIX) and item.topic is not None]


def read_dead_letter(settings: Settings, letter: Letter) -> DeadLetter:
    """Return the whole of the last record about `letter`.

    Raises:
        RetryableSourceError: the broker does not answer, or retention has just removed it.
    """
    found = read_records_at(settings, [letter.kept_at])
    if letter.kept_at not in found:
        msg = f"{letter.kept_at[0]} has no record at offset {letter.kept_at[1]} any more: retention has removed it"
        raise RetryableSourceError(msg)
    return _LETTER.decode(found[letter.kept_at].value() or b"")


def payload_of(record: DeadLetter) -> tuple[str, str]:
    """Return the bytes of a refused record as a person can read them, and how (see `readable`)."""
    try:
        return readable(base64.b64decode(record.payload_base64))
    except ValueError:
        return record.payload_base64, "not base64"


def letter_of(letters: Sequence[Letter], asked: str) -> Letter:
    """Return the only letter that `asked` means, an id or the beginning of one.

    Raises:
        ConfigurationError: it means none, or several.
    """
    found = [each for each in letters if each.letter_id.startswith(asked)]
    if len(found) != 1:
        which = ", ".join(each.letter_id for each in found[:3]) if asked else "every letter"
        said = f"means {len(found)}: {which}" if found else "means none"
        msg = f"{asked!r} {said}. An id stands in `streamforge dlq list`; its first letters are enough where they tell"
        raise ConfigurationError(msg)
    return found[0]


def chosen(letters: Sequence[Letter], ids: Iterable[str] = ()) -> list[Letter]:
    """Return the letters to decide about: those named by id, in any state; where none is named, the open ones.

    Raises:
        ConfigurationError: an id means none of them, or several.
    """
    named = {each.letter_id: each for each in (letter_of(letters, text) for text in ids)}
    return list(named.values()) or [each for each in letters if each.state is LetterState.OPEN]


def count_letters(letters: Iterable[Letter]) -> list[LetterCount]:
    """Count letters by topic, reason, processor and state."""
    groups: dict[tuple[str, str, str, LetterState], list[Letter]] = {}
    for each in letters:
        groups.setdefault((each.topic, each.reason, each.processor, each.state), []).append(each)
    return [
        LetterCount(*kind, len(group), min(each.first_ns for each in group), max(each.last_ns for each in group))
        for kind, group in sorted(groups.items())
    ]


def count_states(letters: Iterable[Letter]) -> dict[str, int]:
    """Count letters by state, with a 0 for each that has none."""
    counts = Counter(str(each.state) for each in letters)
    return {str(state): counts[str(state)] for state in LetterState}


def topic_names(contracts: Contracts, asked: Iterable[str]) -> tuple[str, ...]:
    """Return full topic names for contract ids or full names, with or without `.dlq` behind.

    Raises:
        ConfigurationError: there is no such topic with dead letters; names those that are.
    """
    known = {
        item.id.removesuffix(DLQ_SUFFIX): item.topic.name.removesuffix(DLQ_SUFFIX)
        for item in contracts.with_topic
        if item.id.endswith(DLQ_SUFFIX) and item.topic is not None
    }
    found = []
    for text in asked:
        name = text.removesuffix(DLQ_SUFFIX)
        if name not in known and name not in known.values():
            msg = f"no topic {text!r} has dead letters; topics are: {', '.join(sorted(known))}"
            raise ConfigurationError(msg)
        found.append(known.get(name, name))
    return tuple(found)


def discard(
    settings: Settings,
    contracts: Contracts,
    letters: Iterable[Letter],
    *,
    who: str,
    why: str,
    clock_ns: Callable[[], int] = time.time_ns,
) -> list[LetterDecision]:
    """Record that letters were discarded; they stay where they are, and so do their records.

    Raises:
        ConfigurationError: nobody, or no reason.
        RetryableSourceError: the broker does not answer; some may be recorded.
    """
    if not (who.strip() and why.strip()):
        msg = "a letter is discarded by somebody, for a reason: --reason and --who must say something"
        raise ConfigurationError(msg)
    decisions = [
        decision_about(each, DecisionKind.DISCARDED, who=who, why=why, ts_decided_ns=clock_ns()) for each in letters
    ]
    record_decisions(settings, contracts, decisions)
    return decisions


def decision_about(
    letter: Letter, decision: DecisionKind, *, who: str, why: str, ts_decided_ns: int, commit_id: str | None = None
) -> LetterDecision:
    """Return a decision about `letter`."""
    return LetterDecision(
        letter_id=letter.letter_id,
        decision=decision,
        topic=letter.topic,
        topic_id=letter.topic_id,
        record_partition=letter.partition,
        record_offset=letter.offset,
        record_index=letter.index,
        processor=letter.processor,
        reason=letter.reason,
        why=why,
        who=who,
        redrive_commit_id=commit_id,
        ts_decided_ns=ts_decided_ns,
    )


def letter_from(message: Message, record: DeadLetter) -> Letter:
    """Return the letter in one record of a dead-letter topic."""
    return Letter(
        topic=record.topic,
        topic_id=record.topic_id,
        partition=record.partition,
        offset=record.offset,
        index=record.index,
        processor=record.processor,
        reason=record.reason,
        first_ns=record.ts_ns,
        last_ns=record.ts_ns,
        records=1,
        kept_at=(TopicPartition(message.topic() or "", message.partition() or 0), message.offset() or 0),
        raw=_raw_place(record),
    )


def merged(known: Letter | None, letter: Letter) -> Letter:
    """Return one letter from two records about it: what the later one says, and how often and since when."""
    if known is None:
        return letter
    last = letter if letter.last_ns >= known.last_ns else known
    first_ns = min(known.first_ns, letter.first_ns)
    return replace(last, first_ns=first_ns, records=known.records + letter.records)


def _raw_place(record: DeadLetter) -> RawPlace | None:
    """Return where a typed record says that its raw record lies; None where it cannot be read so far."""
    try:
        return msgspec.json.decode(base64.b64decode(record.payload_base64), type=RawPlace)
    except UNREADABLE:
        return None
