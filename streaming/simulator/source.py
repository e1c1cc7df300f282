"""What the servers need from a market, synthetic or recorded, and the message that passes between them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Protocol

import msgspec

from streaming.simulator.history import TradeHistory
from streaming.simulator.instruments import InstrumentSpec
from streaming.simulator.latent import Spillover


class Message(msgspec.Struct, frozen=True, gc=False):
    """One event of one stream.

    Args:
        stream: the venue's stream name, for instance `btcusdt@trade`.
        symbol: instrument in capital letters.
        channel: stream name behind the `@`.
        first_id: trade id, first update id (U), update id of a bookTicker or start of a kline.
        last_id: trade id, last update id (u), update id of a bookTicker or end of a kline.
        ts_event_ns: the venue's event time; where the venue sends none, the time of the cause.
        data: the payload of a raw stream, JSON text.
        combined: the payload of a combined stream, where it is not to be made from `data`.
    """

    stream: str
    symbol: str
    channel: str
    first_id: int
    last_id: int
    ts_event_ns: int
    data: str
    combined: str | None = None


class BookSnapshot(msgspec.Struct, frozen=True):
    """A depth answer: levels as text, best first."""

    last_update_id: int
    bids: Sequence[tuple[str, str]]
    asks: Sequence[tuple[str, str]]


class MarketSource(Protocol):
    """A market that is moved forward in time and can be asked what it remembers."""

    @property
    def graph(self) -> Sequence[Spillover]:
        """Return the true lagged spillovers between instruments; empty where nobody knows them."""

    @property
    def exhausted(self) -> bool:
        """Return whether no message will ever come again."""

    @property
    def behind(self) -> bool:
        """Return whether another `advance` at the same time would give more messages."""

    def advance(self, now_ms: int, wanted: Container[str]) -> Iterable[Message]:
        """Move to `now_ms` and return the messages of the `wanted` streams until then, oldest first.

        No event time is later than `now_ms`.
        """

    def instruments(self) -> Sequence[InstrumentSpec]:
        """Return the listed instruments."""

    def channels(self) -> Sequence[str]:
        """Return the channels that an instrument has streams of."""

    def depth(self, symbol: str, limit: int) -> BookSnapshot:
        """Return the book of a listed symbol as of the last `advance`."""

    def history(self, symbol: str) -> TradeHistory:
        """Return what is remembered of a listed symbol's trades."""

    def set_rate_factor(self, factor: float) -> None:
        """Make the market that many times as busy as its settings say, from now on."""

    def list_instrument(self, spec: InstrumentSpec) -> None:
        """Begin to trade a new instrument.

        Raises:
            ConfigurationError: the symbol is listed already, or this source cannot list any.
        """
