"""Compare what a simulated venue says it sent with what raw holds: every id that raw lacks lies in a published gap.

The ledger is read first, then raw, then the gaps: a loader publishes a gap before it hands on the frames behind it,
so gaps that are read last cover at least what raw was read up to. Ids behind the last one that raw has of a stream
cannot be judged yet: the next frame, or the loader's next start, says whether they are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import pyarrow.compute as pc
from confluent_kafka import Message

from streamforge.contracts import Contracts
from streamforge.errors import DecodeError
from streamforge.intervals import Interval, size, subtract, union
from streamforge.lakehouse.kafka_reader import topic_partitions
from streamforge.ledger import ARRIVING_FATES, read_ledger
from streamforge.log_reader import log_starts, read_range, stable_ends
from streamforge.market.parsing import symbol_of
from streamforge.market.records import GapKind, MarketGap
from streamforge.settings import Settings
from streamforge.supervision import topic_of

SENT_FATES = (*ARRIVING_FATES, "malformed")
_GAPS = "market-gaps"
_GAP = msgspec.json.Decoder(MarketGap)
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1
_COMPACT_ABOVE = 200_000
_EXAMPLES = 10
_TIMEOUT_S = 60.0


class Stream(NamedTuple):
    """One channel of one symbol, as the venue names them."""

    symbol: str
    channel: str


class FrameIds(Protocol):
    """First and last id of a frame, both inclusive."""

    @property
    def first(self) -> int:
        """Return the first id."""

    @property
    def last(self) -> int:
        """Return the last id."""


class RawChannel(NamedTuple):
    """Where a channel's frames lie, and how their ids are read."""

    contract_id: str
    ids: Callable[[bytes], FrameIds | None]


