"""The promise of the loader, against a model of Kafka: an id that raw lacks lies inside a gap of the ledger.

The model keeps what Kafka guarantees and nothing more: a topic-partition takes records in the order of
`produce`, refuses some, and tells of it late and in any order; a kill loses what was on its way.

Two models, because two rules of `streamforge.market.gaps` would hide each other's absence: where Kafka refuses
nothing, a start that reads no more than the last raw record must be enough.
"""

# ruff: noqa: D102 - rules and invariants are named by what they do

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamforge.market.gaps import GapSpan, Outbox, StreamGaps, TailScan, VenueIds

GARBLED_ID = 10**9
TICK_NS = 1_000


@dataclass(frozen=True)
class Sent:
    """A frame: the ids it has, and the ids that the loader reads from it."""

    true: VenueIds
    read: VenueIds | None
    ts_ns: int
    connection: int


class LoaderModel(RuleBasedStateMachine):
    """One stream of a loader between a venue that sends rising ids and a broker that may do anything but lie."""

    def __init__(self) -> None:
        super().__init__()
        self.next_id = 1
        self.now_ns = TICK_NS
        self.raw: list[Sent] = []
        self.ledger: list[GapSpan] = []
        self.connection = 0
        self._start()

    refuses = True

    def _scan(self) -> TailScan:
        """Read the tail as a start does: all of it, or its last record only."""
        scan = TailScan(is_whole=self.refuses)
        for frame in self.raw if self.refuses else self.raw[-1:]:
            scan.record(frame.read, frame.ts_ns, str(frame.connection))
        return scan

    def _start(self) -> None:
        scan = self._scan()
        self.gaps: StreamGaps = scan.resume()
        self.outbox: Outbox[Sent] = Outbox()
        self.frames_under_way: deque[Sent] = deque()
        self.gaps_under_way: deque[tuple[GapSpan, bool]] = deque()
        self.refused: list[Sent] = []
        self.gaps_taken: list[bool] = []
        self.is_overflowing = False
        self.is_connected = False
        self.late: list[Sent] = []
        for hole in scan.uncovered(self.ledger):
            self._gap(hole)

    def _gap(self, span: GapSpan | None) -> None:
        now = self.outbox.gap(span) if span is not None else None
        if now is not None:
            self.gaps_under_way.append((now, True))

    def _receive(self, frame: Sent) -> None:
        if self.is_overflowing:
            self.gaps.drop(frame.read, 1, frame.ts_ns)
            return
        self._gap(self.gaps.frame(frame.read, frame.ts_ns))
        if self.outbox.is_waiting:
            self.outbox.hold(frame)
        else:
            self.frames_under_way.append(frame)

    def _frame(self, width: int, *, read: str = "right") -> Sent:
        self.now_ns += TICK_NS
        true = VenueIds(self.next_id, self.next_id + width - 1)
        self.next_id += width
        reads = {"right": true, "nothing": None, "garbled": VenueIds(GARBLED_ID, GARBLED_ID)}
        return Sent(true, reads[read], self.now_ns, self.connection)

    @initialize(before=st.integers(0, 3))
    def venue_was_there_before(self, before: int) -> None:
        self.next_id += before

    @precondition(lambda self: not self.is_connected)
    @rule(missed=st.integers(0, 3))
    def connect(self, missed: int) -> None:
        self.next_id += missed
        self.connection += 1
        self.is_connected = True
        self.gaps.interrupted()

    @precondition(lambda self: self.is_connected)
    @rule()
    def disconnect(self) -> None:
        self.is_connected = False
        self.late.clear()

    @precondition(lambda self: self.is_connected)
    @rule(
        width=st.integers(1, 3),
        count=st.integers(1, 3),
        fate=st.sampled_from(["heard", "heard", "heard", "lost", "doubled", "late", "nothing", "garbled"]),
    )
    def venue_sends(self, width: int, count: int, fate: str) -> None:
        for _ in range(count):
            self._send(width, fate)

    def _send(self, width: int, fate: str) -> None:
        frame = self._frame(width, read=fate if fate in ("nothing", "garbled") else "right")
        if fate == "late":
            self.late.append(frame)
        elif fate != "lost":
            self._receive(frame)
            if fate == "doubled":
                self._receive(frame)

    @precondition(lambda self: self.late)
    @rule()
    def late_frame_comes(self) -> None:
        self._receive(self.late.pop(0))

    @precondition(lambda self: not self.is_overflowing)
    @rule()
    def buffer_fills(self) -> None:
        self.is_overflowing = True

    @precondition(lambda self: self.is_overflowing)
    @rule()
    def buffer_empties(self) -> None:
        self.is_overflowing = False
        self._gap(self.gaps.overflow_ended())

    @precondition(lambda self: self.frames_under_way)
    @rule(are_taken=st.lists(st.booleans(), min_size=1, max_size=5))
    def raw_decides(self, are_taken: list[bool]) -> None:
        for is_taken in are_taken[: len(self.frames_under_way)]:
            into = self.raw if is_taken or not self.refuses else self.refused
            into.append(self.frames_under_way.popleft())

    @precondition(lambda self: self.refused)
    @rule(data=st.data())
    def loader_hears_of_refusal(self, data: st.DataObject) -> None:
        frame = self.refused.pop(data.draw(st.integers(0, len(self.refused) - 1)))
        self.gaps.reject(frame.read, 1, frame.ts_ns)

    @precondition(lambda self: not self.refused and not self.is_overflowing)
    @rule()
    def loader_settles(self) -> None:
        self._gap(self.gaps.take_rejected())

    @precondition(lambda self: self.gaps_under_way)
    @rule()
    def ledger_takes(self) -> None:
        span, holds = self.gaps_under_way.popleft()
        self.ledger.append(span)
        self.gaps_taken.append(holds)

    @precondition(lambda self: self.gaps_taken)
    @rule()
    def loader_hears_of_gap(self) -> None:
        if self.gaps_taken.pop(0):
            self._release()

    @precondition(lambda self: self.gaps_under_way or self.gaps_taken)
    @rule()
    def ledger_catches_up(self) -> None:
        while self.gaps_under_way or self.gaps_taken:
            if self.gaps_under_way:
                self.ledger_takes()
            self.loader_hears_of_gap()

    def _release(self) -> None:
        frames, span = self.outbox.acknowledged()
        self.frames_under_way.extend(frames)
        if span is not None:
            self.gaps_under_way.append((span, True))

    @rule(frames=st.integers(0, 5), gap_lands=st.booleans())
    def kill(self, frames: int, gap_lands: bool) -> None:
        if gap_lands and self.gaps_under_way:
            self.ledger_takes()
        for _ in range(min(frames, len(self.frames_under_way))):
            self.raw.append(self.frames_under_way.popleft())
        self._start()

    def _lacking(self) -> list[int]:
        have = {number for frame in self.raw if frame.read is not None for number in range(*_half_open(frame.true))}
        return [number for number in range(1, self.next_id) if number not in have]

    @invariant()
    def a_start_now_would_cover_everything(self) -> None:
        scan = self._scan()
        high = scan.resume().high or 0
        spans = [*self.ledger, *scan.uncovered(self.ledger)]
        open_ids = [n for n in self._lacking() if n <= high and not any(span.covers(n, n) for span in spans)]
        first_read = next((frame.read for frame in self.raw if frame.read is not None), None)
        assert not open_ids, f"ids {open_ids} are not in raw and in no gap; raw goes from {first_read} to {high}"

    def teardown(self) -> None:
        if not self.is_connected:
            self.connect(missed=1)
        self._receive(self._frame(1))
        self._give_up()
        for span in self.gaps.stopped(self.now_ns + TICK_NS):
            self._gap(span)
        self.ledger_catches_up()
        open_ids = [n for n in self._lacking() if not any(span.covers(n, n) for span in self.ledger)]
        assert not open_ids, f"ids {open_ids} are not in raw and in no gap after a stop: {self.ledger}"

    def _give_up(self) -> None:
        """Do as `RawSink.stop` at its deadline: what is held or under way is lost."""
        for frame in [*self.outbox.give_up(), *self.frames_under_way, *self.refused]:
            self.gaps.reject(frame.read, 1, frame.ts_ns)
        self.frames_under_way.clear()
        self.refused.clear()


def _half_open(ids: VenueIds) -> tuple[int, int]:
    return ids.first, ids.last + 1


class LastRecordModel(LoaderModel):
    """The same with a Kafka that refuses nothing and a start that reads one record."""

    refuses = False


_SETTINGS = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLoaderModel = LoaderModel.TestCase
TestLoaderModel.settings = _SETTINGS
TestLastRecordModel = LastRecordModel.TestCase
TestLastRecordModel.settings = _SETTINGS
