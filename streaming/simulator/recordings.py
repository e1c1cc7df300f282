"""Recorded spot messages as a market: the bytes of each message as the venue sent them, at any speed.

A file holds one message a line, `<receive time ns> <JSON>`, gzipped; `spot_<symbol>_<date>.gz` of one symbol
continue one another. A line with `lastUpdateId` is the depth snapshot that was taken by REST at that time.
"""

from __future__ import annotations

import gzip
import heapq
import itertools
import zlib
from collections.abc import Container, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from streamforge.errors import ConfigurationError
from streaming.simulator.history import TradeHistory
from streaming.simulator.instruments import VENUE_DECIMALS, InstrumentSpec, known_instrument
from streaming.simulator.latent import Spillover
from streaming.simulator.source import BookSnapshot, Message

FOLDER = "ws_binance"
PATTERN = "spot_*.gz"

_NS_PER_MS = 1_000_000
_MESSAGES_AT_ONCE = 500
_LINES_TO_SNAPSHOT = 5_000
_DATA_MARK = '"data":'

Line = tuple[int, str, str]
"""Receive time in nanoseconds, symbol, text."""


class _Payload(
    msgspec.Struct, frozen=True, rename={"event": "e", "ts_event_ms": "E", "trade_id": "t", "ts_trade_ms": "T"}
):
    """The parts of any spot payload that the market must know; `b` and `a` are levels or a price."""

    s: str = ""
    event: str = ""
    ts_event_ms: int = 0
    trade_id: int = 0
    ts_trade_ms: int = 0
    U: int = 0
    u: int = 0
    p: str = ""
    q: str = ""
    m: bool = False
    b: Any = ()
    a: Any = ()


class _Frame(msgspec.Struct, frozen=True, rename={"last_update_id": "lastUpdateId"}):
    """A combined frame, or the depth snapshot."""

    stream: str = ""
    data: _Payload = _Payload()
    last_update_id: int = 0
    bids: list[tuple[str, str]] = []
    asks: list[tuple[str, str]] = []


_DECODER = msgspec.json.Decoder(_Frame)


class _RecordedBook:
    """A book kept from a snapshot and the deltas behind it; prices and sizes stay text."""

    def __init__(self, snapshot: _Frame) -> None:
        self.last_update_id = snapshot.last_update_id
        self._bids = dict(snapshot.bids)
        self._asks = dict(snapshot.asks)

    def apply(self, payload: _Payload) -> None:
        """Apply one delta; those that the snapshot holds already are passed over."""
        if payload.u <= self.last_update_id:
            return
        self.last_update_id = payload.u
        for side, levels in ((self._bids, payload.b), (self._asks, payload.a)):
            for price, size in levels:
                if Decimal(size):
                    side[price] = size
                else:
                    side.pop(price, None)

    def snapshot(self, limit: int) -> BookSnapshot:
        bids = heapq.nlargest(limit, self._bids.items(), key=_price)
        asks = heapq.nsmallest(limit, self._asks.items(), key=_price)
        return BookSnapshot(self.last_update_id, bids, asks)


class _RecordedInstrument:
    """What is remembered of one symbol."""

    def __init__(self, spec: InstrumentSpec, snapshot: _Frame, first_trade_id: int) -> None:
        self.spec = spec
        self.book = _RecordedBook(snapshot)
        self.history = TradeHistory(first_trade_id)
        self._aggregate_id = 0
        self._last: tuple[str, int, bool] | None = None

    def add_trade(self, payload: _Payload) -> None:
        """Remember a trade; after a hole in the ids only what follows is kept."""
        if payload.trade_id != self.history.next_trade_id:
            self.history = TradeHistory(payload.trade_id)
        taker = (payload.p, payload.ts_trade_ms, payload.m)
        if taker != self._last:
            self._last = taker
            self._aggregate_id += 1
        price = _whole(payload.p, self.spec.price_decimals)
        lots = _whole(payload.q, self.spec.lot_decimals)
        self.history.add((payload.trade_id, price, lots, payload.ts_trade_ms, payload.m, self._aggregate_id))
        self.history.trim()


