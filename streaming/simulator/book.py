"""A limit order book with price-time priority: integers in, fills out, nothing else."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Side(IntEnum):
    """Side of an order; the value is the sign that makes a lower key a better price."""

    BUY = -1
    SELL = 1


class Fill(NamedTuple):
    """One execution at the resting order's price."""

    maker_id: int
    price: int
    lots: int


class Changes(NamedTuple):
    """What changed since the changes were last taken: update ids and the new size of each touched price."""

    first_update_id: int
    last_update_id: int
    bids: list[tuple[int, int]]
    asks: list[tuple[int, int]]


@dataclass(slots=True)
class _Resting:
    order_id: int
    price: int
    lots: int


class _Level:
    """Resting orders of one price, oldest first; cancelled ones stay with zero lots until they are met."""

    __slots__ = ("lots", "orders")

    def __init__(self) -> None:
        self.orders: deque[_Resting] = deque()
        self.lots = 0


class _BookSide:
    """One side: levels by price, and their prices sorted, best first."""

    __slots__ = ("by_age", "keys", "levels", "orders", "sign", "touched")

    def __init__(self, side: Side) -> None:
        self.sign = int(side)
        self.keys: list[int] = []
        self.levels: dict[int, _Level] = {}
        self.orders: dict[int, _Resting] = {}
        self.by_age: deque[int] = deque()
        self.touched: set[int] = set()

    def best(self) -> int | None:
        return self.keys[0] * self.sign if self.keys else None

    def drop_level(self, price: int) -> None:
        del self.levels[price]
        del self.keys[bisect_left(self.keys, price * self.sign)]


class OrderBook:
    """Match orders and remember which prices changed.

    Every change of a level's size takes the next update id, as the venue's depth stream numbers them.

    Args:
        first_update_id: id of the first change.
    """

    __slots__ = ("_asks", "_bids", "_taken_update_id", "update_id")

    def __init__(self, first_update_id: int = 1) -> None:
        self._bids = _BookSide(Side.BUY)
        self._asks = _BookSide(Side.SELL)
        self.update_id = first_update_id - 1
        self._taken_update_id = self.update_id

    @property
    def best_bid(self) -> int | None:
        """Return the highest buying price, none when nobody buys."""
        return self._bids.best()

    @property
    def best_ask(self) -> int | None:
        """Return the lowest selling price, none when nobody sells."""
        return self._asks.best()

    def best(self, side: Side) -> tuple[int, int] | None:
        """Return the best price of a side and its size."""
        book_side = self._side(side)
        price = book_side.best()
        return None if price is None else (price, book_side.levels[price].lots)

    def order_count(self, side: Side) -> int:
        """Return how many orders rest on a side."""
        return len(self._side(side).orders)

    def submit(self, order_id: int, side: Side, price: int, lots: int, *, rests: bool = True) -> list[Fill]:
        """Match an order up to `price`; what is left of it rests, or is gone when `rests` is false.

        Args:
            order_id: unique; an older order has been submitted before.
            side: what the order does.
            price: worst price it accepts, in ticks.
            lots: size, above zero.
            rests: false for an immediate-or-cancel order.
        """
        own, other = (self._bids, self._asks) if side is Side.BUY else (self._asks, self._bids)
        fills: list[Fill] = []
        limit_key = price * other.sign
        while lots and other.keys and other.keys[0] <= limit_key:
            lots = self._match_level(other, other.keys[0] * other.sign, lots, fills)
        if lots and rests:
            level = own.levels.get(price)
            if level is None:
                level = own.levels[price] = _Level()
                insort(own.keys, price * own.sign)
            order = _Resting(order_id, price, lots)
            level.orders.append(order)
            own.orders[order_id] = order
            own.by_age.append(order_id)
            level.lots += lots
            own.touched.add(price)
            self.update_id += 1
        return fills

    def cancel(self, side: Side, order_id: int) -> int:
        """Take a resting order away and return the lots it had left; 0 when it rests no longer."""
        book_side = self._side(side)
        order = book_side.orders.pop(order_id, None)
        if order is None:
            return 0
        lots, order.lots = order.lots, 0
        level = book_side.levels[order.price]
        self._change(book_side, order.price, level, -lots)
        return lots

    def cancel_oldest(self, side: Side) -> int:
        """Cancel the order that has rested longest on a side and return its lots; 0 on an empty side."""
        book_side = self._side(side)
        while book_side.by_age:
            order_id = book_side.by_age.popleft()
            if order_id in book_side.orders:
                return self.cancel(side, order_id)
        return 0

    def cancel_through(self, side: Side, price: int) -> None:
        """Cancel every order of a side at `price` or better."""
        book_side = self._side(side)
        limit_key = price * book_side.sign
        while book_side.keys and book_side.keys[0] <= limit_key:
            best = book_side.keys[0] * book_side.sign
            for order in list(book_side.levels[best].orders):
                self.cancel(side, order.order_id)

    def levels(self, side: Side, limit: int | None = None) -> list[tuple[int, int]]:
        """Return (price, lots) of a side's levels, best first."""
        book_side = self._side(side)
        sign = book_side.sign
        return [(key * sign, book_side.levels[key * sign].lots) for key in book_side.keys[:limit]]

    def take_changes(self) -> Changes | None:
        """Return what changed since the last call; none when nothing did."""
        if self.update_id == self._taken_update_id:
            return None
        bids, asks = self._bids, self._asks
        sizes = _sizes(bids, bids.touched), _sizes(asks, asks.touched)
        changes = Changes(self._taken_update_id + 1, self.update_id, *sizes)
        bids.touched.clear()
        asks.touched.clear()
        self._taken_update_id = self.update_id
        return changes

    def sizes_of(self, first_update_id: int, bids: Iterable[int], asks: Iterable[int]) -> Changes:
        """Return the sizes now of prices that were touched since `first_update_id`, as of the last taken changes."""
        sizes = _sizes(self._bids, bids), _sizes(self._asks, asks)
        return Changes(first_update_id, self._taken_update_id, *sizes)

    def _match_level(self, book_side: _BookSide, price: int, lots: int, fills: list[Fill]) -> int:
        level = book_side.levels[price]
        orders = level.orders
        while lots and orders:
            order = orders[0]
            traded = min(lots, order.lots)
            if traded:
                lots -= traded
                order.lots -= traded
                fills.append(Fill(order.order_id, price, traded))
                self._change(book_side, price, level, -traded)
            if order.lots == 0:
                orders.popleft()
                book_side.orders.pop(order.order_id, None)
        return lots

    def _change(self, book_side: _BookSide, price: int, level: _Level, lots: int) -> None:
        level.lots += lots
        book_side.touched.add(price)
        self.update_id += 1
        if level.lots == 0:
            book_side.drop_level(price)

    def _side(self, side: Side) -> _BookSide:
        return self._bids if side is Side.BUY else self._asks


def _sizes(book_side: _BookSide, prices: Iterable[int]) -> list[tuple[int, int]]:
    """Return `prices`, best first, with their size now; 0: the level is gone."""
    levels = book_side.levels
    ordered = sorted(prices, key=lambda price: price * book_side.sign)
    return [(price, levels[price].lots if price in levels else 0) for price in ordered]
