"""A simulated market begins to move only once it is known whether it was paused."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from streamforge.errors import RetryableSourceError, StreamForgeError
from streaming.simulator.control import KafkaControl
from streaming.simulator.instruments import default_instruments
from streaming.simulator.process import SimulatorPlan, run_simulator
from streaming.simulator.server import MarketServer
from streaming.simulator.settings import SimulatorSettings
from streaming.simulator.synthetic import SyntheticMarket, SyntheticSettings


class Silent:
    """A control that has not heard anything yet: it stops the market and says how it found it."""

    found_paused: bool | None = None

    async def run(self, server: MarketServer) -> None:
        """Note the state and stop."""
        self.found_paused = server.paused
        server.stop()

    def close(self, error: StreamForgeError | None) -> None:
        """Do nothing."""


def market() -> SyntheticMarket:
    return SyntheticMarket(default_instruments(1), SyntheticSettings(start_ms=1_700_000_040_000))


def test_market_with_a_control_begins_paused() -> None:
    control = Silent()
    settings = SimulatorSettings(_env_file=None)  # type: ignore[call-arg]
    asyncio.run(run_simulator(market(), settings, SimulatorPlan(), control=control))
    assert control.found_paused is True


def test_market_stands_still_and_ends_where_queue_control_cannot_be_read(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # accepts connections and never answers
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        settings = SimulatorSettings(_env_file=None, bootstrap_servers=address, home=tmp_path)  # type: ignore[call-arg]
        server = MarketServer(market(), settings)
        control = KafkaControl(settings, "0", control_timeout_s=0)
        with pytest.raises(RetryableSourceError, match="queue-control was not read to its end") as caught:
            asyncio.run(control.run(server))
        assert server.paused
        control.close(caught.value)
