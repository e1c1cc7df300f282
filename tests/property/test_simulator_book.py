"""The matching engine against a naive one, for any sequence of orders."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from streaming.simulator.book import Changes, Fill, OrderBook, Side


@dataclass(frozen=True)
class Action:
    """One order, or a cancel of the order with number `cancels`."""

    side: Side
    price: int
    lots: int
    rests: bool
    cancels: int | None


ACTIONS = st.lists(
    st.builds(
        Action,
        side=st.sampled_from(Side),
        price=st.integers(95, 105),
        lots=st.integers(1, 9),
        rests=st.booleans(),
        cancels=st.one_of(st.none(), st.none(), st.integers(1, 30)),
    ),
    max_size=60,
)


class NaiveBook:
    """Price-time priority by sorting one list of [order_id, side, price, lots] on every order."""

    def __init__(self) -> None:
        self.orders: list[list[int]] = []

    def submit(self, order_id: int, side: Side, price: int, lots: int, *, rests: bool) -> list[Fill]:
        """Match against every order of the other side, best first."""
        fills = []
        others = [order for order in self.orders if order[1] == -side]
        for order in sorted(others, key=lambda order: (order[2] * order[1], order[0])):
            acceptable = order[2] <= price if side is Side.BUY else order[2] >= price
            if not acceptable or not lots:
                break
            traded = min(lots, order[3])
            fills.append(Fill(order[0], order[2], traded))
            order[3] -= traded
            lots -= traded
        self.orders = [order for order in self.orders if order[3]]
        if lots and rests:
            self.orders.append([order_id, int(side), price, lots])
        return fills

    def cancel(self, side: Side, order_id: int) -> int:
        """Remove an order and return what it had left."""
        found = [order for order in self.orders if order[0] == order_id and order[1] == side]
        self.orders = [order for order in self.orders if order not in found]
        return sum(order[3] for order in found)

    def levels(self, side: Side) -> list[tuple[int, int]]:
        """Return the sums by price, best first."""
        sizes: dict[int, int] = {}
        for _, own_side, price, lots in self.orders:
            if own_side == side:
                sizes[price] = sizes.get(price, 0) + lots
        return sorted(sizes.items(), key=lambda level: level[0] * side)


def play(book: OrderBook | NaiveBook, number: int, action: Action) -> list[Fill] | int:
    if action.cancels is not None:
        return book.cancel(action.side, action.cancels)
    return book.submit(number, action.side, action.price, action.lots, rests=action.rests)


@given(ACTIONS)
def test_book_any_orders_fills_and_levels_equal_those_of_the_naive_book(actions: list[Action]) -> None:
    book, naive = OrderBook(), NaiveBook()
    for number, action in enumerate(actions, start=1):
        assert play(book, number, action) == play(naive, number, action)
        for side in Side:
            assert book.levels(side) == naive.levels(side)
            assert book.order_count(side) == sum(order[1] == side for order in naive.orders)


@given(ACTIONS)
def test_book_any_orders_is_never_crossed(actions: list[Action]) -> None:
    book = OrderBook()
    for number, action in enumerate(actions, start=1):
        play(book, number, action)
        if book.best_bid is not None and book.best_ask is not None:
            assert book.best_bid < book.best_ask


@given(ACTIONS)
def test_book_any_orders_volume_is_conserved(actions: list[Action]) -> None:
    book = OrderBook()
    submitted = gone = traded = 0
    for number, action in enumerate(actions, start=1):
        before = sum(lots for side in Side for _, lots in book.levels(side))
        result = play(book, number, action)
        after = sum(lots for side in Side for _, lots in book.levels(side))
        if isinstance(result, int):
            gone += result
            continue
        filled = sum(fill.lots for fill in result)
        submitted += action.lots
        traded += 2 * filled
        if not action.rests:
            gone += action.lots - filled
            assert after == before - filled
    assert submitted == traded + gone + sum(lots for side in Side for _, lots in book.levels(side))


@given(ACTIONS, st.integers(1, 7))
def test_take_changes_applied_to_a_snapshot_give_the_book(actions: list[Action], every: int) -> None:
    book = OrderBook(first_update_id=1000)
    copies: dict[Side, dict[int, int]] = {Side.BUY: {}, Side.SELL: {}}
    next_update_id = 1000
    for number, action in enumerate(actions, start=1):
        play(book, number, action)
        if number % every == 0 and (changes := book.take_changes()) is not None:
            assert changes.first_update_id == next_update_id
            assert changes.last_update_id == book.update_id
            next_update_id = changes.last_update_id + 1
            apply(copies, changes)
            for side in Side:
                assert sorted(copies[side].items()) == sorted(book.levels(side))


def apply(copies: dict[Side, dict[int, int]], changes: Changes) -> None:
    for side, levels in ((Side.BUY, changes.bids), (Side.SELL, changes.asks)):
        for price, lots in levels:
            copies[side][price] = lots
            if lots == 0:
                del copies[side][price]


@given(ACTIONS, st.sampled_from(Side), st.integers(94, 106))
def test_cancel_through_leaves_only_worse_prices(actions: list[Action], side: Side, price: int) -> None:
    book = OrderBook()
    for number, action in enumerate(actions, start=1):
        play(book, number, action)
    expected = [level for level in book.levels(side) if level[0] * side > price * side]
    other = book.levels(Side(-side))
    book.cancel_through(side, price)
    assert book.levels(side) == expected
    assert book.levels(Side(-side)) == other


@given(ACTIONS, st.sampled_from(Side))
def test_cancel_oldest_until_empty_cancels_in_the_order_of_arrival(actions: list[Action], side: Side) -> None:
    book, naive = OrderBook(), NaiveBook()
    for number, action in enumerate(actions, start=1):
        play(book, number, action)
        play(naive, number, action)
    expected = [order[3] for order in naive.orders if order[1] == side]
    found = []
    while lots := book.cancel_oldest(side):
        found.append(lots)
    assert found == expected
    assert book.levels(side) == []
