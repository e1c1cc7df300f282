from __future__ import annotations

import pytest

from streaming.simulator.weights import WeightLimiter, request_weight

MINUTE_NS = 60_000_000_000
START_NS = 1_700_000_040 * 1_000_000_000


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now_ns = START_NS

    def __call__(self) -> int:
        """Return the time."""
        return self.now_ns


@pytest.mark.parametrize(
    ("limit", "weight"),
    [(None, 5), ("100", 5), ("101", 25), ("500", 25), ("501", 50), ("1000", 50), ("1001", 250), ("99999", 250)],
)
def test_request_weight_of_depth_goes_by_its_limit(limit: str | None, weight: int) -> None:
    assert request_weight("/api/v3/depth", limit) == weight


@pytest.mark.parametrize(
    ("path", "weight"),
    [("ping", 1), ("time", 1), ("exchangeInfo", 20), ("trades", 25), ("historicalTrades", 25), ("klines", 2)],
)
def test_request_weight_of_routes_is_the_documented_one(path: str, weight: int) -> None:
    assert request_weight(f"/api/v3/{path}", None) == weight


def test_admit_up_to_the_limit_then_refuses_until_the_minute_is_over() -> None:
    clock = Clock()
    limiter = WeightLimiter(10, 3, 60, clock)
    assert [limiter.admit("a", 5).status for _ in range(3)] == [200, 200, 429]
    clock.now_ns += 20 * 1_000_000_000
    verdict = limiter.admit("a", 1)
    assert (verdict.status, verdict.used_weight) == (429, 16)
    # START_NS is a whole minute: 40 s are left of it.
    assert 40 <= verdict.retry_after_s <= 41
    clock.now_ns = START_NS + MINUTE_NS
    assert limiter.admit("a", 1).status == 200


def test_admit_refused_too_often_bans_for_its_time() -> None:
    clock = Clock()
    limiter = WeightLimiter(1, 2, 90, clock)
    assert [limiter.admit("a", 1).status for _ in range(5)] == [200, 429, 429, 418, 418]
    clock.now_ns += MINUTE_NS
    verdict = limiter.admit("a", 1)
    assert verdict.status == 418
    assert verdict.banned_until_ms == (START_NS + 90 * 1_000_000_000) // 1_000_000
    clock.now_ns += MINUTE_NS
    assert limiter.admit("a", 1).status == 200


def test_admit_another_address_is_counted_apart() -> None:
    limiter = WeightLimiter(1, 2, 90, Clock())
    assert limiter.admit("a", 1).status == 200
    assert limiter.admit("b", 1).status == 200
