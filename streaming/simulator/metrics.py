"""The simulator's figures: for its events, and for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from streaming.simulator.server import MarketServer

KIND = "simulator"


def counters(server: MarketServer) -> dict[str, float]:
    """Return every count by name."""
    return {
        "messages_sent_total": float(server.messages_sent),
        "connections_total": float(server.connections_total),
    }


class MarketCollector(Collector):
    """Reads the server's counters when Prometheus asks, so that counting costs nothing per message."""

    def __init__(self, server: MarketServer) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Yield one counter for each count."""
        for name, value in counters(self._server).items():
            text = f"Simulator: {name.removesuffix('_total').replace('_', ' ')}."
            yield CounterMetricFamily(f"streamforge_simulator_{name}", text, value=value)
