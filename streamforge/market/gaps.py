"""Gaps in what a venue sent: which ids may be missing from raw, as a pure state machine.

A stream is one channel of one instrument. The promise: every id that the venue sent and raw lacks lies
inside a published gap of its stream, `id_before < id < id_after` (None: unbounded on that side). It holds
after a kill at any instruction because of three rules:

1. *The gap goes first.* A frame behind a gap is handed to Kafka only when the ledger has acknowledged the gap
   (`Outbox`). So whatever raw holds, the holes below it are in the ledger already.
2. *The log keeps the order.* Records of one stream share a key, so a topic-partition, and an idempotent
   producer appends in the order of `produce`. A kill loses a tail and nothing else, and the tail is covered by the
   next start, which begins at the last record that raw has (`start` gap).
3. *A refusal can come too late for rule 1* (the broker refuses a frame while its successors are under way).
   Therefore a start looks for holes in the tail of raw that the ledger does not cover (`TailScan`).

The trap: `high` is the highest id handed on, acknowledged or not. Frames in flight need no gap of their own:
they land, are refused (a `broker_rejected` gap), or die with the process (the next start's gap).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Generic, NamedTuple, TypeVar

from streamforge.market.records import GapKind

REBASE_AFTER_FRAMES = 32
"""So many frames in a row below `high`, each following the other: the venue's ids went back, or `high` came from a
garbled frame. Reordering never does this, and lowering `high` only widens later gaps."""

F = TypeVar("F")


class VenueIds(NamedTuple):
    """Ids of one frame, both inclusive: a trade has one id twice, a depth update its `U` and `u`."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class GapSpan:
    """What may be missing in one stream.

    Args:
        ts_start_ns: start of the span by our receipt, inclusive; 0 where raw has nothing before.
        ts_end_ns: end of the span by our receipt, exclusive.
        id_before: no missing id is at or below it; None where nothing is known.
        id_after: no missing id is at or above it; None where nothing is known.
        records_dropped: frames that the loader had in hand.
        bytes_dropped: their bytes.
        connection_id: connection in which it was noticed, None where it is of none or of several.
    """

    kind: GapKind
    ts_start_ns: int
    ts_end_ns: int
    id_before: int | None
    id_after: int | None
    records_dropped: int = 0
    bytes_dropped: int = 0
    connection_id: str | None = None

    def covers(self, first: int, last: int) -> bool:
        """Return whether all ids of `[first, last]` lie inside."""
        return (self.id_before is None or self.id_before < first) and (self.id_after is None or last < self.id_after)

    def merged(self, later: GapSpan) -> GapSpan:
        """Return one gap that covers this one and `later`; counts are summed, the worse kind is kept."""
        known_low = self.id_before is not None and later.id_before is not None
        known_high = self.id_after is not None and later.id_after is not None
        return GapSpan(
            self.kind if self.records_dropped else later.kind,
            min(self.ts_start_ns, later.ts_start_ns),
            max(self.ts_end_ns, later.ts_end_ns),
            min(self.id_before or 0, later.id_before or 0) if known_low else None,
            max(self.id_after or 0, later.id_after or 0) if known_high else None,
            self.records_dropped + later.records_dropped,
            self.bytes_dropped + later.bytes_dropped,
        )


@dataclass(slots=True)
class _Lost:
    """Frames that were in hand and are lost, coalesced; bounds as in `GapSpan`."""

    ts_start_ns: int
    ts_end_ns: int
    id_before: int | None = None
    low: int | None = None
    high: int | None = None
    records: int = 0
    size_bytes: int = 0
    has_unknown_ids: bool = False

    def add(self, ids: VenueIds | None, size_bytes: int, ts_ns: int) -> None:
        self.records += 1
        self.size_bytes += size_bytes
        self.ts_start_ns = min(self.ts_start_ns, ts_ns)
        self.ts_end_ns = max(self.ts_end_ns, ts_ns + 1)
        if ids is None:
            self.has_unknown_ids = True
            return
        self.low = ids.first if self.low is None else min(self.low, ids.first)
        self.high = ids.last if self.high is None else max(self.high, ids.last)


