"""Gaps of one stream, one situation at a time; the property test has them all at once."""

from __future__ import annotations

from streamforge.market.gaps import REBASE_AFTER_FRAMES, GapSpan, Outbox, StreamGaps, TailScan, VenueIds
from streamforge.market.records import GapKind


def one(number: int) -> VenueIds:
    return VenueIds(number, number)


def running(high: int = 10, last_ns: int = 100) -> StreamGaps:
    """Return a stream whose start is behind it."""
    return StreamGaps(high, last_ns, fresh=None)


def test_first_start_ever_is_unbounded_below() -> None:
    assert StreamGaps().frame(one(7), 50) == GapSpan(GapKind.START, 0, 50, None, 7)


def test_start_begins_at_the_last_raw_record() -> None:
    assert StreamGaps(5, 40).frame(one(9), 50) == GapSpan(GapKind.START, 40, 50, 5, 9)


def test_start_and_reconnect_without_a_hole_publish_nothing() -> None:
    gaps = StreamGaps(5, 40)
    assert gaps.frame(one(6), 50) is None
    gaps.interrupted()
    assert gaps.frame(VenueIds(6, 8), 60) is None
    assert gaps.high == 8


def test_reconnect_before_the_first_frame_stays_a_start() -> None:
    gaps = StreamGaps(5, 40)
    gaps.interrupted()
    span = gaps.frame(one(9), 50)
    assert span is not None
    assert span.kind is GapKind.START


def test_reconnect_of_a_stream_without_ids_is_bounded_by_time_only() -> None:
    gaps = StreamGaps(None, 40, fresh=None)
    gaps.interrupted()
    assert gaps.frame(None, 50) == GapSpan(GapKind.RECONNECT, 40, 50, None, None)


def test_ids_that_went_back_over_a_reconnect_are_unbounded() -> None:
    gaps = running()
    gaps.interrupted()
    assert gaps.frame(one(1), 200) == GapSpan(GapKind.RECONNECT, 100, 200, None, None)
    assert gaps.frame(one(2), 201) is None
    assert gaps.frame(one(4), 202) == GapSpan(GapKind.SEQUENCE, 201, 202, 2, 4)


def test_depth_that_overlaps_is_no_gap_and_one_that_skips_is() -> None:
    gaps = running()
    assert gaps.frame(VenueIds(9, 15), 101) is None
    assert gaps.frame(VenueIds(17, 20), 102) == GapSpan(GapKind.SEQUENCE, 101, 102, 15, 17)


def test_late_and_doubled_frames_are_no_gaps_and_do_not_move_the_state_back() -> None:
    gaps = running()
    assert [gaps.frame(one(number), 101) for number in (8, 10, 9, 10)] == [None] * 4
    assert gaps.frame(one(11), 102) is None


def test_garbled_id_does_not_blind_the_stream_for_long() -> None:
    gaps = running()
    gaps.frame(one(10**9), 101)
    for number in range(11, 11 + REBASE_AFTER_FRAMES):
        assert gaps.frame(one(number), 102) is None
    last = 10 + REBASE_AFTER_FRAMES
    assert gaps.frame(one(last + 2), 103) == GapSpan(GapKind.SEQUENCE, 102, 103, last, last + 2)


def test_dropped_frames_are_one_counted_gap() -> None:
    gaps = running()
    for number in (11, 12, 15):
        gaps.drop(one(number), 7, 100 + number)
    assert gaps.overflow_ended() == GapSpan(GapKind.BUFFER_OVERFLOW, 111, 116, 10, 16, 3, 21)
    assert gaps.overflow_ended() is None
    assert gaps.frame(one(16), 120) is None


def test_reconnect_during_an_outage_is_inside_of_its_gap() -> None:
    gaps = running()
    gaps.drop(one(11), 7, 111)
    gaps.interrupted()
    gaps.drop(one(20), 7, 120)
    assert gaps.overflow_ended() == GapSpan(GapKind.BUFFER_OVERFLOW, 100, 121, 10, 21, 2, 14)
    assert gaps.frame(one(21), 130) is None


def test_refused_frames_are_one_counted_gap_with_tight_bounds() -> None:
    gaps = running()
    gaps.frame(one(11), 111)
    gaps.frame(one(12), 112)
    gaps.frame(one(13), 113)
    gaps.reject(one(12), 5, 112)
    gaps.reject(one(11), 5, 111)
    assert gaps.take_rejected() == GapSpan(GapKind.BROKER_REJECTED, 111, 113, 10, 13, 2, 10)
    assert gaps.take_rejected() is None


def test_refused_frame_without_ids_is_bounded_by_time_only() -> None:
    gaps = running()
    gaps.reject(None, 5, 112)
    assert gaps.take_rejected() == GapSpan(GapKind.BROKER_REJECTED, 112, 113, None, None, 1, 5)


def test_stop_says_what_is_still_open() -> None:
    gaps = running()
    gaps.interrupted()
    assert gaps.stopped(200) == [GapSpan(GapKind.RECONNECT, 100, 200, 10, None)]
    assert running().stopped(200) == []


def test_frames_behind_a_gap_wait_for_the_ledger_and_keep_their_order() -> None:
    first, second, third = (GapSpan(GapKind.SEQUENCE, n, n + 1, n, n + 2) for n in (1, 5, 9))
    outbox: Outbox[str] = Outbox()
    assert outbox.gap(first) == first
    outbox.hold("a")
    assert outbox.gap(second) is None
    assert outbox.gap(third) is None
    outbox.hold("b")
    frames, gap = outbox.acknowledged()
    assert (frames, gap) == (["a"], second.merged(third))
    assert outbox.is_waiting
    assert outbox.acknowledged() == (["b"], None)
    assert not outbox.is_waiting


def test_merged_gaps_cover_both_and_keep_the_counts() -> None:
    lost = GapSpan(GapKind.BUFFER_OVERFLOW, 10, 20, 4, 9, 4, 40)
    later = GapSpan(GapKind.RECONNECT, 18, 30, 12, None)
    assert lost.merged(later) == GapSpan(GapKind.BUFFER_OVERFLOW, 10, 30, 4, None, 4, 40)


def test_hole_in_the_tail_is_found_unless_gaps_cover_all_of_it() -> None:
    scan = TailScan(is_whole=False)
    for number in (5, 6, 10):
        scan.record(one(number), number, "c")
    hole = GapSpan(GapKind.SEQUENCE, 6, 10, 6, 10)
    assert scan.uncovered([]) == [hole]
    assert scan.uncovered([GapSpan(GapKind.BROKER_REJECTED, 0, 1, 6, 8)]) == [hole]
    parts = [GapSpan(GapKind.BROKER_REJECTED, 0, 1, 7, 10), GapSpan(GapKind.BROKER_REJECTED, 0, 1, 6, 8)]
    assert scan.uncovered(parts) == []
    assert scan.resume().high == 10


def test_tail_that_is_whole_has_to_have_a_gap_before_its_first_record() -> None:
    scan = TailScan(is_whole=True)
    scan.record(one(3), 30, "c")
    assert scan.uncovered([]) == [GapSpan(GapKind.SEQUENCE, 0, 30, None, 3)]
    assert scan.uncovered([GapSpan(GapKind.START, 0, 30, None, 3)]) == []
    part = TailScan(is_whole=False)
    part.record(one(3), 30, "c")
    assert part.uncovered([]) == []
