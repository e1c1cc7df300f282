"""What a loader is asked to load, and which streams that is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamforge.errors import ConfigurationError
from streaming.loaders.base import Channel, Listing, Stream, Venue

_NEAR_MATCHES = 3


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load.

    Args:
        venue: the venue's protocol, with its label.
        websocket_url: base URL of its WebSocket streams.
        rest_url: base URL of its REST interface.
        symbols: symbols as the venue writes them; None for every symbol that trades, new listings included.
        channels: names of channels.
        slot: replica name, stable over restarts.
        metrics_port: port of metrics and readiness; 0 takes a free one, None serves none.
        duration_s: stop after so many seconds.
        max_frames: stop after at least so many frames.
    """

    venue: Venue
    websocket_url: str
    rest_url: str
    symbols: tuple[str, ...] | None
    channels: tuple[str, ...]
    slot: str = "0"
    metrics_port: int | None = None
    duration_s: float | None = None
    max_frames: int | None = None


def choose_channels(request: LoadRequest) -> list[Channel]:
    """Return the channels asked for.

    Raises:
        ConfigurationError: the venue has no such channel, or none was asked for.
    """
    known = request.venue.channels
    if not request.channels:
        msg = f"no channel to load; --channels takes some of: {', '.join(known)}"
        raise ConfigurationError(msg)
    for name in request.channels:
        if name not in known:
            msg = f"channel {name!r} is unknown{_near(name, known)}; known are: {', '.join(known)}"
            raise ConfigurationError(msg)
    return [known[name] for name in dict.fromkeys(request.channels)]


def choose_listings(request: LoadRequest, listings: Mapping[str, Listing]) -> list[Listing]:
    """Return the listings asked for: the named ones, or all that trade.

    Raises:
        ConfigurationError: a symbol is not listed (the message names near ones), or none was asked for.
    """
    if request.symbols is None:
        return sorted((item for item in listings.values() if item.is_trading), key=lambda item: item.symbol)
    if not request.symbols:
        msg = "no symbol to load; --symbols takes a list such as BTCUSDT,ETHUSDT, or all"
        raise ConfigurationError(msg)
    for symbol in request.symbols:
        if symbol not in listings:
            msg = (
                f"{request.venue.label} does not list {symbol!r}{_near(symbol, listings)}. "
                f"It lists {len(listings)} symbols at {request.rest_url}; --symbols all takes every one that trades"
            )
            raise ConfigurationError(msg)
    return [listings[symbol] for symbol in dict.fromkeys(request.symbols)]


def streams_of(venue: Venue, listings: Sequence[Listing], channels: Sequence[Channel]) -> list[Stream]:
    """Return the streams of every channel of every listing."""
    return [venue.stream(listing, channel) for listing in listings for channel in channels]


def _near(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name.upper(), known, n=_NEAR_MATCHES, cutoff=0.5)
    near = near or difflib.get_close_matches(name, known, n=_NEAR_MATCHES, cutoff=0.3)
    return f" (did you mean {', '.join(near)}?)" if near else ""
