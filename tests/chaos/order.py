"""Is the order within a key kept, and does every trade count in its bar once? Read from the topics and the tables.

- raw: frames of one connection and stream lie in the order in which they came.
- typed: trades of one instrument lie in the order of their raw records, in the topic and in the table by source offset.
- bars: revisions of a bar grow; the last revisions count each trade of the topic once, but those that a published gap
  calls too late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pyarrow as pa

from streamforge.contracts import Contracts
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.kafka_reader import topic_identity, topic_partitions
from streamforge.log_reader import log_starts, read_range, stable_ends
from streamforge.market.records import Bar, GapKind, MarketGap, RawRecord, Trade, raw_record
from streamforge.settings import Settings
from streamforge.supervision import topic_of

Key = Hashable
_EXAMPLES = 5
_TIMEOUT_S = 60.0
_COLUMNS = ("instrument", "source_partition", "source_offset", "source_index", "raw_offset", "raw_index")


@dataclass(slots=True)
class Disorder:
    """What is out of order, and what a bar counts wrong.

    Args:
        compared: neighbours that were compared, by what.
        wrong: those of them in the wrong order, by what; for `bar counts` trades too many or too few.
        examples: the first few.
    """

    compared: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Return how much is wrong."""
        return self.wrong.total()

    def note(self, what: str, where: str, count: int = 1) -> None:
        """Count something wrong."""
        self.wrong[what] += count
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{what}: {where}")

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"compared": dict(self.compared), "wrong": dict(self.wrong), "examples": self.examples}


def find_disorder(settings: Settings, contracts: Contracts) -> Disorder:
    """Look through raw topics, `trades` in topic and table, and `bars`."""
    found = Disorder()
    for contract_id in ("raw-trades", "raw-depth"):
        check_order(found, contract_id, _frames(settings, contracts, contract_id))
    trades = list(_decoded(settings, contracts, "trades", Trade))
    check_order(found, "trades", ((item.instrument, (item.raw_offset, item.raw_index)) for item in trades))
    check_order(found, "table trades", _rows(settings, contracts))
    bars = list(_decoded(settings, contracts, "bars", Bar))
    revisions = (((item.instrument, item.ts_start_ns), (item.replay_epoch, item.revision)) for item in bars)
    check_order(found, "bars", revisions)
    check_bar_counts(found, trades, bars, _decoded(settings, contracts, "market-gaps", MarketGap))
    return found


def check_order(found: Disorder, what: str, items: Iterable[tuple[Key, tuple[int, ...]]]) -> None:
    """Check that the values of each key grow."""
    last: dict[Key, tuple[int, ...]] = {}
    for key, value in items:
        before = last.get(key)
        if before is not None:
            found.compared[what] += 1
            if value <= before:
                found.note(what, f"{key}: {value} behind {before}")
        last[key] = value


def check_bar_counts(found: Disorder, trades: Iterable[Trade], bars: Iterable[Bar], gaps: Iterable[MarketGap]) -> None:
    """Check that the last revision of each bar counts its trades once; a bar that has not closed has no revision."""
    latest: dict[tuple[str, int], Bar] = {}
    for bar in bars:
        latest[bar.instrument, bar.ts_start_ns] = bar
    length_ns = next((bar.ts_end_ns - bar.ts_start_ns for bar in latest.values()), 1)
    counts = Counter((trade.instrument, trade.ts_event_ns - trade.ts_event_ns % length_ns) for trade in trades)
    for gap in gaps:
        if gap.kind is GapKind.LATE_TRADE:
            counts[gap.instrument, gap.ts_start_ns] -= 1
    for key, bar in latest.items():
        found.compared["bar counts"] += 1
        if bar.trade_count != counts[key]:
            found.note("bar counts", f"{key}: {bar.trade_count} of {counts[key]}", abs(bar.trade_count - counts[key]))


def _frames(settings: Settings, contracts: Contracts, contract_id: str) -> Iterator[tuple[Key, tuple[int, ...]]]:
    topic_id = topic_identity(settings, topic_of(contracts, contract_id).name).topic_id
    for message in _messages(settings, contracts, contract_id):
        record: RawRecord = raw_record(topic_id, message)
        yield (record.connection_id, record.instrument, record.channel), (record.sequence_in_connection,)


def _rows(settings: Settings, contracts: Contracts) -> Iterator[tuple[Key, tuple[int, ...]]]:
    table = load_table(open_catalog(settings), settings, contracts["trades"])
    rows: pa.Table = table.scan(selected_fields=_COLUMNS).to_arrow()
    rows = rows.sort_by([(name, "ascending") for name in _COLUMNS[1:4]])
    for row in rows.to_pylist():
        if row["source_offset"] is not None:
            yield row["instrument"], (row["raw_offset"], row["raw_index"])


def _decoded(settings: Settings, contracts: Contracts, contract_id: str, kind: Any) -> Iterator[Any]:
    decoder = msgspec.json.Decoder(kind)
    for message in _messages(settings, contracts, contract_id):
        yield decoder.decode(message.value())


def _messages(settings: Settings, contracts: Contracts, contract_id: str) -> Iterator[Any]:
    partitions = topic_partitions(settings, [topic_of(contracts, contract_id).name])
    starts, ends = log_starts(settings, partitions), stable_ends(settings, partitions)
    for messages in read_range(settings, starts, ends, timeout_s=_TIMEOUT_S):
        yield from messages