class StreamGaps:
    """Continuity of one stream: told what happens to its frames, it says which gaps must be published.

    Args:
        high: highest id that raw has, None where it has none.
        last_ns: receive time of the last record that raw has, 0 where it has none.
        fresh: why something may be missing before the next frame; None for a stream that is no stream of the
            venue (frames that cannot be told).
    """

    __slots__ = ("_dropped", "_fresh", "_late_last", "_late_run", "_rejected", "high", "last_ns")

    def __init__(self, high: int | None = None, last_ns: int = 0, *, fresh: GapKind | None = GapKind.START) -> None:
        self.high = high
        self.last_ns = last_ns
        self._fresh = fresh
        self._dropped: _Lost | None = None
        self._rejected: _Lost | None = None
        self._late_last = 0
        self._late_run = 0

    def interrupted(self) -> None:
        """Note that nobody listened: what the venue sent before the next frame may not have been heard."""
        if self._fresh is None:
            self._fresh = GapKind.RECONNECT

    def frame(self, ids: VenueIds | None, ts_ns: int) -> GapSpan | None:
        """Take in a frame that is handed on; return the gap that has to be published before it."""
        high = self.high
        if ids is not None and high is not None and self._fresh is None and ids.first <= high + 1 <= ids.last:
            self.high = ids.last
            self.last_ns = ts_ns
            self._late_run = 0
            return None
        span = self._after_silence(ids, ts_ns) if self._fresh is not None else self._in_connection(ids, ts_ns)
        self.last_ns = ts_ns
        return span

    def drop(self, ids: VenueIds | None, size_bytes: int, ts_ns: int) -> None:
        """Take in a frame that had no room; the gap comes with `overflow_ended`."""
        lost = self._dropped
        if lost is None:
            lost = self._dropped = _Lost(ts_ns, ts_ns + 1, id_before=self.high)
        if self._fresh is not None:
            lost.ts_start_ns = min(lost.ts_start_ns, self.last_ns)
            known = max((i for i in (self.high, lost.high) if i is not None), default=None)
            if ids is None or (known is not None and ids.last <= known):
                lost.has_unknown_ids = True
                lost.id_before = None
            self._fresh = None
        lost.add(ids, size_bytes, ts_ns)
        if lost.id_before is not None and lost.low is not None:
            lost.id_before = min(lost.id_before, lost.low - 1)

    def overflow_ended(self) -> GapSpan | None:
        """Return the one gap of all frames dropped since the last call, None where there were none."""
        lost, self._dropped = self._dropped, None
        if lost is None:
            return None
        if lost.high is not None and (self.high is None or lost.high > self.high):
            self.high = lost.high
        self.last_ns = max(self.last_ns, lost.ts_end_ns - 1)
        after = None if lost.high is None or lost.has_unknown_ids else lost.high + 1
        return GapSpan(
            GapKind.BUFFER_OVERFLOW,
            lost.ts_start_ns,
            lost.ts_end_ns,
            lost.id_before,
            after,
            lost.records,
            lost.size_bytes,
        )

    def reject(self, ids: VenueIds | None, size_bytes: int, ts_ns: int) -> None:
        """Take in a frame that was handed on and refused for good, received at `ts_ns`."""
        if self._rejected is None:
            self._rejected = _Lost(ts_ns, ts_ns + 1)
        self._rejected.add(ids, size_bytes, ts_ns)

    def take_rejected(self) -> GapSpan | None:
        """Return the one gap of all frames refused since the last call, None where there were none."""
        lost, self._rejected = self._rejected, None
        if lost is None:
            return None
        is_known = lost.low is not None and lost.high is not None and not lost.has_unknown_ids
        return GapSpan(
            GapKind.BROKER_REJECTED,
            lost.ts_start_ns,
            lost.ts_end_ns,
            lost.low - 1 if is_known and lost.low is not None else None,
            lost.high + 1 if is_known and lost.high is not None else None,
            lost.records,
            lost.size_bytes,
        )

    def stopped(self, ts_ns: int) -> list[GapSpan]:
        """Return the gaps that are still open when the loader stops at `ts_ns`; the last has no id after."""
        spans = [span for span in (self.overflow_ended(), self.take_rejected()) if span is not None]
        if self._fresh is not None:
            spans.append(self._span(self._fresh, ts_ns, self.high, None))
            self._fresh = None
        return spans

    def _after_silence(self, ids: VenueIds | None, ts_ns: int) -> GapSpan | None:
        kind, self._fresh = self._fresh or GapKind.RECONNECT, None
        self._late_run = 0
        before = self.high
        if ids is None:
            return self._span(kind, ts_ns, before, None)
        self.high = ids.last
        if before is not None and ids.first <= before + 1 <= ids.last:
            return None
        if before is not None and ids.last <= before:
            # The venue's ids went back. What was sent of the old and of the new series is not known.
            return self._span(kind, ts_ns, None, None)
        return self._span(kind, ts_ns, before, ids.first)

    def _in_connection(self, ids: VenueIds | None, ts_ns: int) -> GapSpan | None:
        if ids is None:
            return None
        before = self.high
        if before is None or ids.first > before + 1:
            self.high = ids.last
            self._late_run = 0
            return None if before is None else self._span(GapKind.SEQUENCE, ts_ns, before, ids.first)
        self._late_run = self._late_run + 1 if ids.first == self._late_last + 1 else 1
        self._late_last = ids.last
        if self._late_run >= REBASE_AFTER_FRAMES:
            self.high = ids.last
            self._late_run = 0
        return None

    def _span(self, kind: GapKind, ts_ns: int, before: int | None, after: int | None) -> GapSpan:
        return GapSpan(kind, self.last_ns, max(ts_ns, self.last_ns + 1), before, after)