@dataclass(frozen=True, slots=True)
class LedgerComparison:
    """What became of the ids that the venue sent.

    Args:
        sent: ids that were handed to a connection.
        in_raw: those of them that raw has.
        explained: those that raw lacks and a published gap covers.
        unexplained: those that raw lacks and no gap covers: lost.
        after_last_raw: those behind the last id that raw has of their stream, and in no gap: not known yet.
        not_sent: ids that the venue held back on purpose.
        examples: the first unexplained spans.
    """

    streams: int
    sent: int
    in_raw: int
    explained: int
    unexplained: int
    after_last_raw: int
    not_sent: int
    examples: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values for a JSON report."""
        return asdict(self)


class IdSets:
    """Ids by stream, as intervals; holds little more than the gaps between them."""

    def __init__(self) -> None:
        self._parts: dict[Stream, list[Interval]] = {}

    def add(self, stream: Stream, first: int, last: int) -> None:
        """Add the ids `[first, last]`."""
        parts = self._parts.setdefault(stream, [])
        if parts and first == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], last)
            return
        parts.append((first, last))
        if len(parts) % _COMPACT_ABOVE == 0:
            self._parts[stream] = union(parts)

    def of(self, stream: Stream) -> list[Interval]:
        """Return the ids of a stream."""
        return union(self._parts.get(stream, ()))

    def streams(self) -> set[Stream]:
        """Return the streams that have ids."""
        return set(self._parts)


def verify_ledger(
    settings: Settings, contracts: Contracts, folder: Path, channels: Mapping[str, RawChannel]
) -> LedgerComparison:
    """Compare the ledger in `folder` with the raw topics and the published gaps.

    Raises:
        ConfigurationError: the folder holds no ledger.
        RetryableSourceError: the broker does not answer.
    """
    sent, held_back = ledger_ids(folder, channels)
    raw = IdSets()
    for contract_id in sorted({channel.contract_id for channel in channels.values()}):
        for message in _records(settings, contracts, contract_id):
            _add_frame(raw, message, channels)
    gaps = IdSets()
    for message in _records(settings, contracts, _GAPS):
        _add_gap(gaps, message)
    return compare_ids(sent, held_back, raw, gaps)


def ledger_ids(folder: Path, channels: Mapping[str, RawChannel]) -> tuple[IdSets, IdSets]:
    """Return the ids that were sent and those that were held back, of the channels that a loader captures."""
    sent, held_back = IdSets(), IdSets()
    ledger = read_ledger(folder)
    rows = ledger.filter(pc.field("first_id") >= 0)
    for batch in rows.to_batches():
        names = (batch[name].to_pylist() for name in ("symbol", "channel", "first_id", "last_id", "fate"))
        for symbol, channel, first, last, fate in zip(*names, strict=True):
            if channel in channels:
                (sent if fate in SENT_FATES else held_back).add(Stream(symbol, channel), first, last)
    return sent, held_back


def compare_ids(sent: IdSets, held_back: IdSets, raw: IdSets, gaps: IdSets) -> LedgerComparison:
    """Decide for every id that was sent: in raw, in a gap, behind the last one of raw, or unexplained."""
    counts = dict.fromkeys(("sent", "in_raw", "explained", "unexplained", "after_last_raw"), 0)
    examples: list[str] = []
    for stream in sorted(sent.streams()):
        ids, found = sent.of(stream), raw.of(stream)
        missing = subtract(ids, found)
        open_ids = subtract(missing, gaps.of(stream))
        last = found[-1][1] if found else _LOWEST
        unexplained = subtract(open_ids, [(last + 1, _HIGHEST)])
        counts["sent"] += size(ids)
        counts["in_raw"] += size(ids) - size(missing)
        counts["explained"] += size(missing) - size(open_ids)
        counts["unexplained"] += size(unexplained)
        counts["after_last_raw"] += size(open_ids) - size(unexplained)
        examples += [f"{stream.symbol}@{stream.channel} {first}..{last}" for first, last in unexplained[:_EXAMPLES]]
    return LedgerComparison(
        streams=len(sent.streams()),
        not_sent=sum(size(subtract(held_back.of(each), sent.of(each))) for each in held_back.streams()),
        examples=tuple(examples[:_EXAMPLES]),
        **counts,
    )


def _records(settings: Settings, contracts: Contracts, contract_id: str) -> Iterator[Message]:
    partitions = topic_partitions(settings, [topic_of(contracts, contract_id).name])
    starts, ends = log_starts(settings, partitions), stable_ends(settings, partitions)
    for messages in read_range(settings, starts, ends, timeout_s=_TIMEOUT_S):
        yield from messages


def _add_frame(raw: IdSets, message: Message, channels: Mapping[str, RawChannel]) -> None:
    key, value = message.key(), message.value()
    name = _header(message.headers() or (), "channel")
    if name not in channels or not isinstance(key, bytes) or not isinstance(value, bytes):
        return
    ids = channels[name].ids(value)
    symbol = _symbol(key.decode("utf-8", "replace"))
    if ids is not None and symbol is not None:
        raw.add(Stream(symbol, name), ids.first, ids.last)


def _add_gap(gaps: IdSets, message: Message) -> None:
    try:
        gap = _GAP.decode(message.value() or b"")
    except msgspec.MsgspecError:
        return  # Explains nothing; the comparison with the table says that it has no row.
    symbol = _symbol(gap.instrument)
    if gap.kind is GapKind.LATE_TRADE or symbol is None:
        return
    first = _LOWEST if gap.id_before is None else int(gap.id_before) + 1
    last = _HIGHEST if gap.id_after is None else int(gap.id_after) - 1
    if first <= last:
        gaps.add(Stream(symbol, gap.channel), first, last)


def _header(headers: Any, name: str) -> str:
    pairs: Iterable[tuple[str, Any]] = headers.items() if isinstance(headers, Mapping) else headers
    value = next((value for key, value in pairs if key == name), None)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _symbol(instrument: str) -> str | None:
    try:
        return symbol_of(instrument)
    except DecodeError:
        return None
