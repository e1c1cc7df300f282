"""Redrive: refused records are made rows again after a fix, by a replay of their original ranges.

A letter says which record was refused and by whom. What refuses on the way to a table says which table, and the
range that the replay needs:

    refused by                            replayed
    the processor that makes a table      that table, the range of the record itself (`trades` from `raw-trades`)
    the writer, a table fed directly      that table, the record's own range
    the writer, a table made from raw     that table, the range of the raw record that the typed one names

So a redrive never produces a second record, lands each record once beside the live writer, and changes nothing the
second time. A letter is redriven when its record is no longer refused: its row is there, or it is a repetition of a
trade that is there. One that is refused again stays open.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa
from confluent_kafka import Message

from streamforge.contract_model import Contract, Contracts
from streamforge.errors import ConfigurationError, PermanentSourceError, RetentionGapError
from streamforge.lakehouse.remake import RECIPES, MakeRemake, Remade, Remake, lineage_of
from streamforge.lakehouse.replay import WAIT_S, preview, replay
from streamforge.lakehouse.replay_plan import Lineage, merged_ranges, numbers_of
from streamforge.lakehouse.replay_target import Progress, Target, open_target, silent
from streamforge.letter_decisions import DecisionKind, LetterDecision, record_decisions
from streamforge.letters import Letter, LetterState, decision_about
from streamforge.market.parsing import DUPLICATES, SKIPPED_PROTOCOL
from streamforge.offsets import OffsetRange
from streamforge.settings import Settings

WRITER_KIND = "writer"
_NOT_REFUSED = frozenset({DUPLICATES, SKIPPED_PROTOCOL})
"""What gives no row and is no refusal."""

_Record = tuple[int, int]
"""Topic-partition and offset of a source record."""


class Outcome(StrEnum):
    """What became of a letter, or in a dry run would."""

    LANDED = "landed"
    NO_ROW = "no_row"
    REFUSED = "refused"
    NOT_POSSIBLE = "not_possible"


@dataclass(frozen=True, slots=True)
class Redriven:
    """One letter and what became of it.

    Args:
        outcome: `landed`: its row is there; `no_row`: it is a repetition or no event, and no longer refused;
            `refused`: it is refused again; `not_possible`: there is nothing to replay.
        detail: for people.
    """

    letter: Letter
    outcome: Outcome
    detail: str

    @property
    def is_solved(self) -> bool:
        """Return whether the letter is redriven."""
        return self.outcome in (Outcome.LANDED, Outcome.NO_ROW)


@dataclass(frozen=True, slots=True)
class RedriveReport:
    """What a redrive did, or in a dry run would do.

    Args:
        replays: the report, or plan, of each table's replay.
        decisions: what was recorded; letters that were redriven before have none.
    """

    letters: Sequence[Redriven]
    replays: Sequence[Mapping[str, Any]]
    decisions: Sequence[LetterDecision]
    dry_run: bool

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Return how many letters there are of each outcome."""
        counts = Counter(str(each.outcome) for each in self.letters)
        return {str(outcome): counts[str(outcome)] for outcome in Outcome}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {
            "dry_run": self.dry_run,
            "letters": len(self.letters),
            **self.outcomes,
            "recorded": len(self.decisions),
            "replays": [dict(each) for each in self.replays],
            "by_letter": [
                {
                    "letter_id": each.letter.letter_id,
                    "place": each.letter.place,
                    "outcome": str(each.outcome),
                    "detail": each.detail,
                }
                for each in self.letters
            ],
        }


@dataclass(frozen=True, slots=True)
class Errand:
    """A letter that a replay may solve: its table, and the event of the source topic that its row is made from."""

    letter: Letter
    table: str
    topic_id: str
    source: OffsetRange
    index: int


