"""What the tests of replay share: a small line (parser and writer in threads), parser bugs, and tables to compare."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition
from pyiceberg.table import Table

from streamforge.kafka import admin_client, producer_config, reader_config
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import ensure_table, load_table, open_catalog
from streamforge.lakehouse.kafka_reader import topic_identity
from streamforge.lakehouse.protocol import SourceIdentity
from streamforge.lakehouse.remake import ReparseTrades
from streamforge.lakehouse.replay_plan import Lineage
from streamforge.lakehouse.table_writer import TableWriter
from streamforge.log_reader import log_ends, stable_ends
from streamforge.log_reader import read_range as read_to_end
from streamforge.market.parsing import Parsed, ParserState, parse_records
from streamforge.market.records import RAW_HEADERS, AggressorSide, RawRecord, Trade, raw_record
from streamforge.offsets import OffsetRange, TopicPartition
from streaming.processors import parser as parser_module
from tests.pipeline_support import (
    Pipeline,
    RawFrame,
    WorkerThread,
    produce_raw,
    running,
    trade_frame,
    wait_for_positions,
)
from tests.waiting import wait_until
from tests.writer_support import WriterThread, running_writer, writer_settings

BTC, ETH = "BTC-USDT.SIM", "ETH-USDT.SIM"
OTHERS = ("ETH-USDT.SIM", "SOL-USDT.SIM", "XRP-USDT.SIM", "ADA-USDT.SIM", "DOT-USDT.SIM")
"""Some of them are in the other topic-partition."""
IDENTITY = ["raw_epoch", "raw_partition", "raw_offset", "raw_index"]
ParseRecords = Callable[[ParserState, Iterable[RawRecord]], Parsed]


def frames(instrument: str, ids: Iterable[int]) -> list[RawFrame]:
    """Return one trade frame for each id; every id has its own price and second."""
    return [
        RawFrame(
            instrument,
            trade_frame(instrument, n, price=f"{100 + n}.5", ts_ms=1_700_000_000_000 + 1_000 * n),
            ts_receive_ns=1_700_000_000_000_000_000 + 1_000_000_000 * n,
        )
        for n in ids
    ]


def inverted(wrong: Callable[[Trade], bool]) -> ParseRecords:
    """Return a parser with a bug: the aggressor's side of the trades that `wrong` picks is inverted."""

    def parse(state: ParserState, records: Iterable[RawRecord], *limits: Any) -> Parsed:
        parsed = parse_records(state, records, *limits)
        other = {AggressorSide.BUY: AggressorSide.SELL, AggressorSide.SELL: AggressorSide.BUY}
        trades = [
            msgspec.structs.replace(each, aggressor_side=other[each.aggressor_side]) if wrong(each) else each
            for each in parsed.trades
        ]
        return parsed._replace(trades=trades)

    return parse


def forgetful(lost: Callable[[Trade], bool]) -> ParseRecords:
    """Return a parser with a bug: the trades that `lost` picks are not made."""

    def parse(state: ParserState, records: Iterable[RawRecord], *limits: Any) -> Parsed:
        parsed = parse_records(state, records, *limits)
        return parsed._replace(trades=[each for each in parsed.trades if not lost(each)])

    return parse


def blind(unseen: Callable[[RawRecord], bool]) -> ParseRecords:
    """Return a parser with a bug: it cannot read the records that `unseen` picks."""

    def parse(state: ParserState, records: Iterable[RawRecord], *limits: Any) -> Parsed:
        return parse_records(state, [each for each in records if not unseen(each)], *limits)

    return parse


def with_parser(parse: ParseRecords) -> Callable[[Lineage, str], ReparseTrades]:
    """Return a recompute that parses with `parse`."""
    return lambda lineage, topic_id: ReparseTrades(lineage, topic_id, parse)


@dataclass(frozen=True)
class Line:
    """A parser and a writer at work."""

    pipeline: Pipeline
    parser: WorkerThread
    writer: WriterThread

    def wait(self) -> None:
        """Wait until every raw record produced so far is landed."""
        wait_for_positions(self.pipeline, self.parser, "raw-trades")
        # The parser's positions are visible before its records are: the end with those of open transactions counts.
        ends = log_ends(self.pipeline.settings, self.pipeline.partitions("trades"))

        def landed() -> bool:
            assert self.writer.exit_code is None, f"the writer ended with exit code {self.writer.exit_code}"
            positions = self.writer.worker.positions()
            return all(positions.get(item, -1) >= end for item, end in ends.items())

        wait_until(landed, what=f"trades landed up to {ends}")


