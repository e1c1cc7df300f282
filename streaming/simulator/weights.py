"""The venue's request weights: how much each route costs, and what an address that asks too much is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_MINUTE_S = 60
_DEPTH_WEIGHTS = ((100, 5), (500, 25), (1000, 50), (5000, 250))

ROUTE_WEIGHTS: Mapping[str, int] = {
    "/api/v3/ping": 1,
    "/api/v3/time": 1,
    "/api/v3/exchangeInfo": 20,
    "/api/v3/trades": 25,
    "/api/v3/historicalTrades": 25,
    "/api/v3/aggTrades": 4,
    "/api/v3/klines": 2,
}


def request_weight(path: str, limit: str | None) -> int:
    """Return the weight of a request; `/depth` costs by its limit."""
    if path != "/api/v3/depth":
        return ROUTE_WEIGHTS.get(path, 1)
    wanted = int(limit) if limit is not None and limit.isdecimal() else 100
    return next((weight for most, weight in _DEPTH_WEIGHTS if wanted <= most), _DEPTH_WEIGHTS[-1][1])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a request: status 200, 429 or 418, the weight used this minute, and when to come back."""

    status: int
    used_weight: int
    retry_after_s: int = 0
    banned_until_ms: int = 0


@dataclass(slots=True)
class _Address:
    minute: int = -1
    used_weight: int = 0
    refused: int = 0
    banned_until_s: float = 0.0


class WeightLimiter:
    """Count request weight by address and minute.

    Args:
        limit: weight that an address has per minute.
        ban_after: refused requests in one minute after which the address is banned.
        ban_s: seconds a ban lasts.
        clock_ns: venue time.
    """

    def __init__(self, limit: int, ban_after: int, ban_s: int, clock_ns: Callable[[], int]) -> None:
        self._limit = limit
        self._ban_after = ban_after
        self._ban_s = ban_s
        self._clock_ns = clock_ns
        self._addresses: dict[str, _Address] = {}

    def admit(self, address: str, weight: int) -> Verdict:
        """Count one request of `address` and say whether it is served."""
        now_s = self._clock_ns() / 1e9
        state = self._addresses.setdefault(address, _Address())
        minute = int(now_s // _MINUTE_S)
        if state.minute != minute:
            state.minute, state.used_weight, state.refused = minute, 0, 0
        if now_s < state.banned_until_s:
            return self._banned(state, now_s)
        state.used_weight += weight
        if state.used_weight <= self._limit:
            return Verdict(200, state.used_weight)
        state.refused += 1
        if state.refused > self._ban_after:
            state.banned_until_s = now_s + self._ban_s
            return self._banned(state, now_s)
        return Verdict(429, state.used_weight, int((minute + 1) * _MINUTE_S - now_s) + 1)

    @staticmethod
    def _banned(state: _Address, now_s: float) -> Verdict:
        return Verdict(418, state.used_weight, int(state.banned_until_s - now_s) + 1, int(state.banned_until_s * 1000))
