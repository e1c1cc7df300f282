"""The demo's market: how fast it has to be."""

from __future__ import annotations

import pytest

from streamforge.demo.market import paced_rate

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