@contextmanager
def live_line(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, *, parse: ParseRecords = parse_records, **writer: Any
) -> Iterator[Line]:
    """Run parser (with `parse`) and writer in threads; both have stopped at the end."""
    settings = writer_settings(pipeline.settings, **writer)
    with ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        patch.setattr(parser_module, "parse_records", parse)
        parser = stack.enter_context(running(pipeline, "parser"))
        yield Line(pipeline, parser, stack.enter_context(running_writer(settings, pipeline.contracts)))


def land(pipeline: Pipeline, *batches: Iterable[RawFrame], parse: ParseRecords = parse_records) -> None:
    """Produce raw records and land their trades, one commit a batch: the parser's and writer's steps, no threads."""
    line = SteppedLine(pipeline, parse)
    for batch in batches:
        produce_raw(pipeline, batch)
        line.parse()
        line.land()


def land_direct(
    pipeline: Pipeline, contract_id: str, *, wrong: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {}
) -> None:
    """Land a topic in its own table as the writer does, but with the columns that `wrong` gives for a row."""
    settings, contract = pipeline.settings, pipeline.contracts[contract_id]
    table = ensure_table(open_catalog(settings), settings, contract)
    writer = TableWriter(contract, table, owner=f"test@{uuid.uuid4()}", deadline_s=30)
    partitions = pipeline.partitions(contract_id)
    found = topic_identity(settings, pipeline.topic(contract_id))
    identity = SourceIdentity(found.topic, found.topic_id, found.cluster_id)
    writer.claim(identity, {item.partition: 0 for item in partitions})
    ends = stable_ends(settings, partitions)
    messages = [message for part in read_to_end(settings, dict.fromkeys(partitions, 0), ends) for message in part]
    writer.take(messages, {item.partition: end for item, end in ends.items()})
    for held in writer._held.values():
        held.rows = [
            pa.Table.from_pylist([row | wrong(row) for row in rows.to_pylist()], schema=rows.schema)
            for rows in held.rows
        ]
    writer.commit()


class SteppedLine:
    """The steps of parser and writer without their loops: transactions, claims and commits are the real ones."""

    def __init__(self, pipeline: Pipeline, parse: ParseRecords = parse_records) -> None:
        self._pipeline = pipeline
        self._parse = parse
        self._state: ParserState = {}
        settings = pipeline.settings
        self._reader = Consumer(reader_config(settings, **{"group.id": f"{settings.topic_prefix}parser"}))
        name = f"{settings.topic_prefix}parser.0"
        self._producer = Producer(producer_config(settings, transactional_id=name))
        self._producer.init_transactions(30)
        self._parsed = dict.fromkeys(pipeline.partitions("raw-trades"), 0)
        contract = pipeline.contracts["trades"]
        table = ensure_table(open_catalog(settings), settings, contract)
        self._writer = TableWriter(contract, table, owner=f"test@{uuid.uuid4()}", deadline_s=30)
        found = topic_identity(settings, pipeline.topic("trades"))
        identity = SourceIdentity(found.topic, found.topic_id, found.cluster_id)
        self._landed = dict(self._writer.claim(identity, dict.fromkeys(range(found.partitions), 0)))

    def parse(self, *, commit: bool = True) -> None:
        """Parse what was produced since, in one transaction; with `commit` off it stays open."""
        pipeline = self._pipeline
        topic_id = topic_identity(pipeline.settings, pipeline.topic("raw-trades")).topic_id
        ends = stable_ends(pipeline.settings, self._parsed)
        self._producer.begin_transaction()
        for messages in read_to_end(pipeline.settings, self._parsed, ends):
            records = [raw_record(topic_id, each) for each in messages if len(each.headers() or ()) == len(RAW_HEADERS)]
            parsed = self._parse(self._state, records)
            self._state = parsed.state
            for trade in parsed.trades:
                value, key = msgspec.json.encode(trade), trade.instrument.encode()
                self._producer.produce(pipeline.topic("trades"), value, key, partition=trade.raw_partition)
        offsets = [KafkaTopicPartition(item.topic, item.partition, end) for item, end in ends.items()]
        self._parsed = ends
        if commit:
            self._producer.send_offsets_to_transaction(offsets, self._reader.consumer_group_metadata(), 30)
            self._producer.commit_transaction(30)
        else:
            # What a reader sees between the two commit markers: the offsets are visible, the records are not yet.
            self._producer.flush(30)
            self._reader.commit(offsets=offsets, asynchronous=False)

    def finish(self) -> None:
        """Commit the transaction that was left open."""
        self._producer.commit_transaction(30)

    def land(self) -> None:
        """Land every typed record that is committed."""
        settings, topic = self._pipeline.settings, self._pipeline.topic("trades")
        starts = {TopicPartition(topic, number): offset for number, offset in self._landed.items()}
        wanted = log_ends(settings, starts)

        def stable() -> dict[TopicPartition, int] | None:
            ends = stable_ends(settings, starts)
            return ends if all(ends[item] >= end for item, end in wanted.items()) else None

        ends = wait_until(stable, what=f"{topic} is stable up to {wanted}")
        messages = [message for part in read_to_end(settings, starts, ends) for message in part]
        self._landed = {item.partition: end for item, end in ends.items()}
        self._writer.take(messages, self._landed)
        self._writer.commit()