def redrive(
    settings: Settings,
    contracts: Contracts,
    letters: Iterable[Letter],
    *,
    who: str,
    dry_run: bool = False,
    recompute: MakeRemake | None = None,
    wait_s: float = WAIT_S,
    progress: Progress = silent,
    clock_ns: Callable[[], int] = time.time_ns,
) -> RedriveReport:
    """Replay the original ranges of refused records and record which letters that solved.

    Killed before the end it has replaced rows of a table as a whole or not at all; do it again.

    Args:
        settings: which cluster and catalog.
        contracts: all of them.
        letters: which; a letter that was discarded may be redriven.
        who: is recorded with what was solved.
        dry_run: say what a redrive would do, and change nothing.
        recompute: makes the re-run instead of that of the live path.
        wait_s: longest wait until the live path has landed the ranges, seconds.
        progress: hears how far it is.
        clock_ns: wall clock, nanoseconds since 1970 UTC.

    Raises:
        StreamForgeError: as for `streamforge.lakehouse.replay.replay`; tables before that are done and recorded.
    """
    done: list[Redriven] = []
    errands: dict[str, list[Errand]] = {}
    for letter in letters:
        try:
            errand = errand_of(contracts, letter)
        except ConfigurationError as error:
            done.append(Redriven(letter, Outcome.NOT_POSSIBLE, str(error)))
        else:
            errands.setdefault(errand.table, []).append(errand)
    replays, decisions = [], list[LetterDecision]()
    for table, wanted in sorted(errands.items()):
        work = _TableWork(settings, contracts, table, recompute)
        possible = list(work.possible(wanted, done))
        if not possible:
            continue
        report = work.run(possible, dry_run=dry_run, wait_s=wait_s, progress=progress)
        replays.append(report)
        solved = [work.outcome(each) for each in possible]
        done += solved
        if not dry_run:
            made = _decisions(solved, who, report.get("commit_id") or None, clock_ns())
            record_decisions(settings, contracts, made)
            decisions += made
    return RedriveReport(done, replays, decisions, dry_run)


class _TableWork:
    """The replay of one table for some letters."""

    def __init__(self, settings: Settings, contracts: Contracts, table: str, recompute: MakeRemake | None) -> None:
        self._settings = settings
        self._contracts = contracts
        self._table = table
        self._target: Target = open_target(settings, contracts, table, recompute)
        self._seen: dict[_Record, _Gave] = {}

    def possible(self, errands: Sequence[Errand], done: list[Redriven]) -> Iterator[Errand]:
        """Yield those whose records can be had; add the others to `done`."""
        topic_id = self._target.source.topic_id
        gone = self._gone([each.source for each in errands if each.topic_id == topic_id])
        for each in errands:
            why = gone.get(each.source)
            if each.topic_id != topic_id:
                why = f"its record lies in topic id {each.topic_id}, which is gone: Kafka now has another topic"
            if why is None:
                yield each
            else:
                done.append(Redriven(each.letter, Outcome.NOT_POSSIBLE, why))

    def run(self, errands: Sequence[Errand], *, dry_run: bool, wait_s: float, progress: Progress) -> Mapping[str, Any]:
        """Replay, or preview the replay of, the ranges; what each record gave is kept for `outcome`."""
        ranges = merged_ranges(each.source for each in errands)

        def witness(lineage: Lineage, topic_id: str) -> Remake[Any]:
            return _Witness(self._target.make(lineage, topic_id), lineage, self._seen)

        where = (self._settings, self._contracts, self._table, ranges)
        if dry_run:
            plan, barrier = preview(*where, recompute=witness, progress=progress)
            return plan.as_dict() | {"barrier": barrier.as_dict()}
        return replay(*where, recompute=witness, wait_s=wait_s, progress=progress).as_dict()

    def outcome(self, errand: Errand) -> Redriven:
        """Return what became of a letter: what the re-run made of its record, which the replay has landed."""
        gave = self._seen.get((errand.source.partition, errand.source.start))
        if gave is None:
            detail = f"{errand.source} holds no committed record: it was of a transaction that was aborted"
            return Redriven(errand.letter, Outcome.NOT_POSSIBLE, detail)
        # Index 0 is the first event, or the frame as a whole: then no event of it may be refused.
        if errand.index in gave.indexes and (errand.index or not gave.refusals):
            return Redriven(errand.letter, Outcome.LANDED, f"its row is in {self._table}")
        if gave.refusals:
            return Redriven(errand.letter, Outcome.REFUSED, f"refused again: {', '.join(sorted(gave.refusals))}")
        return Redriven(errand.letter, Outcome.NO_ROW, "no longer refused: a repetition of what is there, or no event")

    def _gone(self, sources: Sequence[OffsetRange]) -> dict[OffsetRange, str]:
        """Return the ranges that cannot be read any more, and why; asked one by one only where one is."""
        if not sources or self._why_gone(sources) is None:
            return {}
        whys = {each: self._why_gone([each]) for each in set(sources)}
        return {each: why for each, why in whys.items() if why is not None}

    def _why_gone(self, sources: Sequence[OffsetRange]) -> str | None:
        try:
            self._target.checked(sources)
        except (RetentionGapError, PermanentSourceError, ConfigurationError) as error:
            return str(error)
        return None


