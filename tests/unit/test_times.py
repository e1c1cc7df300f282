"""Times as nanoseconds and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from streamforge.times import from_ns, iso_text, to_ns


@given(st.datetimes(timezones=st.just(UTC)))
def test_time_comes_back_from_nanoseconds_exactly(moment: datetime) -> None:
    assert from_ns(to_ns(moment)) == moment


def test_offsets_are_taken_to_utc_and_nanoseconds_are_cut() -> None:
    there = datetime(2020, 10, 23, 11, tzinfo=timezone(timedelta(hours=3)))
    assert to_ns(there) == 1_603_440_000_000_000_000
    assert iso_text(1_603_440_000_000_001_999) == "2020-10-23T08:00:00.000001+00:00"
