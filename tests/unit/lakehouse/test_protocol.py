"""The protocol as values: encoding, comparisons, and every schedule of two writers that Hypothesis can think of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamforge.errors import CommitError
from streamforge.lakehouse import protocol
from streamforge.lakehouse.protocol import (
    CLEAR,
    Batch,
    History,
    LastCommit,
    Move,
    Position,
    SourceIdentity,
    SourcePartition,
    TableState,
    Verdict,
    batch_properties,
    check_history,
    check_identity,
    claim_properties,
    compare,
    decode_state,
    encode_last_commit,
    encode_position,
    encode_raw_topics,
    encode_source,
    raw_epochs,
)

IDENTITY = SourceIdentity("trades", "topic-id", "cluster-id")
SOURCE = SourcePartition(1, 0)
EMPTY = TableState({}, {}, {}, None)
HELD = TableState({1: IDENTITY}, {SOURCE: Position(10, "a", 3)}, {}, LastCommit(7, 4, 10))
HISTORY = History(7, 4, 10, {7: 6, 6: None})
BATCH = Batch("a", IDENTITY, 1, {0: Move(10, 20, 3)}, {})


def test_state_encoded_then_decoded_is_the_same() -> None:
    state = TableState(
        {1: IDENTITY, 2: SourceIdentity("trades", "new-id", "cluster-id")},
        {SOURCE: Position(10, "a@h:1:2", 3), SourcePartition(2, 63): Position(0, "b", 1)},
        {1: "raw-id", 2: "raw-id-2"},
        LastCommit(2**62, 9, 11),
    )
    properties = {"owner": "somebody else's"}
    for epoch, identity in state.sources.items():
        properties |= encode_source(epoch, identity)
    for source, position in state.positions.items():
        properties |= encode_position(source, position)
    properties |= encode_raw_topics({"raw-id": 1, "raw-id-2": 2})
    assert state.last_commit is not None
    properties |= encode_last_commit(state.last_commit)
    assert decode_state(properties) == state
    assert state.epoch_of("trades") == 2
    assert state.epoch_of("bars") is None
    assert state.next_offsets(2) == {63: 0}


def test_positions_are_one_property_each() -> None:
    assert encode_position(SOURCE, Position(1, "a", 1)).keys() == {"streamforge.position.1.0"}
    assert encode_position(SourcePartition(1, 1), Position(1, "a", 1)).keys() == {"streamforge.position.1.1"}


def test_state_of_another_protocol_version_is_refused() -> None:
    with pytest.raises(CommitError, match="version 2, this program knows 1"):
        decode_state({protocol.VERSION_KEY: "2", "streamforge.position.whatever": "?"})


@pytest.mark.parametrize(
    "properties",
    [
        {"streamforge.position.1.0": "10"},
        {"streamforge.position.1": "{}"},
        {"streamforge.source.x": "{}"},
        {"streamforge.last-commit": '{"snapshot_id": 1}'},
    ],
)
def test_state_that_cannot_be_read_is_refused_and_names_the_property(properties: dict[str, str]) -> None:
    with pytest.raises(CommitError, match=next(iter(properties))):
        decode_state(properties)


def test_compare_on_our_own_last_commit_is_clear() -> None:
    assert compare(HELD, HISTORY, BATCH) == CLEAR


@pytest.mark.parametrize(
    ("state", "history", "batch", "verdict"),
    [
        (HELD, HISTORY, replace(BATCH, identity=SourceIdentity("trades", "new", "c")), Verdict.TOPIC_REPLACED),
        (HELD, HISTORY, replace(BATCH, owner="b"), Verdict.FENCED),
        (HELD, HISTORY, replace(BATCH, moves={0: Move(10, 20, 2)}), Verdict.FENCED),
        (HELD, HISTORY, replace(BATCH, moves={1: Move(0, 1, 1)}), Verdict.FENCED),
        (HELD, replace(HISTORY, main_snapshot_id=6), BATCH, Verdict.ROLLED_BACK),
        (HELD, HISTORY, replace(BATCH, moves={0: Move(9, 20, 3)}), Verdict.MOVED),
        (HELD, replace(HISTORY, main_snapshot_id=6), replace(BATCH, owner="b"), Verdict.FENCED),
        (HELD, HISTORY, replace(BATCH, raw_topics={"x": 2}), Verdict.RAW_EPOCH_TAKEN),
        (replace(HELD, raw_topics={1: "y"}), HISTORY, replace(BATCH, raw_topics={"x": 1}), Verdict.RAW_EPOCH_TAKEN),
    ],
)
def test_compare_finds_the_gravest_first(state: TableState, history: History, batch: Batch, verdict: Verdict) -> None:
    assert compare(state, history, batch).verdict is verdict


@pytest.mark.parametrize(
    ("history", "verdict"),
    [
        (History(7, 4, 10, {7: None}), Verdict.CLEAR),
        (History(9, 6, 99, {9: 8, 8: 7, 7: None}), Verdict.CLEAR),
        (History(None, 0, None, {}), Verdict.ROLLED_BACK),
        (History(6, 3, 5, {7: 6, 6: None}), Verdict.ROLLED_BACK),
        # Expiry has cut the chain: only totals and order can tell.
        (History(9, 6, 10, {9: None}), Verdict.CLEAR),
        (History(9, 6, 10, {9: 8}), Verdict.CLEAR),
        (History(9, 6, 9, {9: None}), Verdict.ROLLED_BACK),
        (History(3, 3, 10, {3: None}), Verdict.ROLLED_BACK),
    ],
)
def test_history_must_descend_or_agree(history: History, verdict: Verdict) -> None:
    assert check_history(HELD, history).verdict is verdict


def test_identity_of_a_topic_not_known_yet_is_clear_and_a_recreated_one_says_both() -> None:
    assert check_identity(HELD, SourceIdentity("bars", "x", "y")) == CLEAR
    found = check_identity(HELD, SourceIdentity("trades", "new-id", "new-cluster"))
    assert found.verdict is Verdict.TOPIC_REPLACED
    assert "topic-id in cluster cluster-id" in found.expected
    assert "new-id in cluster new-cluster" in found.found


def test_claim_keeps_next_offset_and_takes_the_next_owner_epoch() -> None:
    properties = claim_properties(HELD, owner="b", identity=IDENTITY, log_starts={0: 0, 1: 5})
    state = decode_state(properties)
    assert state.positions == {SOURCE: Position(10, "b", 4), SourcePartition(1, 1): Position(5, "b", 1)}
    assert not state.sources


def test_raw_epochs_are_stable_and_new_ids_get_the_next_numbers() -> None:
    assert raw_epochs(EMPTY, ["b", "a"]) == {"a": 1, "b": 2}
    assert raw_epochs(replace(EMPTY, raw_topics={1: "b", 4: "z"}), ["b", "a"]) == {"b": 1, "a": 5}


@dataclass
class Process:
    """A writer in the model: its claim, and the commits that it has staged but whose outcome it has not seen."""

    owner: str = ""
    epoch: int = 0
    at: int = 0
    staged: Commit | None = None


@dataclass
class Commit:
    """What is sent: asserts `base`, brings rows and properties."""

    base: int
    rows: list[int]
    properties: dict[str, str]
    in_flight: bool = False


@dataclass
class Table:
    """A table behind a catalog that compares and sets."""

    main: int = 0
    rows: Counter[int] = field(default_factory=Counter)
    properties: dict[str, str] = field(default_factory=dict)

    def send(self, commit: Commit) -> bool:
        """Land `commit` if `main` is what it asserts."""
        if commit.base != self.main:
            return False
        self.main += 1
        self.rows.update(commit.rows)
        self.properties |= commit.properties
        return True


class TwoWriters(RuleBasedStateMachine):
    """Two processes that both believe to own topic-partition 0, lost answers, late requests and other committers."""

    writers = st.integers(0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.processes = [Process(), Process()]
        self.starts = 0

    @rule(number=writers)
    def start_and_claim(self, number: int) -> None:
        """Start a process of the slot, which claims; the commit of the one before may still be under way."""
        self.starts += 1
        owner = f"{number}-{self.starts}"
        state = decode_state(self.table.properties)
        properties = claim_properties(state, owner=owner, identity=IDENTITY, log_starts={0: 0})
        assert self.table.send(Commit(self.table.main, [], properties))
        position = decode_state(self.table.properties).positions[SOURCE]
        late = self.processes[number].staged
        self.processes[number] = Process(owner, position.owner_epoch, position.next_offset, late)

    @rule(number=writers, count=st.integers(1, 3))
    def stage(self, number: int, count: int) -> None:
        """Compare on the metadata of now and stage a commit on it."""
        process = self.processes[number]
        if not process.owner or process.staged is not None:
            return
        batch = Batch(process.owner, IDENTITY, 1, {0: Move(process.at, process.at + count, process.epoch)}, {})
        history = History(self.table.main, self.table.main, None, {self.table.main: None})
        found = compare(decode_state(self.table.properties), history, batch)
        if found.verdict is Verdict.MOVED:
            process.at = int(found.found)
        elif found.verdict is Verdict.CLEAR:
            rows = list(range(process.at, process.at + count))
            process.staged = Commit(self.table.main, rows, batch_properties(batch))

    @rule(number=writers, answer_lost=st.booleans())
    def send(self, number: int, *, answer_lost: bool) -> None:
        """Send what is staged; with the answer lost only the next compare tells."""
        process = self.processes[number]
        if process.staged is None:
            return
        landed = self.table.send(process.staged)
        if landed and not answer_lost:
            process.at += len(process.staged.rows)
        process.staged = None

    @rule(number=writers)
    def send_and_stay_in_flight(self, number: int) -> None:
        """Send what is staged and let the request arrive a second time later."""
        process = self.processes[number]
        if process.staged is not None:
            self.table.send(process.staged)

    @rule()
    def foreign_commit(self) -> None:
        """Move `main` as somebody else."""
        self.table.send(Commit(self.table.main, [], {}))

    @precondition(lambda self: self.table.properties)
    @invariant()
    def rows_are_exactly_those_below_next_offset(self) -> None:
        """Check the promise."""
        next_offset = decode_state(self.table.properties).positions[SOURCE].next_offset
        assert self.table.rows == Counter(range(next_offset))


TwoWriters.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestTwoWriters = TwoWriters.TestCase
