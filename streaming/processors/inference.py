"""The inference processor: bars in, forecasts of the champion out, each once.

What it promises, and what not:

- A bar that closes an interval of the champion gives one forecast, in the transaction that passes the bar. The
  state keeps which interval was asked for last, so a later revision of the bar, a new champion or a restart makes
  no second one.
- Without a champion bars are taken into the windows, their offsets pass and nothing is forecast of them: a
  forecast is never made up afterwards with a model that was not there. Forecasts begin with the next bar. For
  the same reason there is none for an interval that is long over (a first start on an old log).
- A graph needs the whole market, and the instruments lie in several topic-partitions. So bars are gathered for
  a moment before they are processed, and a forecast sees the bars of every topic-partition that this replica
  reads, up to the end of the bar that it is made for. A second replica would see the other half: one is right.
- A restart sees what was committed: windows come from the changelog, of the positions that go with them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
from confluent_kafka import Message
from pydantic import Field

from streamforge import __version__
from streamforge.contracts import Contract, Contracts
from streamforge.errors import NOT_JSON, DecodeError
from streamforge.gnn.forecast import InstrumentForecast
from streamforge.gnn.registry import MODEL_NAME, Champion
from streamforge.lakehouse.rows import typed_array
from streamforge.market.bars import INTERVAL, INTERVAL_NS
from streamforge.market.decimals import positive_decimal
from streamforge.market.records import Bar, Prediction
from streamforge.market.windows import (
    InstrumentWindow,
    WindowsState,
    asked_key,
    bar_key,
    bars_between,
    restore_windows,
    save_window,
)
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streaming.processors.base import TransactionalWorker
from streaming.processors.champion import ChampionWatch
from streaming.processors.types import Output, Refused, Source, Step, TransactionOptions
from streaming.runner import Fetched

KIND = "inference"
BARS = "bars"
PREDICTIONS = "predictions"

_DECODER = msgspec.json.Decoder(Bar)
_ENCODE = msgspec.json.Encoder().encode
_MOST_GATHERED = 5_000
"""Records that are not held back any longer: who is so far behind does not wait for the market."""
_COLUMNS = ("ts_start_ns", "ts_end_ns", "replay_epoch", "revision", "high", "low", "close", "volume")


class InferenceSettings(Settings):
    """What the inference processor needs besides what every process needs."""

    inference_window_bars: int = Field(
        1_440,
        ge=2,
        description="Bars of a minute that are kept of each instrument; a model that looks back further gets these.",
    )
    inference_settle_s: float = Field(
        2.0, ge=0, description="Seconds that bars are gathered before forecasts are made, so that they see the market."
    )
    inference_champion_poll_s: float = Field(
        5.0, gt=0, description="Seconds between two questions which model version is champion."
    )
    inference_max_late_s: float = Field(
        3600.0, ge=0, description="No forecast is made of an interval that has been over for longer, seconds."
    )


class _Due(NamedTuple):
    """A bar that closes an interval of the champion: `target_ns` is the start of the interval to forecast."""

    target_ns: int
    bar: Bar
    offset: int


class Inference:
    """Bars to forecasts; state is the window of each instrument and what was asked for last.

    Args:
        settings: lengths and bounds.
        contract: of `bars`, for the types that a model is given.
        champion: returns the model to forecast with, None where there is none.
        now_ns: wall clock, nanoseconds since 1970 UTC.
    """

    kind = KIND
    input_id = BARS
    changelog_id = "inference-changelog"
    output_ids: Sequence[str] = (PREDICTIONS,)

    def __init__(
        self,
        settings: InferenceSettings,
        contract: Contract,
        champion: Callable[[], Champion | None],
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._keep_bars = settings.inference_window_bars
        self._max_late_ns = int(settings.inference_max_late_s * 1e9)
        self._contract = contract
        self._champion = champion
        self._now_ns = now_ns
        self._market: dict[str, InstrumentWindow] = {}
        self._made: dict[int, dict[str, tuple[InstrumentForecast, int]]] = {}

    def restore(self, saved: Mapping[str, str]) -> WindowsState:
        """Return the windows, which the market then has too."""
        state = restore_windows(saved)
        self._market.update({instrument: window.copy() for instrument, window in state.items()})
        return state

    def save(self, state: WindowsState, key: str) -> str | None:
        """Return one bar of a window, or what was asked for last, as text."""
        return save_window(state, key)

    def see(self, messages: Sequence[Message]) -> None:
        """Show the market all bars of a batch before any of it is processed; nothing leaves a window yet."""
        self._made.clear()
        for message in messages:
            try:
                bar = decode_bar(message.value() or b"")
            except DecodeError:
                continue  # `process` refuses it
            self._market.setdefault(bar.instrument, InstrumentWindow()).add(bar, self._keep_bars + len(messages))

    def process(self, state: WindowsState, source: Source, messages: Sequence[Message]) -> Step[WindowsState]:
        """Take in bars of one topic-partition and forecast what they close."""
        champion = self._champion()
        own: dict[str, InstrumentWindow] = {}
        changed, due = set[str](), list[_Due]()
        refused, counters = list[Refused](), Counter[str]()
        latest_ns: int | None = None
        for message in messages:
            try:
                bar = decode_bar(message.value() or b"")
            except DecodeError as error:
                refused.append(Refused(message, 0, error.reason, error.detail))
                continue
            window = own.get(bar.instrument)
            if window is None:
                window = own[bar.instrument] = state.get(bar.instrument, InstrumentWindow()).copy()
            closes = bar.ts_start_ns > window.newest_ns
            changed |= {bar_key(bar.instrument, start_ns) for start_ns in window.add(bar, self._keep_bars)}
            if not closes:
                continue
            latest_ns = max(bar.ts_end_ns, latest_ns or 0)
            target_ns = self._target_ns(champion, bar, window, counters)
            if target_ns is not None:
                due.append(_Due(target_ns, bar, message.offset() or 0))
                window.asked_ns = target_ns
                changed.add(asked_key(bar.instrument))
        outputs = [] if champion is None else self._forecast(champion, source, due, counters)
        return Step({**state, **own}, outputs, changed, refused, counters, latest_ns)

    def _target_ns(
        self, champion: Champion | None, bar: Bar, window: InstrumentWindow, counters: Counter[str]
    ) -> int | None:
        """Return the start of the interval to forecast after `bar`, None where none is."""
        if champion is None:
            counters["skipped.no_champion"] += 1
            return None
        target_ns = bar.ts_end_ns - bar.ts_end_ns % champion.interval_ns
        if target_ns <= window.asked_ns:
            return None
        if self._now_ns() > target_ns + champion.interval_ns + self._max_late_ns:
            counters["skipped.long_over"] += 1
            return None
        return target_ns

    def _forecast(
        self, champion: Champion, source: Source, due: Sequence[_Due], counters: Counter[str]
    ) -> list[Output]:
        outputs = []
        for item in due:
            found = self._market_forecast(champion, item.bar.ts_end_ns).get(item.bar.instrument)
            if found is None or found[0].ts_start_ns != item.target_ns or not found[0].volatility > 0:
                counters["skipped.no_forecast"] += 1
                continue
            forecast, instruments = found
            prediction = Prediction(
                instrument=item.bar.instrument,
                venue=item.bar.venue,
                symbol=item.bar.symbol,
                ts_start_ns=item.target_ns,
                ts_end_ns=item.target_ns + champion.interval_ns,
                volatility=forecast.volatility,
                model_name=MODEL_NAME,
                model_version=champion.version,
                ts_predicted_ns=self._now_ns(),
                market_instruments=instruments,
                bars_topic_id=source.topic_id,
                bars_partition=source.partition,
                bars_offset=item.offset,
                processor_version=__version__,
            )
            outputs.append(Output(PREDICTIONS, prediction.instrument.encode(), _ENCODE(prediction)))
        return outputs

    def _market_forecast(self, champion: Champion, end_ns: int) -> dict[str, tuple[InstrumentForecast, int]]:
        """Return the forecast of each instrument from the bars up to `end_ns`, asked for once in a batch."""
        if end_ns not in self._made:
            start_ns = end_ns - (champion.history_intervals + 1) * champion.interval_ns
            market = bars_between(self._market, start_ns, end_ns)
            found = champion.predict(self._table(market))
            self._made[end_ns] = {item.instrument: (item, len(market)) for item in found}
        return self._made[end_ns]

    def _table(self, market: Mapping[str, Sequence[Any]]) -> pa.Table:
        """Return bars as a table with the types of `bars`."""
        rows = [bar for bars in market.values() for bar in bars]
        values: dict[str, list[Any]] = {
            "instrument": [instrument for instrument, bars in market.items() for _ in bars],
            "interval": [INTERVAL] * len(rows),
            **{name: [getattr(bar, name) for bar in rows] for name in _COLUMNS},
        }
        types = self._contract.arrow_schema
        columns = {n: typed_array(self._contract.field(n), item, types.field(n).type) for n, item in values.items()}
        return pa.table(columns)


class InferenceWorker(TransactionalWorker[WindowsState]):
    """Gathers bars for a moment, then has the processor see all of them and process them in one transaction.

    What is gathered is not processed: no position passes it, and whoever takes over reads it again.

    Args:
        settings: which cluster, registry and bounds.
        contracts: topics of input, output, changelog and dead letters.
        slot: replica name.
        metrics: where it counts, and says which champion forecasts.
        options: how often and how long.
        monotonic_s: clock for intervals, seconds.
        now_ns: wall clock, nanoseconds since 1970 UTC.
    """

    def __init__(
        self,
        settings: InferenceSettings,
        contracts: Contracts,
        *,
        slot: str,
        metrics: ProcessMetrics,
        options: TransactionOptions | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._watch = ChampionWatch(settings, settings.inference_champion_poll_s, self._say)
        self._inference = Inference(settings, contracts[BARS], lambda: self._watch.champion, now_ns)
        self._settle_s = settings.inference_settle_s
        self._window_bars = settings.inference_window_bars
        self._gathered: list[Fetched] = []
        self._gathered_records = 0
        self._gathered_s = 0.0
        super().__init__(
            self._inference,
            settings,
            contracts,
            slot=slot,
            metrics=metrics,
            options=options,
            monotonic_s=monotonic_s,
            now_ns=now_ns,
        )

    def revoked(self, partitions: Sequence[TopicPartition], *, lost: bool) -> None:
        """Forget what is gathered: whoever has the topic-partitions next reads it again."""
        self._forget_gathered()
        super().revoked(partitions, lost=lost)

    def process(self, fetched: Fetched) -> None:
        """Gather, in order: a position must not pass bars that are still held."""
        if not self._gathered:
            self._gathered_s = self._monotonic_s()
        self._gathered.append(fetched)
        self._gathered_records += len(fetched.messages)

    def commit_due(self, now_s: float) -> bool:
        """Ask for the champion and process what was gathered, each where it is time; called in every round.

        Nothing is processed before the first question: a restart goes on with the champion that is there.
        """
        if not self._pending.positions:
            self._watch.refresh(now_s)  # loading a model can outlive a transaction's timeout
        is_full = self._gathered_records >= _MOST_GATHERED
        if self._gathered and (is_full or now_s - self._gathered_s >= self._settle_s):
            self._process_gathered()
        return super().commit_due(now_s)

    def _process_gathered(self) -> None:
        gathered = self._gathered
        self._forget_gathered()
        messages = [message for fetched in gathered for message in fetched.messages]
        positions = {item: offset for fetched in gathered for item, offset in fetched.positions.items()}
        self._inference.see(messages)
        super().process(Fetched(messages, positions))

    def _take_over(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        self._forget_gathered()
        return super()._take_over(partitions)

    def _forget_gathered(self) -> None:
        self._gathered = []
        self._gathered_records = 0

    def _say(self, text: str) -> None:
        champion = self._watch.champion
        needed = 0 if champion is None else champion.history_intervals * champion.interval_ns // INTERVAL_NS
        if needed > self._window_bars:
            text += (
                f"; it looks back {needed:,} bars and gets {self._window_bars:,}: "
                "set STREAMFORGE_INFERENCE_WINDOW_BARS to give it all"
            )
        self._metrics.note = text


def decode_bar(value: bytes) -> Bar:
    """Decode one record of `bars` and check what a model reads of it.

    Raises:
        DecodeError: `malformed_json`, `wrong_type`, `bad_time`, `bad_decimal` or `out_of_range`.
    """
    try:
        bar = _DECODER.decode(value)
    except NOT_JSON as error:
        reason = "wrong_type" if isinstance(error, msgspec.ValidationError) else "malformed_json"
        raise DecodeError(reason, f"expected a record of bars: {error}") from error
    if bar.ts_start_ns <= 0 or bar.ts_start_ns % INTERVAL_NS or bar.ts_end_ns != bar.ts_start_ns + INTERVAL_NS:
        detail = f"expected a full minute, found [{bar.ts_start_ns}, {bar.ts_end_ns}) ns"
        raise DecodeError("bad_time", detail)
    for text in (bar.high, bar.low, bar.close, bar.volume):
        positive_decimal(text)
    return bar
