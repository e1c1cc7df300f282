"""Settings of the simulated market's servers."""

from __future__ import annotations

from pydantic import Field

from streamforge.settings import Settings


class SimulatorSettings(Settings):
    """How the simulated venue behaves; the defaults are the real venue's."""

    simulator_host: str = Field("127.0.0.1", description="Address that both servers listen on.")
    simulator_ws_port: int = Field(0, ge=0, le=65_535, description="Port of the WebSocket server; 0: a free one.")
    simulator_rest_port: int = Field(0, ge=0, le=65_535, description="Port of the REST server; 0: a free one.")
    simulator_tick_ms: int = Field(10, ge=1, description="How often messages are sent, milliseconds.")
    simulator_ping_interval_s: float = Field(20.0, gt=0, description="Seconds between the server's pings.")
    simulator_pong_timeout_s: float = Field(60.0, gt=0, description="Seconds after which a missing pong disconnects.")
    simulator_max_age_s: float = Field(86_400.0, gt=0, description="Seconds after which a connection is ended.")
    simulator_max_streams: int = Field(1024, ge=1, description="Streams that one connection may have.")
    simulator_max_incoming_per_s: int = Field(5, ge=1, description="Messages per second that a client may send.")
    simulator_max_buffer_bytes: int = Field(
        8 * 1024 * 1024, ge=1024, description="Bytes that may wait for a slow client before it is disconnected."
    )
    simulator_resume_buffer_bytes: int = Field(
        1024 * 1024,
        ge=1024,
        description="A market that runs faster than time waits while more bytes than this wait for a client.",
    )
    simulator_weight_limit: int = Field(6_000, ge=1, description="Request weight that one address has per minute.")
    simulator_ban_after: int = Field(10, ge=1, description="Refused requests in one minute after which 418 follows.")
    simulator_ban_s: int = Field(120, ge=1, description="Seconds that a ban lasts.")
    simulator_ledger_flush_ms: int = Field(
        200, ge=0, description="Age at which ledger rows are written; 0: before their messages are sent."
    )
