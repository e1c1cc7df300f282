"""The demo's market: how fast it has to be."""

from __future__ import annotations

import pytest

from streamforge.demo.market import paced_rate
from streamforge.demo.phases import PhaseClock

EVENTS = 100_000
MINUTE_S = 60.0


@pytest.mark.parametrize("second", range(60))
def test_paced_market_has_its_events_when_a_minute_is_over(second: int) -> None:
    now_s = 1_800_000_000.0 + second
    rate = paced_rate(EVENTS, now_s)
    # It sends for less than a minute and a half a minute, and ends with a minute.
    sends_s = EVENTS / rate
    assert 25.0 <= sends_s < 25.0 + MINUTE_S
    started_s = now_s + 15.0
    assert (started_s + sends_s) % MINUTE_S == pytest.approx(0.0, abs=1e-4)


def test_paced_market_is_never_faster_than_a_laptop_takes_in() -> None:
    assert paced_rate(10_000_000, 1_800_000_000.0) == 5_000.0


def test_a_phase_that_is_entered_again_goes_on_and_every_second_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("streamforge.demo.phases.time.monotonic", lambda: now_s[0])
    clock = PhaseClock()
    for phase, seconds in (("market", 2.0), ("dagster", 1.0), ("verify", 4.0), ("dagster", 8.0)):
        clock.enter(phase)
        now_s[0] += seconds
    clock.stop()
    assert clock.phases == {"market": 2.0, "dagster": 9.0, "verify": 4.0}
    assert clock.total_s == 15.0
