"""One-minute bars by event time: what a stream of trades gives, and what a batch of them gives.

Rules:

- The watermark of a topic-partition is its latest event time minus `out_of_orderness_ns`. Records move it,
  the wall clock never does. It closes the bars of every instrument of the topic-partition whose end it
  has reached, also of those that were idle: revision 0.
- A trade whose bar has closed corrects it at once, with the next revision, as long as the watermark has not
  passed the bar's end by `allowed_lateness_ns`. Later than that the bar stays as it is and the trade's bar
  range is published as a gap of kind `late_trade`, so that a batch rebuild finds it.
- Open and close are the first and last price by (event time, input order). Sums are exact; `quote_volume`
  and `vwap` are rounded half to even once, to 18 places, from the exact sums.
- A trade with which a sum would not fit decimal(38,18) is refused; the bar stays as it was.

Each trade is judged by the watermark before it, one by one: how records were fetched together changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple

import msgspec
import pyarrow as pa

from streamforge import __version__
from streamforge.errors import DecodeError
from streamforge.market.decimals import EXACT, PRECISION, SCALE, plain_text, positive_decimal, quotient, rounded
from streamforge.market.records import AggressorSide, Bar, GapKind, MarketGap, Trade

INTERVAL = "1m"
INTERVAL_NS = 60_000_000_000
WATERMARK_KEY = "#watermark"

_NOT_CLOSED = -1
_NEVER_NS = 2**63
_ZERO = Decimal(0)
_LIMIT = EXACT.subtract(Decimal(10) ** (PRECISION - SCALE), Decimal(1).scaleb(-SCALE))
_REVISION_KEYS = ("instrument", "interval", "ts_start_ns")


@dataclass(frozen=True, slots=True)
class BarRules:
    """What is late, and too late.

    Args:
        out_of_orderness_ns: how far the watermark stays behind the latest event time.
        allowed_lateness_ns: how long after its close a bar is corrected, by the watermark.
    """

    out_of_orderness_ns: int = 1_000_000_000
    allowed_lateness_ns: int = 300_000_000_000


class SourcedTrade(NamedTuple):
    """A trade and where it lies in `trades`: the offset is the input order."""

    trade: Trade
    topic_id: str
    partition: int
    offset: int


class OpenBar(msgspec.Struct):
    """Exact sums of one bar that can still change; `revision` is the last one published, -1 before the first."""

    start_ns: int
    revision: int = _NOT_CLOSED
    high: Decimal = _ZERO
    low: Decimal = _ZERO
    open: Decimal = _ZERO
    open_order: tuple[int, int] = (0, 0)
    first_trade_id: str = ""
    close: Decimal = _ZERO
    close_order: tuple[int, int] = (0, 0)
    last_trade_id: str = ""
    volume: Decimal = _ZERO
    taker_buy_volume: Decimal = _ZERO
    notional: Decimal = _ZERO
    trade_count: int = 0
    start_offset: int = 0
    end_offset: int = 0

    @property
    def end_ns(self) -> int:
        """Return the end of the bar, exclusive."""
        return self.start_ns + INTERVAL_NS

    def add(self, trade: Trade, offset: int) -> None:
        """Take in one trade.

        Raises:
            DecodeError: `bad_decimal` or `out_of_range`; the bar is as it was.
        """
        price = Decimal(positive_decimal(trade.price))
        size = Decimal(positive_decimal(trade.size))
        volume = EXACT.add(self.volume, size)
        notional = EXACT.add(self.notional, EXACT.multiply(price, size))
        if volume > _LIMIT or notional > _LIMIT:
            detail = f"with trade {trade.trade_id} the bar's volume {volume} or quote volume {notional} does not fit"
            raise DecodeError("out_of_range", detail)
        order = (trade.ts_event_ns, offset)
        is_first = self.trade_count == 0
        self.volume, self.notional = volume, notional
        if trade.aggressor_side is AggressorSide.BUY:
            self.taker_buy_volume = EXACT.add(self.taker_buy_volume, size)
        if is_first or order < self.open_order:
            self.open, self.open_order, self.first_trade_id = price, order, trade.trade_id
        if is_first or order >= self.close_order:  # one order for two: trades that no typed record carried
            self.close, self.close_order, self.last_trade_id = price, order, trade.trade_id
        self.high = price if is_first else max(self.high, price)
        self.low = price if is_first else min(self.low, price)
        self.start_offset = offset if is_first else min(self.start_offset, offset)
        self.end_offset = max(self.end_offset, offset + 1)
        self.trade_count += 1


class InstrumentBars(msgspec.Struct):
    """The bars of one instrument that can still change, by start."""

    venue: str
    symbol: str
    partition: int
    bars: dict[int, OpenBar] = {}

    def copy(self) -> InstrumentBars:
        """Return bars of their own with the same values."""
        bars = {start_ns: msgspec.structs.replace(bar) for start_ns, bar in self.bars.items()}
        return InstrumentBars(self.venue, self.symbol, self.partition, bars)


@dataclass(frozen=True, slots=True)
class BarsState:
    """State of one topic-partition: its latest event time, None before the first trade, and its bars."""

    max_event_ns: int | None = None
    instruments: Mapping[str, InstrumentBars] = field(default_factory=dict)

    def save(self, key: str) -> str | None:
        """Return the text of one state key (an instrument or `WATERMARK_KEY`), None where there is nothing."""
        value = self.max_event_ns if key == WATERMARK_KEY else self.instruments.get(key)
        return None if value is None else msgspec.json.encode(value).decode()

    @classmethod
    def restore(cls, saved: Mapping[str, str]) -> BarsState:
        """Return the state whose keys were saved as `saved`.

        Raises:
            DecodeError: a text is not a state.
        """
        try:
            watermark = msgspec.json.decode(saved.get(WATERMARK_KEY, "null"), type=int | None)
            instruments = {
                key: msgspec.json.decode(text, type=InstrumentBars)
                for key, text in saved.items()
                if key != WATERMARK_KEY
            }
        except msgspec.MsgspecError as error:
            raise DecodeError("bad_state", f"expected the state of bars: {error}") from error
        return cls(watermark, instruments)


@dataclass(frozen=True, slots=True)
class RefusedTrade:
    """A trade that could not be taken in, and why."""

    source: SourcedTrade
    reason: str
    detail: str


class BarsResult(NamedTuple):
    """What trades gave; `changed` are the state keys to save."""

    state: BarsState
    bars: list[Bar]
    gaps: list[MarketGap]
    refusals: list[RefusedTrade]
    changed: set[str]


_DEFAULT_RULES = BarRules()


def add_trades(state: BarsState, trades: Iterable[SourcedTrade], rules: BarRules = _DEFAULT_RULES) -> BarsResult:
    """Take in trades of one topic-partition, in offset order; `state` stays as it was."""
    work = _Work(state, rules)
    for source in trades:
        work.take(source)
    return work.result()


class RebuiltBars(NamedTuple):
    """Bars of a batch, and the trades that could not be taken in."""

    bars: list[Bar]
    refusals: list[RefusedTrade]


def bars_of(trades: Iterable[SourcedTrade], *, replay_epoch: int = 0) -> RebuiltBars:
    """Return one bar, revision 0, for each instrument and minute that has trades, by start and instrument.

    The values are those of the stream's latest revision, however late the trades came there.
    """
    found: dict[tuple[int, str], tuple[InstrumentBars, OpenBar]] = {}
    refusals = []
    for source in sorted(trades, key=lambda item: (item.partition, item.offset)):
        trade = source.trade
        start_ns = bar_start_ns(trade.ts_event_ns)
        owner = InstrumentBars(trade.venue, trade.symbol, source.partition)
        entry = found.get((start_ns, trade.instrument)) or (owner, OpenBar(start_ns, revision=0))
        try:
            entry[1].add(trade, source.offset)
        except DecodeError as error:
            refusals.append(RefusedTrade(source, error.reason, error.detail))
            continue
        found[start_ns, trade.instrument] = entry
    bars = [
        _published(instrument, owner, bar, replay_epoch=replay_epoch)
        for (_, instrument), (owner, bar) in sorted(found.items(), key=lambda item: item[0])
    ]
    return RebuiltBars(bars, refusals)


def bar_start_ns(ts_event_ns: int) -> int:
    """Return the start of the bar that an event time lies in."""
    return ts_event_ns - ts_event_ns % INTERVAL_NS


def latest_revision(table: pa.Table) -> pa.Table:
    """Return the rows of the latest revision, by (replay_epoch, revision), of each bar, in the table's order."""
    row = "__row"
    numbered = table.select([*_REVISION_KEYS, "replay_epoch", "revision"])
    numbered = numbered.append_column(row, pa.array(range(table.num_rows), pa.int64()))
    ordered = numbered.sort_by([(name, "ascending") for name in (*_REVISION_KEYS, "replay_epoch", "revision")])
    latest = ordered.group_by(list(_REVISION_KEYS), use_threads=False).aggregate([(row, "last")])
    return table.take(latest.column(f"{row}_last").combine_chunks().sort())