class Outbox(Generic[F]):
    """Order of one stream's frames and gaps: one gap is under way at a time, and frames behind it wait."""

    __slots__ = ("_items", "is_waiting")

    def __init__(self) -> None:
        self.is_waiting = False
        self._items: deque[F | GapSpan] = deque()

    @property
    def held(self) -> int:
        """Return how many frames and gaps wait."""
        return len(self._items)

    def gap(self, span: GapSpan) -> GapSpan | None:
        """Take in a gap; return it when it is to be published now. Gaps with no frame between become one."""
        if not self.is_waiting:
            self.is_waiting = True
            return span
        last = self._items[-1] if self._items else None
        if isinstance(last, GapSpan):
            self._items[-1] = last.merged(span)
        else:
            self._items.append(span)
        return None

    def hold(self, frame: F) -> None:
        """Keep a frame that came while `is_waiting`."""
        self._items.append(frame)

    def acknowledged(self) -> tuple[list[F], GapSpan | None]:
        """Note that the ledger has the gap; return the frames to hand on now and the gap to publish then."""
        frames: list[F] = []
        while self._items:
            item = self._items.popleft()
            if isinstance(item, GapSpan):
                return frames, item
            frames.append(item)
        self.is_waiting = False
        return frames, None

    def give_up(self) -> list[F]:
        """Return the frames that wait, which are lost then; the gaps stay, as one."""
        frames = [item for item in self._items if not isinstance(item, GapSpan)]
        gaps = [item for item in self._items if isinstance(item, GapSpan)]
        self._items.clear()
        if gaps:
            self._items.append(reduce(GapSpan.merged, gaps))
        return frames


class TailScan:
    """What the tail of raw and of the ledger say of one stream when a loader starts.

    Feed the stream's raw records in offset order, then ask for its state and for the holes that the ledger lacks.

    Args:
        is_whole: the tail begins where the topic-partition began, so nothing lies before its first record.
    """

    def __init__(self, *, is_whole: bool) -> None:
        self._gaps = StreamGaps()
        self._is_whole = is_whole
        self._connection_id: str | None = None
        self._holes: list[GapSpan] = []

    def record(self, ids: VenueIds | None, ts_ns: int, connection_id: str) -> None:
        """Take in the next raw record of the stream."""
        is_first = self._connection_id is None
        if connection_id != self._connection_id:
            self._connection_id = connection_id
            self._gaps.interrupted()
        span = self._gaps.frame(ids, ts_ns)
        if span is not None and (self._is_whole or not is_first):
            self._holes.append(replace(span, kind=GapKind.SEQUENCE))

    def resume(self) -> StreamGaps:
        """Return the state to start from: the next frame closes a `start` gap that begins here."""
        return StreamGaps(self._gaps.high, self._gaps.last_ns)

    def uncovered(self, ledger: Iterable[GapSpan]) -> list[GapSpan]:
        """Return the holes before and between the records that the gaps of `ledger` together do not cover."""
        known = list(ledger)
        return [hole for hole in self._holes if not _is_covered(hole, known)]


def _is_covered(hole: GapSpan, ledger: list[GapSpan]) -> bool:
    """Return whether every id inside `hole` lies inside some gap of `ledger`."""
    reached = hole.id_before
    while True:
        # Ids up to `reached` are accounted for; None: none yet, as the hole has no lower end.
        steps = [
            span.id_after
            for span in ledger
            if span.id_before is None or (reached is not None and span.id_before <= reached)
        ]
        if None in steps:
            return True
        furthest = max((after - 1 for after in steps if after is not None), default=None)
        if hole.id_after is None or furthest is None or (reached is not None and furthest <= reached):
            return False
        reached = furthest
        if reached >= hole.id_after - 1:
            return True
