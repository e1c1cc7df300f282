"""What every loader shares: its settings, and the seam behind which a venue's protocol stands.

A loader does nothing that could fail between the socket and Kafka: it looks at the first bytes of a frame
to know its stream, looks for its ids (and goes on without them), and hands the bytes on. Everything else is
behind the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from streamforge.market.gaps import VenueIds
from streamforge.settings import Settings

LOADER_KIND = "loader"

IdsOf = Callable[[bytes], VenueIds | None]


class LoaderSettings(Settings):
    """Settings of a loader."""

    loader_buffer_bytes: int = Field(
        256 * 2**20,
        ge=2**16,
        description="Most bytes of frames (with 512 for each) that wait for the broker; beyond them frames are "
        "dropped and a gap is published.",
    )
    loader_delivery_timeout_s: float = Field(
        3600.0, gt=0, le=2_000_000, description="Seconds after which a frame that the broker did not take is given up."
    )
    loader_stop_deadline_s: float = Field(
        10.0, gt=0, description="Seconds that a stopping loader waits for acknowledgements, and again for gaps."
    )
    loader_stale_after_s: float = Field(
        30.0, gt=0, description="Seconds without a frame after which a connection that had frames is made anew."
    )
    loader_backoff_initial_s: float = Field(0.25, gt=0, description="First wait before a reconnect, in seconds.")
    loader_backoff_max_s: float = Field(30.0, gt=0, description="Longest wait before a reconnect, in seconds.")
    loader_streams_per_connection: int = Field(
        1024, ge=1, le=1024, description="Most streams of one connection; Binance allows 1024."
    )
    loader_listing_interval_s: float = Field(
        60.0, gt=0, description="Seconds between looks for new listings when every symbol is loaded."
    )
    loader_tail_records: int = Field(
        500, ge=1, description="Records at the end of each raw topic-partition that are read at start."
    )
    loader_report_interval_s: float = Field(5.0, gt=0, description="Seconds between events in queue-events.")
    loader_broker_wait_s: float = Field(
        60.0, gt=0, description="Seconds that a starting loader waits for the broker before it gives up (exit code 1)."
    )


@dataclass(frozen=True, slots=True)
class Channel:
    """One kind of stream of a venue.

    Args:
        name: the venue's name, as in the header `channel`.
        contract_id: contract of the raw topic that its frames go to.
        ids_of: finds the ids of a frame, None where the venue numbers nothing without holes.
    """

    name: str
    contract_id: str
    ids_of: IdsOf | None


@dataclass(frozen=True, slots=True)
class Listing:
    """One instrument as the venue lists it."""

    symbol: str
    instrument: str
    is_trading: bool


@dataclass(frozen=True, slots=True)
class Stream:
    """One channel of one instrument, and the name that the venue's frames give it."""

    name: bytes
    symbol: str
    instrument: str
    channel: Channel


@dataclass(frozen=True, slots=True)
class Answer:
    """What the venue said to a message of ours: the message's number, and why it refused."""

    message_id: int
    refusal: str | None


class Venue(Protocol):
    """A venue's protocol: names, messages and the first bytes of a frame; no socket."""

    label: str
    channels: Mapping[str, Channel]

    def stream(self, listing: Listing, channel: Channel) -> Stream:
        """Return the stream of `channel` for a listing."""

    def websocket_url(self, base_url: str) -> str:
        """Return the URL to connect to."""

    def subscribe_messages(self, streams: Sequence[Stream], first_id: int) -> list[bytes]:
        """Return the messages that subscribe `streams`, numbered from `first_id`."""

    def stream_name(self, frame: bytes) -> bytes | None:
        """Return the stream's name from the frame's first bytes, None where it cannot be told."""

    def answer(self, frame: bytes) -> Answer | None:
        """Return which message `frame` answers and how, None where it is not an answer."""

    async def listings(self, rest_url: str) -> Mapping[str, Listing]:
        """Return every listing of the venue by symbol."""
