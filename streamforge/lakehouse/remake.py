"""How a table's rows are made again from source records: one pure step for each table.

`trades` are parsed by the function of the live parser and decoded by the function of the live writer, so a
re-made row is what the live path would have made. Every other table is fed from its own topic and decoded
again; bars are not recomputed from trades.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message

from streamforge.contract_model import Contract, Contracts
from streamforge.errors import ConfigurationError, DecodeError
from streamforge.lakehouse.replay_plan import Lineage
from streamforge.lakehouse.rows import SOURCE_OFFSET, SOURCE_PARTITION, RowDecoder
from streamforge.market.dedupe import SeenIds
from streamforge.market.parsing import Parsed, ParserState, parse_records
from streamforge.market.records import RawRecord, raw_record
from streamforge.settings import Settings

S = TypeVar("S")

ParseRecords = Callable[[ParserState, Iterable[RawRecord]], Parsed]


@dataclass(frozen=True, slots=True)
class Remade:
    """What source records of one topic-partition gave.

    Args:
        rows: without what only a commit knows.
        dropped: records and events that gave no row, by reason.
    """

    rows: pa.Table
    dropped: Mapping[str, int]


class Remake(Protocol[S]):
    """The re-run of one table's step, with the state that it keeps for each source topic-partition."""

    history_columns: Sequence[str]
    """Columns of the rows outside the ranges that the state is built from; none: there is no state."""

    def initial(self) -> S:
        """Return the state before the first record."""

    def remember(self, state: S, rows: pa.Table) -> S:
        """Return the state after rows that are in the table already."""

    def remake(self, state: S, messages: Sequence[Message]) -> tuple[S, Remade]:
        """Make rows of source records of one topic-partition, in offset order; return the state after them."""


MakeRemake = Callable[[Lineage, str], Remake[Any]]
"""Makes the re-run of a table from its lineage and Kafka's id of the source topic."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a table that a processor makes is made again.

    Args:
        source_id: contract of the topic that the processor reads.
        group_kind: kind of the processor, the last part of its consumer group.
        make: makes the re-run with the settings of the live processor.
    """

    source_id: str
    group_kind: str
    make: Callable[[Settings], MakeRemake]


class Reland:
    """Decodes the records of a table's own topic again, as the writer does."""

    history_columns: Sequence[str] = ()

    def __init__(self, lineage: Lineage, topic_id: str) -> None:
        del topic_id
        self._contract = lineage.contract
        self._decoder = RowDecoder(lineage.contract)

    def initial(self) -> None:
        """Return no state."""

    def remember(self, state: None, rows: pa.Table) -> None:
        """Keep no state."""
        del state, rows

    def remake(self, state: None, messages: Sequence[Message]) -> tuple[None, Remade]:
        """Decode the records."""
        del state
        decoded = self._decoder.decode(messages)
        dropped = Counter(item.reason for item in decoded.refused)
        return None, Remade(_concatenated(self._contract, decoded.rows.values()), dropped)


class ReparseTrades:
    """Parses raw records again; the state is the trade ids seen, so that venue duplicates stay out.

    Every id is remembered, without the live parser's bound: rows far behind a range would raise the floor above
    it, and its rows would be too old. So a trade that the live parser refused as too old is made.

    Args:
        lineage: of `trades`.
        topic_id: Kafka's id of the raw topic.
        parse: the parser, with the limits of the live one.
    """

    history_columns: Sequence[str] = ("instrument", "trade_id")

    def __init__(self, lineage: Lineage, topic_id: str, parse: ParseRecords) -> None:
        self._contract = lineage.contract
        self._topic_id = topic_id
        self._parse = parse
        self._decoder = RowDecoder(lineage.contract)

    def initial(self) -> ParserState:
        """Return a state in which no id was seen."""
        return {}

    def remember(self, state: ParserState, rows: pa.Table) -> ParserState:
        """Add the ids of rows that are in the table already."""
        known = dict(state)
        instruments: list[str] = pc.unique(rows["instrument"]).to_pylist()  # type: ignore[assignment]
        for instrument in instruments:
            ids = rows.filter(pc.field("instrument") == instrument)["trade_id"].cast(pa.int64())
            seen = known[instrument].copy() if instrument in known else SeenIds(max_intervals=None)
            for number in np.unique(ids.to_numpy()):
                seen.add(int(number))
            known[instrument] = seen
        return known

    def remake(self, state: ParserState, messages: Sequence[Message]) -> tuple[ParserState, Remade]:
        """Parse the records and decode the trades from the bytes that the parser would have sent."""
        dropped: Counter[str] = Counter()
        records = []
        for message in messages:
            try:
                records.append(raw_record(self._topic_id, message))
            except DecodeError as error:
                dropped[error.reason] += 1
        unbounded = {item.instrument: SeenIds(max_intervals=None) for item in records if item.instrument not in state}
        parsed = self._parse({**state, **unbounded}, records)
        dropped.update(refusal.reason for refusal in parsed.refusals)
        dropped.update({name: count for name, count in parsed.counters.items() if count})
        sent = [SentRecord(trade, trade.raw_partition, trade.raw_offset) for trade in parsed.trades]
        decoded = self._decoder.decode(cast("list[Message]", sent))
        dropped.update(item.reason for item in decoded.refused)
        rows = _concatenated(self._contract, decoded.rows.values())
        # Which typed record carried a trade is not known here: what the decoder took is the raw position.
        return parsed.state, Remade(rows.drop_columns([SOURCE_PARTITION, SOURCE_OFFSET]), dropped)


def reparse_trades(settings: Settings) -> MakeRemake:
    """Return the re-run of `trades` with the limits of the live parser."""
    return partial(ReparseTrades, parse=partial(parse_records, limits=settings.parser_limits))


RECIPES: Mapping[str, Recipe] = MappingProxyType({"trades": Recipe("raw-trades", "parser", reparse_trades)})
"""Tables that a processor makes, by contract id; the others are landed again from their own topics."""


def lineage_of(contracts: Contracts, table_name: str) -> Lineage:
    """Return how the rows of a table point at the records that they were made of.

    Raises:
        ConfigurationError: there is no such table, or no topic feeds it.
    """
    contract = contracts.of_table(table_name)
    recipe = RECIPES.get(contract.id)
    source = contracts[recipe.source_id] if recipe else contract
    if source.topic is None or contract.topic is None:
        msg = f"table {table_name} is not fed from a topic, so there is nothing to replay it from"
        raise ConfigurationError(msg)
    return Lineage(contract, source)


class SentRecord:
    """A value as the record that its processor would have sent, for `RowDecoder`; its place is what the maker says."""

    __slots__ = ("_offset", "_partition", "_value")

    def __init__(self, value: msgspec.Struct, partition: int, offset: int) -> None:
        self._value, self._partition, self._offset = value, partition, offset

    def partition(self) -> int:
        """Return the topic-partition number."""
        return self._partition

    def offset(self) -> int:
        """Return the offset."""
        return self._offset

    def value(self) -> bytes:
        """Return the bytes on the wire."""
        return msgspec.json.encode(self._value)


def _concatenated(contract: Contract, parts: Iterable[pa.Table]) -> pa.Table:
    tables = list(parts)
    return pa.concat_tables(tables) if tables else contract.arrow_schema.empty_table()