class _Work:
    """One run of `add_trades`: copies what it changes of the state."""

    def __init__(self, state: BarsState, rules: BarRules) -> None:
        self._rules = rules
        self._max_event_ns = state.max_event_ns
        self._instruments = dict(state.instruments)
        self._own: set[str] = set()
        self._watermark_ns = self._watermark()
        self._bars: list[Bar] = []
        self._gaps: list[MarketGap] = []
        self._refusals: list[RefusedTrade] = []
        self._moved = False
        self._due_ns = self._next_due_ns()

    def result(self) -> BarsResult:
        """Return what came of it."""
        left = {name: owner for name, owner in self._instruments.items() if owner.bars}
        changed = self._own | ({WATERMARK_KEY} if self._moved else set())
        return BarsResult(BarsState(self._max_event_ns, left), self._bars, self._gaps, self._refusals, changed)

    def take(self, source: SourcedTrade) -> None:
        """Take in one trade, publish what it corrects, and close what its event time completes."""
        trade = source.trade
        start_ns = bar_start_ns(trade.ts_event_ns)
        end_ns = start_ns + INTERVAL_NS
        if self._watermark_ns >= end_ns + self._rules.allowed_lateness_ns:
            self._gaps.append(_late_gap(source, start_ns, self._watermark_ns))
            return
        owner = self._owned(source)
        bar = owner.bars.get(start_ns) or OpenBar(start_ns)
        try:
            bar.add(trade, source.offset)
        except DecodeError as error:
            self._refusals.append(RefusedTrade(source, error.reason, error.detail))
            return
        owner.bars[start_ns] = bar
        if self._watermark_ns >= end_ns:
            self._publish(trade.instrument, owner, bar)
        self._due_ns = min(self._due_ns, self._due(bar))
        if self._max_event_ns is None or trade.ts_event_ns > self._max_event_ns:
            self._max_event_ns = trade.ts_event_ns
            self._moved = True
            self._watermark_ns = self._watermark()
            if self._watermark_ns >= self._due_ns:
                self._advance()

    def _owned(self, source: SourcedTrade) -> InstrumentBars:
        name = source.trade.instrument
        if name not in self._own:
            known = self._instruments.get(name)
            self._instruments[name] = (
                InstrumentBars(source.trade.venue, source.trade.symbol, source.partition)
                if known is None
                else known.copy()
            )
            self._own.add(name)
        return self._instruments[name]

    def _advance(self) -> None:
        """Close the bars that the watermark has reached, in order of start and instrument; forget the old ones."""
        due = sorted(
            (start_ns, name)
            for name, owner in self._instruments.items()
            for start_ns, bar in owner.bars.items()
            if self._due(bar) <= self._watermark_ns
        )
        for start_ns, name in due:
            if name not in self._own:
                self._instruments[name] = self._instruments[name].copy()
                self._own.add(name)
            owner = self._instruments[name]
            bar = owner.bars[start_ns]
            if bar.revision == _NOT_CLOSED:
                self._publish(name, owner, bar)
            if self._due(bar) <= self._watermark_ns:
                del owner.bars[start_ns]
        self._due_ns = self._next_due_ns()

    def _publish(self, instrument: str, owner: InstrumentBars, bar: OpenBar) -> None:
        bar.revision += 1
        self._bars.append(_published(instrument, owner, bar))

    def _due(self, bar: OpenBar) -> int:
        """Return the watermark at which a bar closes or, once closed, is forgotten."""
        return bar.end_ns if bar.revision == _NOT_CLOSED else bar.end_ns + self._rules.allowed_lateness_ns

    def _next_due_ns(self) -> int:
        return min(
            (self._due(bar) for owner in self._instruments.values() for bar in owner.bars.values()), default=_NEVER_NS
        )

    def _watermark(self) -> int:
        return -_NEVER_NS if self._max_event_ns is None else self._max_event_ns - self._rules.out_of_orderness_ns