@dataclass(frozen=True, slots=True)
class _Gave:
    """What the re-run made of one record: indexes of its rows, and reasons for which it refused something in it."""

    indexes: frozenset[int]
    refusals: frozenset[str]


class _Witness:
    """A re-run that makes one record at a time, and keeps what each gave."""

    def __init__(self, inner: Remake[Any], lineage: Lineage, seen: dict[_Record, _Gave]) -> None:
        self.history_columns: Sequence[str] = inner.history_columns
        self._inner = inner
        self._lineage = lineage
        self._seen = seen

    def initial(self) -> Any:
        """Return the state before the first record."""
        return self._inner.initial()

    def remember(self, state: Any, rows: pa.Table) -> Any:
        """Return the state after rows that are in the table already."""
        return self._inner.remember(state, rows)

    def remake(self, state: Any, messages: Sequence[Message]) -> tuple[Any, Remade]:
        """Make rows of source records of one topic-partition, in offset order; return the state after them."""
        parts, dropped = [], Counter[str]()
        for message in messages:
            state, remade = self._inner.remake(state, [message])
            self._seen[message.partition() or 0, message.offset() or 0] = self._gave(remade)
            parts.append(remade.rows)
            dropped.update(remade.dropped)
        # A record without rows gives an empty table, which has the columns of the contract and not those of a re-run.
        return state, Remade(pa.concat_tables([each for each in parts if each.num_rows] or parts[:1]), dropped)

    def _gave(self, remade: Remade) -> _Gave:
        direct = self._lineage.is_direct
        indexes = [0] * remade.rows.num_rows if direct else numbers_of(remade.rows, self._lineage.columns[3]).tolist()
        return _Gave(frozenset(indexes), frozenset(remade.dropped) - _NOT_REFUSED)


def errand_of(contracts: Contracts, letter: Letter) -> Errand:
    """Return what has to be replayed for a letter.

    Raises:
        ConfigurationError: nothing that a replay knows how to make follows from its record; says why.
    """
    contract = _contract_of(contracts, letter)
    own = OffsetRange(letter.topic, letter.partition, letter.offset, letter.offset + 1)
    if letter.processor != WRITER_KIND:
        for contract_id, recipe in RECIPES.items():
            if (recipe.group_kind, recipe.source_id) == (letter.processor, contract.id):
                return Errand(letter, contract_id, letter.topic_id, own, letter.index)
        msg = (
            f"{letter.processor} refused it, and no replay makes what {letter.processor} makes of {contract.id} again "
            "(bars of past trades: `streamforge backfill bars`)"
        )
        raise ConfigurationError(msg)
    lineage = lineage_of(contracts, contract.id)
    if lineage.is_direct:
        return Errand(letter, contract.id, letter.topic_id, own, 0)
    if letter.raw is None or lineage.source.topic is None:
        msg = f"its bytes do not say which raw record it was made of: replay {contract.id} by time instead"
        raise ConfigurationError(msg)
    raw = letter.raw
    source = OffsetRange(lineage.source.topic.name, raw.raw_partition, raw.raw_offset, raw.raw_offset + 1)
    return Errand(letter, contract.id, raw.raw_topic_id, source, raw.raw_index)


def _contract_of(contracts: Contracts, letter: Letter) -> Contract:
    for each in contracts.with_topic:
        if each.topic is not None and each.topic.name == letter.topic:
            return each
    msg = f"no contract has the topic {letter.topic}"
    raise ConfigurationError(msg)


def _decisions(solved: Iterable[Redriven], who: str, commit_id: str | None, ts_decided_ns: int) -> list[LetterDecision]:
    """Return what is to be recorded: a letter that counts as redriven already has its decision."""
    return [
        decision_about(
            each.letter,
            DecisionKind.REDRIVEN,
            who=who,
            why=each.detail,
            commit_id=commit_id,
            ts_decided_ns=ts_decided_ns,
        )
        for each in solved
        if each.is_solved and each.letter.state is not LetterState.REDRIVEN
    ]