class RecordedMarket:
    """A `MarketSource` that replays recorded spot messages.

    Args:
        recordings_dir: folder that has `ws_binance/`.
        speed: recorded seconds per second; 0: as fast as `advance` is called.

    Raises:
        ConfigurationError: no recordings there, or a file that cannot be read.
    """

    def __init__(self, recordings_dir: Path, *, speed: float = 1.0) -> None:
        if speed < 0:
            msg = f"speed must be 0 (as fast as possible) or above, found {speed}"
            raise ConfigurationError(msg)
        files: dict[str, list[Path]] = {}
        for file in sorted((recordings_dir / FOLDER).glob(PATTERN)):
            files.setdefault(file.name.split("_")[1].upper(), []).append(file)
        if not files:
            msg = (
                f"no recordings in {recordings_dir}: expected files {FOLDER}/{PATTERN} below it. Set "
                "STREAMFORGE_RECORDINGS_DIR or --recordings-dir to the folder, or use --source synthetic"
            )
            raise ConfigurationError(msg)
        self.graph: Sequence[Spillover] = ()
        self.exhausted = False
        self.behind = False
        self._speed = speed
        self._factor = 1.0
        self._instruments = {symbol: _opened(symbol, paths) for symbol, paths in files.items()}
        lines = [_lines(symbol, paths) for symbol, paths in files.items()]
        self._lines = heapq.merge(*lines, key=lambda line: line[0])
        self._next: Line | None = next(self._lines, None)
        self._anchor: tuple[int, int] | None = None

    def advance(self, now_ms: int, wanted: Container[str]) -> Iterator[Message]:
        """Yield the messages that are due, a bounded number at once."""
        until_ns = self._recorded_ns(now_ms)
        for _ in range(_MESSAGES_AT_ONCE):
            line = self._next
            if line is None or (until_ns is not None and line[0] > until_ns):
                self.behind = False
                break
            self._next = next(self._lines, None)
            message = self._pass(line)
            if message is not None and message.stream in wanted:
                yield message
        else:
            self.behind = True
        self.exhausted = self._next is None
        self.behind = self.behind and not self.exhausted

    def instruments(self) -> list[InstrumentSpec]:
        """Return the recorded instruments."""
        return [item.spec for item in self._instruments.values()]

    def channels(self) -> Sequence[str]:
        """Return the recorded channels."""
        return ("trade", "depth@100ms", "bookTicker")

    def depth(self, symbol: str, limit: int) -> BookSnapshot:
        """Return the recorded snapshot with what followed until now."""
        return self._instruments[symbol].book.snapshot(limit)

    def history(self, symbol: str) -> TradeHistory:
        """Return the recorded trades until now."""
        return self._instruments[symbol].history

    def set_rate_factor(self, factor: float) -> None:
        """Replay that many times as fast as the speed says; without effect at speed 0."""
        self._anchor = None
        self._factor = factor

    def list_instrument(self, spec: InstrumentSpec) -> None:
        """Refuse: what was not recorded cannot be listed.

        Raises:
            ConfigurationError: always.
        """
        msg = f"cannot list {spec.symbol}: recordings are replayed. Use --source synthetic for listings"
        raise ConfigurationError(msg)

    def _recorded_ns(self, now_ms: int) -> int | None:
        """Return the recorded time that `now_ms` stands for; none: everything is due."""
        if self._speed == 0 or self._next is None:
            return None
        if self._anchor is None:
            self._anchor = (now_ms, self._next[0])
        return self._anchor[1] + int((now_ms - self._anchor[0]) * _NS_PER_MS * self._speed * self._factor)

    def _pass(self, line: Line) -> Message | None:
        """Take one line into what is remembered and return its message."""
        receive_ns, symbol, text = line
        frame = _decoded(text, symbol)
        if frame.last_update_id:
            return None
        payload = frame.data
        instrument = self._instruments[symbol]
        first, last = payload.u, payload.u
        if payload.event == "trade":
            first = last = payload.trade_id
            instrument.add_trade(payload)
        elif payload.event == "depthUpdate":
            first = payload.U
            instrument.book.apply(payload)
        ts_event_ns = payload.ts_event_ms * _NS_PER_MS or receive_ns
        data = text[text.index(_DATA_MARK) + len(_DATA_MARK) : -1]
        channel = frame.stream.partition("@")[2]
        return Message(frame.stream, symbol, channel, first, last, ts_event_ns, data, text)


def _opened(symbol: str, paths: list[Path]) -> _RecordedInstrument:
    """Read ahead to the depth snapshot and the first trade of a symbol."""
    snapshot: _Frame | None = None
    first_trade_id: int | None = None
    for _, _, text in itertools.islice(_lines(symbol, paths), _LINES_TO_SNAPSHOT):
        frame = _decoded(text, symbol)
        if frame.last_update_id and snapshot is None:
            snapshot = frame
        if frame.data.event == "trade" and first_trade_id is None:
            first_trade_id = frame.data.trade_id
        if snapshot is not None and first_trade_id is not None:
            return _RecordedInstrument(known_instrument(symbol), snapshot, first_trade_id)
    msg = (
        f"{paths[0]}: no depth snapshot and trade in its first {_LINES_TO_SNAPSHOT} lines. "
        "Expected a recording that begins with a line that has lastUpdateId"
    )
    raise ConfigurationError(msg)


def _lines(symbol: str, paths: list[Path]) -> Iterator[Line]:
    for path in paths:
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
                for line in file:
                    receive_ns, _, text = line.rstrip("\n").partition(" ")
                    yield int(receive_ns), symbol, text
        except (OSError, EOFError, ValueError, zlib.error) as error:
            msg = f"{path}: not a recording (gzip, lines of receive time and JSON): {error}"
            raise ConfigurationError(msg) from error


def _decoded(text: str, symbol: str) -> _Frame:
    try:
        return _DECODER.decode(text)
    except msgspec.MsgspecError as error:
        msg = f"recording of {symbol}: a line is no spot message: {error}; it begins with {text[:80]!r}"
        raise ConfigurationError(msg) from error


def _price(level: tuple[str, str]) -> Decimal:
    return Decimal(level[0])


def _whole(text: str, decimals: int) -> int:
    """Return `text` in units of its last kept decimal; exact, since the venue's text has eight."""
    number = int(text.replace(".", ""))
    scale: int = 10 ** (VENUE_DECIMALS - decimals)
    whole, rest = divmod(number, scale)
    if rest:
        msg = f"{text} has more than {decimals} decimals"
        raise ConfigurationError(msg)
    return whole
