"""Nanoseconds since 1970 UTC and `datetime`, exactly: no float in between. A `datetime` holds microseconds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_ns(moment: datetime) -> int:
    """Return a time that knows its offset from UTC as nanoseconds."""
    return (moment - _EPOCH) // _MICROSECOND * 1_000


def from_ns(time_ns: int) -> datetime:
    """Return nanoseconds as a time in UTC; less than a microsecond is cut off."""
    return _EPOCH + timedelta(microseconds=time_ns // 1_000)


def iso_text(time_ns: int) -> str:
    """Return nanoseconds as ISO 8601 text in UTC; less than a microsecond is cut off."""
    return from_ns(time_ns).isoformat()
