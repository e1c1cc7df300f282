"""Which retention gaps are still open, as values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streamforge.retention_gaps import ConsumerKind, GapState, open_gaps
from tests.gaps_support import GAP

ACCEPTED = replace(GAP, state=GapState.ACCEPTED)


def test_gap_that_was_noticed_again_with_a_later_end_is_open_once() -> None:
    longer = replace(GAP, end_offset=25)
    assert open_gaps([GAP, longer, replace(GAP, end_offset=22)]) == [longer]


def test_gap_is_closed_when_what_was_accepted_holds_all_of_it() -> None:
    assert open_gaps([GAP, replace(ACCEPTED, end_offset=25)]) == []
    assert open_gaps([GAP, ACCEPTED]) == []


@pytest.mark.parametrize(
    "other",
    [
        {"end_offset": 19},
        {"start_offset": 11},
        {"source_partition": 4},
        {"topic_id": "id-2"},
        {"consumer": "market.bars"},
        {"consumer_kind": ConsumerKind.GROUP},
    ],
)
def test_gap_stays_open_where_less_or_another_was_accepted(other: dict[str, object]) -> None:
    assert open_gaps([GAP, replace(ACCEPTED, **other)]) == [GAP]  # type: ignore[arg-type]


def test_gap_id_is_the_same_for_whoever_notices_it_and_another_for_another_range() -> None:
    again = replace(GAP, detected_by="writer.1", detail="gone, said otherwise", records_removed=7)
    assert again.gap_id == GAP.gap_id
    others = [replace(GAP, end_offset=21), replace(GAP, topic_id="id-2"), replace(GAP, source_partition=4)]
    assert len({gap.gap_id for gap in (GAP, *others)}) == 4
