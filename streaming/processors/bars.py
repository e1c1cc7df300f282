"""The bars processor: trades to one-minute bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from confluent_kafka import Message

from streamforge.errors import NOT_JSON, DecodeError
from streamforge.market.bars import BarsState, SourcedTrade, add_trades
from streamforge.market.records import Trade
from streamforge.settings import Settings
from streaming.processors.types import Output, Refused, Source, Step

_ENCODE = msgspec.json.Encoder().encode
_DECODER = msgspec.json.Decoder(Trade)
_BARS = "bars"
_GAPS = "market-gaps"
_MAX_NAME_CHARACTERS = 256
_END_NS = 4_102_444_800 * 10**9


class Bars:
    """Trades to bars and, where a trade came too late, gaps; state is the bars that can still change."""

    kind = "bars"
    input_id = "trades"
    changelog_id = "bars-changelog"
    output_ids: Sequence[str] = (_BARS, _GAPS)

    def __init__(self, settings: Settings) -> None:
        self._rules = settings.bar_rules

    def restore(self, saved: Mapping[str, str]) -> BarsState:
        """Return watermark and open bars."""
        return BarsState.restore(saved)

    def save(self, state: BarsState, key: str) -> str | None:
        """Return the watermark, or the open bars of one instrument, as text."""
        return state.save(key)

    def process(self, state: BarsState, source: Source, messages: Sequence[Message]) -> Step[BarsState]:
        """Take in the trades of one topic-partition."""
        trades: list[SourcedTrade] = []
        refused: list[Refused] = []
        for message in messages:
            try:
                trade = decode_trade(message.value() or b"")
            except DecodeError as error:
                refused.append(Refused(message, 0, error.reason, error.detail))
            else:
                trades.append(SourcedTrade(trade, source.topic_id, source.partition, message.offset() or 0))
        result = add_trades(state, trades, self._rules)
        if result.refusals:
            by_offset = {message.offset(): message for message in messages}
            refused += [Refused(by_offset[r.source.offset], 0, r.reason, r.detail) for r in result.refusals]
        return Step(
            result.state,
            [
                *(Output(_BARS, bar.instrument.encode(), _ENCODE(bar)) for bar in result.bars),
                *(Output(_GAPS, gap.instrument.encode(), _ENCODE(gap)) for gap in result.gaps),
            ],
            result.changed,
            refused,
            {},
            max((source.trade.ts_event_ns for source in trades), default=None),
        )


def decode_trade(value: bytes) -> Trade:
    """Decode one record of `trades`.

    Raises:
        DecodeError: `malformed_json` or `wrong_type`, `too_long` where a name would
            not fit into a bar, or `bad_time`.
    """
    try:
        trade = _DECODER.decode(value)
    except NOT_JSON as error:
        reason = "wrong_type" if isinstance(error, msgspec.ValidationError) else "malformed_json"
        raise DecodeError(reason, f"expected a record of trades: {error}") from error
    for name in (trade.instrument, trade.venue, trade.symbol, trade.trade_id):
        if len(name) > _MAX_NAME_CHARACTERS:
            detail = f"a name has {len(name)} characters, at most {_MAX_NAME_CHARACTERS} are taken"
            raise DecodeError("too_long", detail)
    if not 0 <= trade.ts_event_ns < _END_NS:
        raise DecodeError("bad_time", f"expected an event time before the year 2100, found {trade.ts_event_ns} ns")
    return trade