def open_table(pipeline: Pipeline, contract_id: str = "trades") -> Table:
    """Load a table as it is now."""
    return load_table(open_catalog(pipeline.settings), pipeline.settings, pipeline.contracts[contract_id])


def rows_of(pipeline: Pipeline, contract_id: str = "trades") -> list[dict[str, Any]]:
    """Return every row of a table, by its identity."""
    table = open_table(pipeline, contract_id)
    identity = (
        IDENTITY if "raw_epoch" in table.schema().column_names else [n.replace("raw", "source") for n in IDENTITY]
    )
    data: pa.Table = table.scan().to_arrow()
    rows: list[dict[str, Any]] = data.sort_by([(name, "ascending") for name in identity]).to_pylist()
    return rows


def is_within(row: dict[str, Any], ranges: Iterable[OffsetRange], prefix: str = "raw") -> bool:
    """Return whether a row came from one of the ranges."""
    partition, offset = row[f"{prefix}_partition"], row[f"{prefix}_offset"]
    return any(each.partition == partition and each.start <= offset < each.end for each in ranges)


def partition_of(pipeline: Pipeline, instrument: str) -> int:
    """Return the raw topic-partition that an instrument's trades came from."""
    return int(next(row["raw_partition"] for row in rows_of(pipeline) if row["instrument"] == instrument))


def raw_range(pipeline: Pipeline, partition: int, start: int, end: int) -> OffsetRange:
    """Return a range of the raw topic."""
    return OffsetRange(pipeline.topic("raw-trades"), partition, start, end)


def raw_ranges(pipeline: Pipeline) -> list[OffsetRange]:
    """Return everything that the raw topic holds."""
    ends = stable_ends(pipeline.settings, pipeline.partitions("raw-trades"))
    return [raw_range(pipeline, item.partition, 0, end) for item, end in ends.items() if end]


def positions_of(pipeline: Pipeline, contract_id: str = "trades") -> Any:
    """Return what the table's properties say of the writer's positions."""
    return commit.view_of(open_table(pipeline, contract_id)).state.positions


def snapshot_ids(pipeline: Pipeline, contract_id: str = "trades") -> list[int]:
    """Return the table snapshots in the order in which they were made."""
    snapshots = open_table(pipeline, contract_id).metadata.snapshots
    return [each.snapshot_id for each in sorted(snapshots, key=lambda item: item.sequence_number or 0)]


def cut(pipeline: Pipeline, partition: int, log_start: int) -> None:
    """Remove the raw records of a topic-partition below `log_start`, as retention does."""
    item = KafkaTopicPartition(pipeline.topic("raw-trades"), partition, log_start)
    admin = admin_client(pipeline.settings)
    admin.delete_records([item])[item].result()
