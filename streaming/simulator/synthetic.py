"""A synthetic market: order flow around a fair price, matched in real books, told as the venue would.

All randomness comes from the seed, all times from the start time and a grid of 100 ms steps, so the bytes of
each stream depend on nothing else: not on how often `advance` is called, nor on who listens. (A bookTicker
stream that is listened to from some time on may begin with a top that has not just changed.)
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamforge.errors import ConfigurationError
from streaming.simulator.book import OrderBook, Side
from streaming.simulator.history import MINUTE_MS, TradeHistory
from streaming.simulator.instruments import InstrumentSpec
from streaming.simulator.latent import STEP_MS, FairPrice, LatentPrices, Spillover, spillover_graph
from streaming.simulator.protocol import CHANNELS, Formatter, stream_name
from streaming.simulator.source import BookSnapshot, Message

IDS_PER_MS = 1000
"""Ids start at start time times this, so a market that starts later never repeats one below this rate."""

_NS_PER_MS = 1_000_000
_SLOW_DEPTH_MS = 1000
_KLINE_MS = 2000
_OFFSET_RATIO = 1e-4
_ORDERS_PER_SIDE = 80
_LEAST_ORDERS_PER_SIDE = 40
_MAKERS_PER_TAKER = 1.4
_MAKERS_PER_S = 10.0
_TRADES_PER_TAKER = 1.45
_LOTS_PER_TRADE = 400.0
_MAX_ADVANCE_MS = 1000
_SLICE_MS = 10
_MESSAGES_AT_ONCE = 2_000
_DAY_MS = 86_400_000

_Numbers = NDArray[Any]
_Order = tuple[int, bool, bool, int, int]
"""One drawn order: time in the step in ms, whether it takes, whether it buys, price in ticks, lots."""


@dataclass(frozen=True, slots=True)
class SyntheticSettings:
    """What a synthetic market is made of.

    Args:
        start_ms: venue time at which it starts, milliseconds since 1970 UTC.
        seed: of all random numbers.
        trades_per_s: mean trades per second of each instrument.
        seasonality: whether activity follows the time of day.
        first_id: first trade and update id of each instrument; derived from the start time when none.
    """

    start_ms: int
    seed: int = 7
    trades_per_s: float = 5.0
    seasonality: bool = False
    first_id: int | None = None


class _InstrumentMarket:
    """One instrument: its book, its order flow and its messages."""

    def __init__(self, spec: InstrumentSpec, settings: SyntheticSettings, start_ms: int) -> None:
        first_id = settings.start_ms * IDS_PER_MS if settings.first_id is None else settings.first_id
        self.spec = spec
        self.format = Formatter(spec)
        self.book = OrderBook(first_id)
        self.history = TradeHistory(first_id)
        self._settings = settings
        self._rng = np.random.default_rng([settings.seed, zlib.crc32(spec.symbol.encode()), 3])
        self._step_ms = start_ms
        self._orders: list[_Order] = []
        self._next_order = 0
        self._order_id = 0
        self._aggregate_id = first_id - 1
        self._fair_ticks = float(spec.start_price_ticks)
        self._top: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)
        self._slow_first_update_id: int | None = None
        self._slow_bids: set[int] = set()
        self._slow_asks: set[int] = set()
        self._streams = {channel: stream_name(spec.symbol, channel) for channel in CHANNELS}

    # -- a step ---------------------------------------------------------------------------------------------

    def begin_step(self, step_ms: int, fair: FairPrice, rate_factor: float) -> None:
        """Draw the orders of the step that starts at `step_ms` and move the makers to the new fair price."""
        self._step_ms = step_ms
        self._fair_ticks = fair.price_ticks
        self._draw_orders(fair.activity, rate_factor)
        self.book.cancel_through(Side.BUY, math.ceil(fair.price_ticks))
        self.book.cancel_through(Side.SELL, math.floor(fair.price_ticks))
        for side in (Side.BUY, Side.SELL):
            missing = _LEAST_ORDERS_PER_SIDE - self.book.order_count(side)
            if missing > 0:
                for price in self._prices(self._offsets(missing), side).tolist():
                    self._order_id += 1
                    self.book.submit(self._order_id, side, price, int(_LOTS_PER_TRADE))

    def tell_step_begin(self, messages: list[Message], wanted: Container[str]) -> None:
        """Tell what the makers' move did to the top of the book."""
        if self._streams["bookTicker"] in wanted:
            self._tell_top(self._step_ms, messages)

    def play(self, end_ms: int, messages: list[Message], wanted: Container[str]) -> None:
        """Match the step's orders up to and including `end_ms`."""
        book, orders, position = self.book, self._orders, self._next_order
        end_in_step = end_ms - self._step_ms
        trades_wanted = self._streams["trade"] in wanted
        ticker_wanted = self._streams["bookTicker"] in wanted
        while position < len(orders) and orders[position][0] <= end_in_step:
            ms_in_step, takes, buys, price, lots = orders[position]
            position += 1
            side = Side.BUY if buys else Side.SELL
            self._order_id += 1
            if takes:
                self._take(side, price, lots, self._step_ms + ms_in_step, messages if trades_wanted else None)
            else:
                book.submit(self._order_id, side, price, lots)
                if book.order_count(side) > _ORDERS_PER_SIDE:
                    book.cancel_oldest(side)
            if ticker_wanted:
                self._tell_top(self._step_ms + ms_in_step, messages)
        self._next_order = position
        self.history.trim()

    def tell_step_end(self, now_ms: int, messages: list[Message], wanted: Container[str]) -> None:
        """Tell what is due at the step boundary `now_ms`: depth, and klines every two seconds."""
        changes = self.book.take_changes()
        if changes is not None:
            if self._streams["depth@100ms"] in wanted:
                self._tell("depth@100ms", changes[0], changes[1], now_ms, self.format.depth(changes, now_ms), messages)
            if self._slow_first_update_id is None:
                self._slow_first_update_id = changes.first_update_id
            self._slow_bids.update(price for price, _ in changes.bids)
            self._slow_asks.update(price for price, _ in changes.asks)
        if now_ms % _SLOW_DEPTH_MS == 0:
            self._tell_slow_depth(now_ms, messages, wanted)
        if now_ms % _KLINE_MS == 0:
            self._tell_kline(now_ms, messages, wanted)

    def snapshot(self, limit: int) -> BookSnapshot:
        book = self.book
        return self.format.snapshot(book.update_id, book.levels(Side.BUY, limit), book.levels(Side.SELL, limit))

    # -- orders ---------------------------------------------------------------------------------------------

    def _draw_orders(self, activity: float, rate_factor: float) -> None:
        settings = self._settings
        rate = settings.trades_per_s * rate_factor * math.sqrt(activity)
        if settings.seasonality:
            rate *= 1 + 0.6 * math.sin(2 * math.pi * (self._step_ms % _DAY_MS) / _DAY_MS)
        takers_per_s = rate / _TRADES_PER_TAKER
        makers_per_s = takers_per_s * _MAKERS_PER_TAKER + _MAKERS_PER_S
        rng = self._rng
        count = int(rng.poisson((takers_per_s + makers_per_s) * STEP_MS / 1000))
        times = np.sort(rng.integers(0, STEP_MS, count))
        takes = rng.random(count) < takers_per_s / (takers_per_s + makers_per_s)
        buys = rng.random(count) < 0.5  # noqa: PLR2004 - an even coin
        lots = rng.exponential(np.where(takes, _LOTS_PER_TRADE / 2, _LOTS_PER_TRADE)).astype(np.int64) + 1
        # A taker's worst price lies as far beyond the fair price as a maker's may lie behind it, and further.
        offsets = self._offsets(count)
        reaches = np.where(takes, -offsets - self._offset_ticks, offsets)
        prices = self._prices(reaches, np.where(buys, int(Side.BUY), int(Side.SELL)))
        columns = (times, takes, buys, prices, lots)
        self._orders = list(zip(*(column.tolist() for column in columns), strict=True))
        self._next_order = 0

    @property
    def _offset_ticks(self) -> float:
        return max(2.0, self._fair_ticks * _OFFSET_RATIO)

    def _offsets(self, count: int) -> _Numbers:
        return self._rng.exponential(self._offset_ticks, count)

    def _prices(self, offsets: _Numbers, side: int | _Numbers) -> _Numbers:
        """Return whole prices `offsets` ticks behind the fair price of buyers (-1) or sellers (1).

        They are rounded away from the fair price, so a maker's order never crosses it; and crossing orders
        from before have been cancelled.
        """
        away = np.floor(side * self._fair_ticks + offsets) + 1
        prices: _Numbers = np.maximum(1, side * away).astype(np.int64)
        return prices

    def _take(self, side: Side, price: int, lots: int, ts_ms: int, messages: list[Message] | None) -> None:
        fills = self.book.submit(self._order_id, side, price, lots, rests=False)
        buyer_is_maker = side is Side.SELL
        history = self.history
        trade_id = history.next_trade_id
        last_price = None
        for _, fill_price, traded in fills:
            if fill_price != last_price:
                self._aggregate_id += 1
                last_price = fill_price
            history.add((trade_id, fill_price, traded, ts_ms, buyer_is_maker, self._aggregate_id))
            if messages is not None:
                data = self.format.trade(trade_id, fill_price, traded, ts_ms, buyer_is_maker=buyer_is_maker)
                self._tell("trade", trade_id, trade_id, ts_ms, data, messages)
            trade_id += 1
        history.next_trade_id = trade_id

    # -- messages -------------------------------------------------------------------------------------------

    def _tell(  # noqa: PLR0917 - the hot path
        self, channel: str, first: int, last: int, ts_ms: int, data: str, messages: list[Message]
    ) -> None:
        messages.append(
            Message(self._streams[channel], self.spec.symbol, channel, first, last, ts_ms * _NS_PER_MS, data)
        )

    def _tell_top(self, ts_ms: int, messages: list[Message]) -> None:
        bid, ask = self.book.best(Side.BUY), self.book.best(Side.SELL)
        if bid is None or ask is None or (bid, ask) == self._top:
            return
        self._top = (bid, ask)
        update_id = self.book.update_id
        self._tell("bookTicker", update_id, update_id, ts_ms, self.format.book_ticker(update_id, bid, ask), messages)

    def _tell_slow_depth(self, now_ms: int, messages: list[Message], wanted: Container[str]) -> None:
        first = self._slow_first_update_id
        if first is None:
            return
        channels = [channel for channel in ("depth", "depth@1000ms") if self._streams[channel] in wanted]
        if channels:
            changes = self.book.sizes_of(first, self._slow_bids, self._slow_asks)
            data = self.format.depth(changes, now_ms)
            for channel in channels:
                self._tell(channel, changes.first_update_id, changes.last_update_id, now_ms, data, messages)
        self._slow_first_update_id = None
        self._slow_bids.clear()
        self._slow_asks.clear()

    def _tell_kline(self, now_ms: int, messages: list[Message], wanted: Container[str]) -> None:
        minute_ms = now_ms - now_ms % MINUTE_MS
        closed = minute_ms == now_ms
        kline = self.history.minute(minute_ms - MINUTE_MS if closed else minute_ms)
        if kline is not None and self._streams["kline_1m"] in wanted:
            data = self.format.kline(kline, now_ms, closed=closed)
            self._tell("kline_1m", kline.start_ms, kline.end_ms, now_ms, data, messages)


