"""What a venue remembers of an instrument's trades: the trades themselves, aggregates and klines."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from operator import mul
from typing import NamedTuple

MINUTE_MS = 60_000
_FIELDS = 6
_TIME = 3
_AGGREGATE = 5


class Trade(NamedTuple):
    """One trade; price and size are whole ticks and lots."""

    trade_id: int
    price: int
    lots: int
    ts_ms: int
    buyer_is_maker: int
    aggregate_id: int


class AggregateTrade(NamedTuple):
    """Trades of one taker order at one price, as one."""

    aggregate_id: int
    price: int
    lots: int
    first_trade_id: int
    last_trade_id: int
    ts_ms: int
    buyer_is_maker: bool


class Kline(NamedTuple):
    """Open, high, low, close and volumes of trades in `[start_ms, end_ms)`; amounts in ticks times lots."""

    start_ms: int
    end_ms: int
    first_trade_id: int
    last_trade_id: int
    open: int
    high: int
    low: int
    close: int
    lots: int
    amount: int
    trades: int
    taker_buy_lots: int
    taker_buy_amount: int

    def merged(self, later: Kline, end_ms: int) -> Kline:
        """Return this kline and a later one as one that ends at `end_ms`."""
        return Kline(
            self.start_ms,
            end_ms,
            self.first_trade_id,
            later.last_trade_id,
            self.open,
            max(self.high, later.high),
            min(self.low, later.low),
            later.close,
            self.lots + later.lots,
            self.amount + later.amount,
            self.trades + later.trades,
            self.taker_buy_lots + later.taker_buy_lots,
            self.taker_buy_amount + later.taker_buy_amount,
        )


class TradeHistory:
    """Keep an instrument's latest trades in one flat array (48 bytes each) and all its minutes' klines.

    Args:
        first_trade_id: id of the first trade to come.
        max_trades: at least so many of the latest trades are kept, at most twice as many.
        max_minutes: so many closed one-minute klines are kept.
    """

    def __init__(self, first_trade_id: int, *, max_trades: int = 200_000, max_minutes: int = 3 * 24 * 60) -> None:
        self._flat = array("q")
        self._max_fields = max_trades * _FIELDS
        self.first_trade_id = first_trade_id
        self.next_trade_id = first_trade_id
        self.add = self._flat.extend
        """Add the six fields of a `Trade`; the trade's id must be the one after the last."""
        self._folded_trade_id = first_trade_id
        self._minutes: deque[Kline] = deque(maxlen=max_minutes)
        self._open: Kline | None = None

    def trim(self) -> None:
        """Count the trades that were added and forget the oldest beyond the bound; call it once a batch."""
        self.next_trade_id = self.first_trade_id + len(self._flat) // _FIELDS
        if len(self._flat) > 2 * self._max_fields:
            self._fold()
            excess = len(self._flat) - self._max_fields
            del self._flat[:excess]
            self.first_trade_id += excess // _FIELDS

    def trades(self, limit: int, from_id: int | None = None) -> list[Trade]:
        """Return up to `limit` trades from `from_id` on (or from the oldest kept), or else the latest."""
        self.trim()
        start = max(self.next_trade_id - limit if from_id is None else from_id, self.first_trade_id)
        return list(self._slice(start, min(start + limit, self.next_trade_id)))

    def aggregates(
        self, limit: int, *, from_id: int | None = None, start_ms: int | None = None, end_ms: int | None = None
    ) -> list[AggregateTrade]:
        """Return up to `limit` aggregate trades by aggregate id or inclusive time range, or else the latest."""
        self.trim()
        if from_id is None and start_ms is None and end_ms is None:
            last = self._slice(max(self.next_trade_id - 1, self.first_trade_id), self.next_trade_id)
            from_id = next((trade.aggregate_id - limit + 1 for trade in last), 0)
        start = self.first_trade_id
        if from_id is not None:
            start = self._first_at(_AGGREGATE, from_id)
        elif start_ms is not None:
            start = self._first_at(_TIME, start_ms)
        found: list[AggregateTrade] = []
        for trade in self._slice(start, self.next_trade_id):
            if end_ms is not None and trade.ts_ms > end_ms:
                break
            if found and found[-1].aggregate_id == trade.aggregate_id:
                last_found = found[-1]
                lots = last_found.lots + trade.lots
                found[-1] = last_found._replace(lots=lots, last_trade_id=trade.trade_id)
            elif len(found) == limit:
                break
            else:
                found.append(
                    AggregateTrade(
                        trade.aggregate_id,
                        trade.price,
                        trade.lots,
                        trade.trade_id,
                        trade.trade_id,
                        trade.ts_ms,
                        bool(trade.buyer_is_maker),
                    )
                )
        return found

    def current_minute(self) -> Kline | None:
        """Return the latest minute that has trades, closed or not."""
        self._fold()
        return self._open

    def minute(self, start_ms: int) -> Kline | None:
        """Return the kline of the minute that starts at `start_ms`, if it had trades and is still kept."""
        current = self.current_minute()
        if current is not None and current.start_ms == start_ms:
            return current
        return next((kline for kline in reversed(self._minutes) if kline.start_ms == start_ms), None)

    def klines(self, interval_ms: int, *, start_ms: int = 0, end_ms: int | None = None) -> Iterator[Kline]:
        """Yield klines of `interval_ms` whose start lies in `[start_ms, end_ms]`, oldest first."""
        current = self.current_minute()
        merged: Kline | None = None
        for minute in (*self._minutes, *([current] if current else [])):
            start = minute.start_ms - minute.start_ms % interval_ms
            if start < start_ms or (end_ms is not None and start > end_ms):
                continue
            if merged is not None and merged.start_ms == start:
                merged = merged.merged(minute, start + interval_ms)
                continue
            if merged is not None:
                yield merged
            merged = minute._replace(start_ms=start, end_ms=start + interval_ms)
        if merged is not None:
            yield merged

    def _fold(self) -> None:
        """Take the trades since the last call into the open minute."""
        self.next_trade_id = self.first_trade_id + len(self._flat) // _FIELDS
        start = (self._folded_trade_id - self.first_trade_id) * _FIELDS
        while start < len(self._flat):
            minute_ms = self._flat[start + _TIME] - self._flat[start + _TIME] % MINUTE_MS
            end_id = self._first_at(_TIME, minute_ms + MINUTE_MS)
            end = (end_id - self.first_trade_id) * _FIELDS
            kline = _folded(self._flat[start:end], minute_ms)
            if self._open is not None and self._open.start_ms == minute_ms:
                kline = self._open.merged(kline, kline.end_ms)
            elif self._open is not None:
                self._minutes.append(self._open)
            self._open = kline
            start = end
        self._folded_trade_id = self.next_trade_id

    def _slice(self, start_id: int, end_id: int) -> Iterator[Trade]:
        first = (start_id - self.first_trade_id) * _FIELDS
        flat = self._flat[first : (end_id - self.first_trade_id) * _FIELDS] if end_id > start_id else array("q")
        fields = iter(flat)
        return (Trade._make(item) for item in zip(*[fields] * _FIELDS, strict=True))

    def _first_at(self, field: int, value: int) -> int:
        """Return the id of the first trade whose (rising) field is at least `value`, by halving."""
        low, high = self.first_trade_id, self.next_trade_id
        while low < high:
            middle = (low + high) // 2
            if self._flat[(middle - self.first_trade_id) * _FIELDS + field] < value:
                low = middle + 1
            else:
                high = middle
        return low


def _folded(flat: array[int], start_ms: int) -> Kline:
    """Return the kline of trades of one minute, column by column: a loop over trades costs ten times as much."""
    ids, prices, lots, makers = (flat[field::_FIELDS] for field in (0, 1, 2, 4))
    bought = [0 if buyer_is_maker else size for buyer_is_maker, size in zip(makers, lots, strict=True)]
    return Kline(
        start_ms,
        start_ms + MINUTE_MS,
        ids[0],
        ids[-1],
        prices[0],
        max(prices),
        min(prices),
        prices[-1],
        sum(lots),
        sum(map(mul, prices, lots)),
        len(ids),
        sum(bought),
        sum(map(mul, prices, bought)),
    )
