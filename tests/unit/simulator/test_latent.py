"""The statistics that a model is meant to find: lagged spillovers, common factor, volatility clusters."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from streaming.simulator.latent import STEPS_PER_S, LatentPrices, Spillover, spillover_graph

SYMBOLS = [f"S{number}USDT" for number in range(8)]
SECONDS = 3_000


@cache
def returns(seed: int = 3) -> tuple[list[Spillover], dict[str, NDArray[np.float64]]]:
    """Return the graph and the log returns by second of each instrument."""
    graph = spillover_graph(SYMBOLS, seed)
    latent = LatentPrices(seed, graph)
    for symbol in SYMBOLS:
        latent.list_instrument(symbol, 1_000_000)
    prices: dict[str, list[float]] = {symbol: [] for symbol in SYMBOLS}
    for step in range(SECONDS * STEPS_PER_S):
        fair = latent.step()
        if step % STEPS_PER_S == 0:
            for symbol in SYMBOLS:
                prices[symbol].append(math.log(fair[symbol].price_ticks))
    return graph, {symbol: np.diff(np.array(path)) for symbol, path in prices.items()}


def correlation(leader: NDArray[np.float64], follower: NDArray[np.float64], lag_s: int) -> float:
    return float(np.corrcoef(leader[: len(leader) - lag_s], follower[lag_s:])[0, 1])


def origins(symbol: str, graph: list[Spillover]) -> set[str]:
    """Return the symbol and everything that reaches it along the arrows."""
    return {symbol}.union(*(origins(edge.leader, graph) for edge in graph if edge.follower == symbol))


def test_spillover_each_edge_shows_as_a_lagged_correlation() -> None:
    graph, found = returns()
    assert len(graph) >= 4
    for edge in graph:
        assert correlation(found[edge.leader], found[edge.follower], edge.lag_s) > 0.25


def test_spillover_is_not_there_against_the_arrow_or_between_strangers() -> None:
    graph, found = returns()
    for edge in graph:
        assert abs(correlation(found[edge.follower], found[edge.leader], edge.lag_s)) < 0.15
    strangers = [(a, b) for a in SYMBOLS for b in SYMBOLS if not origins(a, graph) & origins(b, graph)]
    assert strangers
    for leader, follower in strangers:
        for lag_s in range(1, 9):
            assert abs(correlation(found[leader], found[follower], lag_s)) < 0.15


def test_factor_shows_as_a_correlation_at_the_same_time() -> None:
    _, found = returns()
    pairs = [correlation(found[a], found[b], 0) for a in SYMBOLS for b in SYMBOLS if a < b]
    assert float(np.mean(pairs)) > 0.03


def test_volatility_clusters() -> None:
    _, found = returns()
    sizes = np.abs(found[SYMBOLS[0]])
    for lag_s in (1, 5, 15):
        assert correlation(sizes, sizes, lag_s) > 0.05
    shuffled = np.random.default_rng(0).permutation(sizes)
    assert abs(correlation(shuffled, shuffled, 1)) < 0.05


def test_graph_is_sparse_directed_without_cycles_and_reproducible() -> None:
    graph = spillover_graph(SYMBOLS, 3)
    assert graph == spillover_graph(SYMBOLS, 3)
    assert graph != spillover_graph(SYMBOLS, 4)
    assert all(SYMBOLS.index(edge.leader) < SYMBOLS.index(edge.follower) for edge in graph)
    assert len(graph) < len(SYMBOLS)
    assert spillover_graph(SYMBOLS[:2], 3)[0].follower == SYMBOLS[1]
    assert spillover_graph(SYMBOLS[:1], 3) == []


def test_step_a_listing_does_not_change_the_others() -> None:
    def path(*, lists: bool) -> list[float]:
        latent = LatentPrices(5, [])
        latent.list_instrument("AUSDT", 10_000)
        found = []
        for step in range(50):
            if lists and step == 20:
                latent.list_instrument("BUSDT", 10_000)
            found.append(latent.step()["AUSDT"].price_ticks)
        return found

    assert path(lists=True) == path(lists=False)
