"""Fair prices that the order flow follows: one market factor, lagged spillovers, clustered volatility.

Every step, instrument i's log fair price moves by

    beta_i * s_m * f  +  u_i  +  sum over leaders j of  weight_ji * u_j(lag_ji earlier),    u_i = s_i * e_i

with standard normal f and e_i. The own shocks u of a leader come back in its followers after the lag: this is
the directed graph that a model can find. The scales s are log-normal with a slow AR(1) logarithm (volatility
clusters). Spillovers carry own shocks only, so the graph cannot feed back on itself.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

STEP_MS = 100
STEPS_PER_S = 1000 // STEP_MS

_BLOCK_STEPS = 600
_VOLATILITY_PER_DAY = 0.06
_STEP_SCALE = _VOLATILITY_PER_DAY / math.sqrt(86_400 * STEPS_PER_S)
_FACTOR_SHARE = 0.35
_CLUSTER_HALF_LIFE_S = 90.0
_CLUSTER_PERSISTENCE: float = 0.5 ** (1 / (_CLUSTER_HALF_LIFE_S * STEPS_PER_S))
_CLUSTER_DEVIATION = 0.6
_MAX_LAG_S = 8
_FOLLOWER_PROBABILITY = 0.75
_REVERSION_PER_STEP = 2e-6


class Spillover(NamedTuple):
    """One edge of the true graph: `weight` of the leader's own shocks reach the follower `lag_s` later."""

    leader: str
    follower: str
    lag_s: int
    weight: float


class FairPrice(NamedTuple):
    """Fair price now, and the present volatility over its long-run mean."""

    price_ticks: float
    activity: float


def spillover_graph(symbols: list[str], seed: int) -> list[Spillover]:
    """Return a sparse directed graph without cycles over `symbols`; the same for the same seed.

    The second symbol always follows the first, so that two instruments are enough to find an edge.
    """
    rng = np.random.default_rng([seed, 1])
    edges = []
    for index in range(1, len(symbols)):
        follows, leader, lag, weight = rng.random(4).tolist()
        if index == 1 or follows < _FOLLOWER_PROBABILITY:
            edges.append(
                Spillover(
                    symbols[int(leader * index)],
                    symbols[index],
                    1 + int(lag * _MAX_LAG_S),
                    round(0.6 + 0.4 * weight, 2),
                )
            )
    return edges


class _Shocks:
    """Standard normal numbers of one source, drawn in blocks from its own generator."""

    __slots__ = ("_block", "_rng")

    def __init__(self, seed: int, name: str) -> None:
        self._rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        self._block: deque[tuple[float, float]] = deque()

    def draw(self) -> tuple[float, float]:
        if not self._block:
            self._block.extend(map(tuple, self._rng.standard_normal((_BLOCK_STEPS, 2)).tolist()))
        return self._block.popleft()


@dataclass(slots=True)
class _State:
    """One instrument's moving parts; `own_shocks` holds the latest first."""

    shocks: _Shocks
    start_log_price: float
    log_price: float
    beta: float
    log_scale: float
    own_shocks: deque[float]
    leaders: list[tuple[str, int, float]]


class LatentPrices:
    """Move all fair prices step by step; every instrument's path depends on the seed alone.

    Args:
        seed: of all random numbers.
        graph: the spillovers; edges of symbols that are not listed yet wait for them.
    """

    def __init__(self, seed: int, graph: list[Spillover]) -> None:
        self._seed = seed
        self._graph = graph
        self._market = _Shocks(seed, "market factor")
        self._market_log_scale = 0.0
        self._states: dict[str, _State] = {}

    def list_instrument(self, symbol: str, start_price_ticks: int) -> None:
        """Begin the path of an instrument."""
        rng = np.random.default_rng([self._seed, zlib.crc32(symbol.encode()), 2])
        log_price = math.log(start_price_ticks)
        self._states[symbol] = _State(
            shocks=_Shocks(self._seed, symbol),
            start_log_price=log_price,
            log_price=log_price,
            beta=float(rng.uniform(0.7, 1.3)),
            log_scale=0.0,
            own_shocks=deque([0.0] * (_MAX_LAG_S * STEPS_PER_S + 1), maxlen=_MAX_LAG_S * STEPS_PER_S + 1),
            leaders=[
                (edge.leader, edge.lag_s * STEPS_PER_S, edge.weight) for edge in self._graph if edge.follower == symbol
            ],
        )

    def step(self) -> dict[str, FairPrice]:
        """Move every instrument by one step and return the fair prices."""
        factor, innovation = self._market.draw()
        self._market_log_scale = _next_log_scale(self._market_log_scale, innovation)
        market_move = _FACTOR_SHARE * _scale(self._market_log_scale) * factor
        for state in self._states.values():
            own, innovation = state.shocks.draw()
            state.log_scale = _next_log_scale(state.log_scale, innovation)
            state.own_shocks.appendleft(_scale(state.log_scale) * own)
        fair = {}
        for symbol, state in self._states.items():
            move = state.beta * market_move + state.own_shocks[0]
            for leader, lag_steps, weight in state.leaders:
                if leader in self._states:
                    move += weight * self._states[leader].own_shocks[lag_steps]
            pull = _REVERSION_PER_STEP * (state.start_log_price - state.log_price)
            state.log_price += move + pull
            fair[symbol] = FairPrice(math.exp(state.log_price), math.exp(state.log_scale))
        return fair


def _next_log_scale(log_scale: float, innovation: float) -> float:
    spread = _CLUSTER_DEVIATION * math.sqrt(1 - _CLUSTER_PERSISTENCE**2)
    return _CLUSTER_PERSISTENCE * log_scale + spread * innovation


def _scale(log_scale: float) -> float:
    return _STEP_SCALE * math.exp(log_scale - _CLUSTER_DEVIATION**2)
