"""What raw and the ledger had when a loader starts: their tails, read by assignment and bounded.

A stream that is not among the last `loader_tail_records` of its topic-partition starts without an id before:
its start gap is then unbounded below, which is wider than need be and never too narrow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec
import structlog
from confluent_kafka import Message

from streamforge.contracts import Contracts
from streamforge.errors import DecodeError
from streamforge.kafka import admin_client, describe_topics
from streamforge.log_reader import log_starts, read_range, stable_ends
from streamforge.market.gaps import GapSpan, StreamGaps, TailScan
from streamforge.market.records import GapKind, MarketGap, raw_record
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streaming.loaders.base import Channel
from streaming.loaders.sink import GAPS_CONTRACT, topic_name

_LEDGER_RECORDS = 50_000
_GAP = msgspec.json.Decoder(MarketGap)
_log = structlog.get_logger(__name__)

StreamKey = tuple[str, str]
"""Instrument and channel."""


@dataclass(frozen=True, slots=True)
class Tail:
    """State of each stream that the tail of raw has, and the holes in it that the ledger lacks."""

    streams: Mapping[StreamKey, StreamGaps]
    holes: Mapping[StreamKey, list[GapSpan]]


def read_tail(settings: Settings, contracts: Contracts, channels: Iterable[Channel], records: int) -> Tail:
    """Read the last `records` records of each raw topic-partition and the end of the ledger.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    by_name = {channel.name: channel for channel in channels}
    scans: dict[StreamKey, TailScan] = {}
    for contract_id in sorted({channel.contract_id for channel in by_name.values()}):
        for message, is_whole in _last_records(settings, topic_name(contracts, contract_id), records):
            _scan(message, is_whole, by_name, scans)
    ledger = _ledger(settings, contracts)
    holes = {key: scan.uncovered(ledger.get(key, ())) for key, scan in scans.items()}
    return Tail(
        {key: scan.resume() for key, scan in scans.items()}, {key: found for key, found in holes.items() if found}
    )


def _scan(message: Message, is_whole: bool, channels: Mapping[str, Channel], scans: dict[StreamKey, TailScan]) -> None:
    try:
        raw = raw_record("", message)
    except DecodeError as error:
        # Not written by a loader; the parser makes it a dead letter.
        _log.warning("not_a_raw_record", topic=message.topic(), offset=message.offset(), reason=error.reason)
        return
    channel = channels.get(raw.channel)
    if channel is None:
        return
    ids = channel.ids_of(raw.payload) if channel.ids_of is not None else None
    scan = scans.setdefault((raw.instrument, raw.channel), TailScan(is_whole=is_whole))
    scan.record(ids, raw.ts_receive_ns, raw.connection_id)


def _ledger(settings: Settings, contracts: Contracts) -> dict[StreamKey, list[GapSpan]]:
    found: dict[StreamKey, list[GapSpan]] = defaultdict(list)
    for message, _ in _last_records(settings, topic_name(contracts, GAPS_CONTRACT), _LEDGER_RECORDS):
        try:
            gap = _GAP.decode(message.value() or b"")
            span = GapSpan(gap.kind, gap.ts_start_ns, gap.ts_end_ns, _id(gap.id_before), _id(gap.id_after))
        except (msgspec.MsgspecError, ValueError) as error:
            _log.warning("not_a_gap", topic=message.topic(), offset=message.offset(), reason=str(error))
            continue
        if gap.kind is not GapKind.LATE_TRADE:
            found[(gap.instrument, gap.channel)].append(span)
    return found


def _id(text: str | None) -> int | None:
    return None if text is None else int(text)


def _last_records(settings: Settings, topic: str, records: int) -> Iterator[tuple[Message, bool]]:
    """Yield the last `records` records of each topic-partition, and whether these are all it ever had."""
    identity = describe_topics(admin_client(settings), [topic]).get(topic)
    if identity is None:
        return
    partitions = [TopicPartition(topic, number) for number in range(identity.partitions)]
    # Never behind an open transaction: the loader would wait for a processor that stands still. A gap of ours
    # that lies behind one is published again, which is harmless.
    ends = stable_ends(settings, partitions)
    first = log_starts(settings, partitions)
    starts = {item: max(first[item], end - records) for item, end in ends.items()}
    for messages in read_range(settings, starts, ends):
        for message in messages:
            yield message, starts[TopicPartition(topic, message.partition() or 0)] == 0