class SyntheticMarket:
    """A `MarketSource` of instruments with correlated, lagged, clustered price moves.

    Args:
        instruments: what is listed at the start.
        settings: seed, start and rates.
    """

    exhausted = False
    behind = False

    def __init__(self, instruments: Sequence[InstrumentSpec], settings: SyntheticSettings) -> None:
        self._settings = settings
        self._now_ms = settings.start_ms - settings.start_ms % STEP_MS
        self._step_end_ms = self._now_ms
        self._rate_factor = 1.0
        self.graph: list[Spillover] = spillover_graph([spec.symbol for spec in instruments], settings.seed)
        self._latent = LatentPrices(settings.seed, self.graph)
        self._markets: dict[str, _InstrumentMarket] = {}
        for spec in instruments:
            self.list_instrument(spec)

    def advance(self, now_ms: int, wanted: Container[str]) -> list[Message]:
        """Move towards `now_ms` until a bounded number of messages is made; messages of one stream are in order.

        Those of different streams are in order up to 10 ms.
        """
        messages: list[Message] = []
        until_ms = min(now_ms, self._now_ms + _MAX_ADVANCE_MS)
        while self._now_ms < until_ms and len(messages) < _MESSAGES_AT_ONCE:
            if self._now_ms == self._step_end_ms:
                self._begin_step()
                for market in self._markets.values():
                    market.tell_step_begin(messages, wanted)
            end_ms = min(until_ms, self._step_end_ms, self._now_ms + _SLICE_MS)
            for market in self._markets.values():
                market.play(end_ms, messages, wanted)
            if end_ms == self._step_end_ms:
                for market in self._markets.values():
                    market.tell_step_end(end_ms, messages, wanted)
            self._now_ms = end_ms
        self.behind = self._now_ms < now_ms
        return messages

    def instruments(self) -> list[InstrumentSpec]:
        """Return the listed instruments."""
        return [market.spec for market in self._markets.values()]

    def channels(self) -> Sequence[str]:
        """Return the channels of each instrument."""
        return CHANNELS

    def depth(self, symbol: str, limit: int) -> BookSnapshot:
        """Return the book of a symbol with up to `limit` levels a side."""
        return self._markets[symbol].snapshot(limit)

    def history(self, symbol: str) -> TradeHistory:
        """Return what is remembered of a symbol's trades."""
        return self._markets[symbol].history

    def set_rate_factor(self, factor: float) -> None:
        """Multiply the trade rate of every instrument, from the next step on."""
        self._rate_factor = factor

    def list_instrument(self, spec: InstrumentSpec) -> None:
        """Begin to trade an instrument, from the next step on.

        Raises:
            ConfigurationError: the symbol is listed already.
        """
        if spec.symbol in self._markets:
            msg = f"{spec.symbol} is listed already. Choose a symbol that is not in exchangeInfo"
            raise ConfigurationError(msg)
        self._latent.list_instrument(spec.symbol, spec.start_price_ticks)
        self._markets[spec.symbol] = _InstrumentMarket(spec, self._settings, self._now_ms)

    def _begin_step(self) -> None:
        fair = self._latent.step()
        for symbol, market in self._markets.items():
            market.begin_step(self._now_ms, fair[symbol], self._rate_factor)
        self._step_end_ms = self._now_ms + STEP_MS