def _published(instrument: str, owner: InstrumentBars, bar: OpenBar, *, replay_epoch: int = 0) -> Bar:
    return Bar(
        instrument=instrument,
        venue=owner.venue,
        symbol=owner.symbol,
        interval=INTERVAL,
        ts_start_ns=bar.start_ns,
        ts_end_ns=bar.end_ns,
        replay_epoch=replay_epoch,
        revision=bar.revision,
        open=plain_text(bar.open),
        high=plain_text(bar.high),
        low=plain_text(bar.low),
        close=plain_text(bar.close),
        volume=plain_text(bar.volume),
        taker_buy_volume=plain_text(bar.taker_buy_volume),
        quote_volume=plain_text(rounded(bar.notional)),
        vwap=plain_text(quotient(bar.notional, bar.volume)),
        trade_count=bar.trade_count,
        first_trade_id=bar.first_trade_id,
        last_trade_id=bar.last_trade_id,
        trades_partition=owner.partition,
        trades_start_offset=bar.start_offset,
        trades_end_offset=bar.end_offset,
        processor_version=__version__,
    )


def _late_gap(source: SourcedTrade, start_ns: int, watermark_ns: int) -> MarketGap:
    trade = source.trade
    late_s = (watermark_ns - start_ns - INTERVAL_NS) / 1e9
    return MarketGap(
        gap_id=f"late_trade/{source.topic_id}/{source.partition}/{source.offset}",
        kind=GapKind.LATE_TRADE,
        venue=trade.venue,
        channel="trade",
        instrument=trade.instrument,
        ts_start_ns=start_ns,
        ts_end_ns=start_ns + INTERVAL_NS,
        records_dropped=0,
        bytes_dropped=0,
        detail=f"trade {trade.trade_id} came {late_s:.3f} s after its bar's end by the watermark; rebuild the bar",
        ts_detected_ns=trade.ts_receive_ns,
    )
