"""Compare what Kafka holds with what the tables hold, row by row: lost, doubled, different.

Two comparisons, each by identity and by a hash of the values:

- *typed*: every committed record of a table's own topic, from the log start to the table's `next_offset`, has
  exactly one row; a record that cannot be decoded has a dead letter instead. Where a table can be made again from
  raw, values are judged by raw alone: after a replay the table is right and the typed record is not.
- *raw*: raw records are parsed again by the live parser's own function; every trade of them is in `trades` once,
  by its raw identity. This does not trust the parser process, its transactions or the typed topic. A trade that
  lies twice in the table, from two raw records, is `unexpected` once; one that the live parser refused as too old
  to tell from a duplicate is `lost`, since here every id is remembered. A replay up to the log's end mends both.

Both stop at a barrier, so a live pipeline may go on: the ends are captured once at the start, and the rows come
from one table snapshot with the `next_offset`s of the same metadata. What is beyond is `not landed`, not lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from confluent_kafka import Message
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from streamforge.contracts import Contract, Contracts
from streamforge.errors import ConfigurationError, TopicIdentityError
from streamforge.lakehouse.barrier import group_offsets
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.commit import view_of
from streamforge.lakehouse.content_hash import content_schema, row_hashes
from streamforge.lakehouse.identities import Numbers, Spill, Tally, compare_bucket, doubled_in, lost_in, within
from streamforge.lakehouse.kafka_reader import topic_identity, topic_partitions
from streamforge.lakehouse.manifests import total_rows
from streamforge.lakehouse.protocol import TableState
from streamforge.lakehouse.remake import RECIPES, ReparseTrades, lineage_of
from streamforge.lakehouse.replay_plan import RAW_COLUMNS, SOURCE_COLUMNS, Lineage
from streamforge.lakehouse.rows import RowDecoder
from streamforge.letters import dead_letters
from streamforge.log_reader import Progress, log_ends, log_starts, read_range
from streamforge.market.parsing import Parsed, ParserLimits, ParserState, parse_records
from streamforge.market.records import RawRecord
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.settings import Settings

READ_TIMEOUT_S = 60.0
_POLL_S = 0.2
_TAIL_OFFSETS = 64

Offsets = Mapping[TopicPartition, int]
Place = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One table against one topic.

    Args:
        against: `typed` or `raw`.
        dead_letters: refused records that have a dead letter.
        not_landed: offsets between the table and the captured ends, commit markers included; 0 when all records are in.
        below_log_start: rows whose records retention has removed; only doubles can be told among them.
        other_sources: rows of earlier source epochs, and re-made rows without a typed record.
    """

    table: str
    against: str
    topic: str
    tally: Tally
    dead_letters: int = 0
    not_landed: int = 0
    below_log_start: int = 0
    other_sources: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values for a JSON report."""
        plain = asdict(self)
        return {**{k: v for k, v in plain.items() if k != "tally"}, **plain["tally"]}


@dataclass(frozen=True, slots=True)
class Captured:
    """What was there when verify began.

    Args:
        ends: end of every topic-partition that a table is fed from.
        landed_at: the `next_offset` from which on every record below `ends` is landed.
        processed: committed positions of processors on their source topics, taken before `ends`.
    """

    ends: Offsets
    landed_at: Offsets
    processed: Offsets


@dataclass(slots=True)
class _Sides:
    """Both sides of one comparison, and the range of each topic-partition that is compared.

    `by_raw` is the expected side once more, by raw identity, and `raw` the comparison that judges it.
    """

    expected: Spill
    actual: Spill
    starts: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    refused: list[Place] = field(default_factory=list)
    other_sources: int = 0
    by_raw: Spill | None = None
    raw: _Sides | None = None


def verify_tables(
    settings: Settings,
    contracts: Contracts,
    tables: Iterable[str] | None = None,
    *,
    wait_s: float = 0.0,
    progress: Progress = lambda *_: None,
) -> list[Comparison]:
    """Compare tables (all that a topic feeds, or those named) with their topics.

    Args:
        settings: which cluster and catalog.
        contracts: of topics and tables.
        tables: names or contract ids.
        wait_s: wait so long for the tables to reach the captured ends; what is missing then is `not_landed`.
        progress: hears how far it is.

    Raises:
        ConfigurationError: a table does not exist or is not fed from a topic.
        TopicIdentityError: the topic is not the one that the table was written from.
        RetryableSourceError: the broker does not answer.
    """
    chosen = _chosen(contracts, tables)
    catalog = open_catalog(settings)
    captured = capture(settings, contracts, chosen)
    _wait(settings, catalog, captured, chosen, deadline_s=time.monotonic() + wait_s, progress=progress)
    comparisons = []
    with TemporaryDirectory(prefix="streamforge-verify-") as folder:
        for contract in chosen:
            run = _TableRun(settings, contracts, contract, captured, progress)
            comparisons += run.compare(load_table(catalog, settings, contract), Path(folder) / contract.id)
    return comparisons


def capture(settings: Settings, contracts: Contracts, chosen: Sequence[Contract]) -> Captured:
    """Take the ends that are compared up to; processors' positions first, so that their outputs lie below `ends`."""
    processed: dict[TopicPartition, int] = {}
    for contract in chosen:
        recipe = RECIPES.get(contract.id)
        if recipe is not None:
            partitions = topic_partitions(settings, [_topic(contracts[recipe.source_id])])
            processed |= group_offsets(settings, f"{settings.topic_prefix}{recipe.group_kind}", partitions)
    partitions = topic_partitions(settings, [_topic(contract) for contract in chosen])
    starts, ends = log_starts(settings, partitions), log_ends(settings, partitions)
    tails = {item: max(starts[item], ends[item] - _TAIL_OFFSETS) for item in partitions}
    landed_at = dict(tails)
    for messages in read_range(settings, tails, ends, timeout_s=READ_TIMEOUT_S):
        for message in messages:
            landed_at[TopicPartition(message.topic() or "", message.partition() or 0)] = (message.offset() or 0) + 1
    return Captured(ends, landed_at, processed)


class _TableRun:
    """The comparisons of one table."""

    def __init__(
        self, settings: Settings, contracts: Contracts, contract: Contract, captured: Captured, progress: Progress
    ) -> None:
        self._settings = settings
        self._contracts = contracts
        self._contract = contract
        self._captured = captured
        self._progress = progress
        self._topic = _topic(contract)
        self._identity = topic_identity(settings, self._topic)
        self._recipe = RECIPES.get(contract.id)
        self._content = content_schema(contract)

    def compare(self, table: Table, folder: Path) -> list[Comparison]:
        """Compare one table snapshot with the typed topic and, where the table is parsed, with raw."""
        state = view_of(table).state
        epoch = self._epoch(state)
        typed = _Sides(Spill(folder / "typed-expected"), Spill(folder / "typed-actual"))
        raw = None
        if self._recipe is not None:
            raw = _Sides(Spill(folder / "raw-expected"), Spill(folder / "raw-actual"))
            typed.by_raw, typed.raw = Spill(folder / "typed-by-raw"), raw
        self._scan(table, epoch, typed, raw, state)
        next_offsets = state.next_offsets(epoch)
        in_flight = self._read_typed(next_offsets, typed)
        if raw is None or self._recipe is None:
            return [self._finish("typed", self._contract, typed, not_landed=self._not_landed(next_offsets))]
        source = self._contracts[self._recipe.source_id]
        self._read_raw(table, state, source, in_flight=in_flight, sides=raw)
        return [
            self._finish("typed", self._contract, typed, not_landed=self._not_landed(next_offsets)),
            self._finish("raw", source, raw),
        ]

    def _epoch(self, state: TableState) -> int:
        epoch = state.epoch_of(self._topic) or 0
        stored = state.sources.get(epoch)
        if stored is not None and stored.topic_id != self._identity.topic_id:
            msg = (
                f"table {self._contract.id} was written from topic {self._topic} with id {stored.topic_id} (source "
                f"epoch {epoch}), the cluster has id {self._identity.topic_id}. If the topic was recreated on purpose, "
                "run `streamforge rebind`"
            )
            raise TopicIdentityError(msg)
        return epoch

    def _scan(self, table: Table, epoch: int, typed: _Sides, raw: _Sides | None, state: TableState) -> None:
        """Read the table once and put every row on the actual side, by source and by raw identity."""
        raw_epoch = 0
        columns = [*SOURCE_COLUMNS, *self._content.names]
        if raw is not None and self._recipe is not None:
            raw_id = topic_identity(self._settings, _topic(self._contracts[self._recipe.source_id])).topic_id
            raw_epoch = {topic_id: number for number, topic_id in state.raw_topics.items()}.get(raw_id, 0)
            columns += [name for name in RAW_COLUMNS if name not in columns]
        snapshot = table.current_snapshot()
        if snapshot is None:
            return
        total = total_rows(snapshot)
        done = 0
        scan = table.scan(snapshot_id=snapshot.snapshot_id, selected_fields=tuple(columns))
        for batch in scan.to_arrow_batch_reader():
            rows = pa.Table.from_batches([batch])
            hashes = row_hashes(rows, self._content)[0]
            _put(typed, rows, SOURCE_COLUMNS, epoch, hashes if raw is None else np.zeros_like(hashes))
            if raw is not None:
                _put(raw, rows, RAW_COLUMNS, raw_epoch, hashes)
            done += rows.num_rows
            self._progress(f"rows of {self._contract.id}", done, total)

    def _read_typed(self, next_offsets: Mapping[int, int], sides: _Sides) -> dict[int, int]:
        """Decode the topic up to the table; return the least raw offset that is still on its way, by raw partition."""
        ends = {item: end for item, end in self._captured.ends.items() if item.topic == self._topic}
        starts = log_starts(self._settings, ends)
        sides.starts = {item.partition: start for item, start in starts.items()}
        sides.ends = {item.partition: next_offsets.get(item.partition, starts[item]) for item in ends}
        # A live table may be past the captured end: then its own next_offset is the end.
        until = {item: max(end, sides.ends[item.partition]) for item, end in ends.items()}
        decoder, in_flight = RowDecoder(self._contract), dict[int, int]()
        for messages in self._records(f"records of {self._topic}", starts, until):
            decoded = decoder.decode(messages)
            for partition, rows in decoded.rows.items():
                landed = np.asarray(rows["source_offset"], np.int64) < sides.ends[partition]
                _least(in_flight, rows.filter(pa.array(~landed)))
                self._expect(sides, partition, rows.filter(pa.array(landed)))
            sides.refused += [
                (item.message.partition() or 0, item.message.offset() or 0, 0) for item in decoded.refused
            ]
        return in_flight

    def _expect(self, sides: _Sides, partition: int, rows: pa.Table) -> None:
        hashes = row_hashes(rows, self._content)[0]
        zeros = np.zeros(rows.num_rows, np.int64)
        if sides.by_raw is not None:
            raw = [np.asarray(rows[name], np.int64) for name in RAW_COLUMNS[1:]]
            sides.by_raw.add(raw[0], raw[1], raw[2], hashes)
            hashes = np.zeros_like(hashes)
        sides.expected.add(zeros + partition, np.asarray(rows["source_offset"], np.int64), zeros, hashes)

    def _read_raw(
        self, table: Table, state: TableState, source: Contract, *, in_flight: Mapping[int, int], sides: _Sides
    ) -> None:
        """Parse raw records again up to what the parser has committed and the writer has landed."""
        lineage = lineage_of(self._contracts, self._contract.id)
        topic = _topic(source)
        topic_id = topic_identity(self._settings, topic).topic_id
        processed = {item: end for item, end in self._captured.processed.items() if item.topic == topic}
        ends = {item: min(end, in_flight.get(item.partition, end)) for item, end in processed.items()}
        starts = log_starts(self._settings, ends)
        ends = {item: max(end, starts[item]) for item, end in ends.items()}
        sides.starts = {item.partition: start for item, start in starts.items()}
        sides.ends = {item.partition: end for item, end in ends.items()}
        parser = _Reparser(lineage, topic_id, self._settings.parser_limits)
        raw_epoch = {found: number for number, found in state.raw_topics.items()}.get(topic_id, 0)
        for item, start in starts.items():
            if start > 0:
                before = lineage.row_filter(raw_epoch, [OffsetRange(topic, item.partition, 0, start)])
                scan = table.scan(row_filter=before, selected_fields=("instrument", "trade_id"))
                for batch in scan.to_arrow_batch_reader():
                    parser.remember(item.partition, pa.Table.from_batches([batch]))
        for messages in self._records(f"records of {topic}", starts, ends):
            for partition, group in _by_partition(messages).items():
                rows, refused = parser.parse(partition, group)
                offsets, indexes = (np.asarray(rows[name], np.int64) for name in ("raw_offset", "raw_index"))
                hashes = row_hashes(rows, self._content)[0]
                sides.expected.add(np.full(len(offsets), partition), offsets, indexes, hashes)
                sides.refused += refused

    def _records(self, what: str, starts: Offsets, ends: Offsets) -> Iterator[list[Message]]:
        total = sum(max(0, ends[item] - start) for item, start in starts.items())
        at = dict(starts)
        for messages in read_range(self._settings, starts, ends, timeout_s=READ_TIMEOUT_S):
            for message in messages:
                at[TopicPartition(message.topic() or "", message.partition() or 0)] = (message.offset() or 0) + 1
            self._progress(what, sum(at[item] - start for item, start in starts.items()), total)
            yield messages

    def _finish(self, against: str, source: Contract, sides: _Sides, *, not_landed: int = 0) -> Comparison:
        tally, below = Tally(), 0
        # A live table has rows behind the barrier of the raw comparison; the typed one ends where the table ends.
        open_end = against == "typed"
        for bucket in sorted(sides.expected.buckets() | sides.actual.buckets()):
            start, end = sides.starts.get(bucket.partition, 0), sides.ends.get(bucket.partition, 0)
            actual = sides.actual.take(bucket)
            old = within(actual, bucket, 0, start)
            doubled_in(tally, bucket, old)
            below += len(old)
            actual = within(actual, bucket, start, np.iinfo(np.int64).max if open_end else end)
            compare_bucket(tally, bucket, sides.expected.take(bucket), actual)
        _judge_by_raw(sides, tally)
        refused = [place for place in sides.refused if place[1] < sides.ends.get(place[0], 0)]
        return Comparison(
            table=self._contract.id,
            against=against,
            topic=_topic(source),
            tally=tally,
            dead_letters=self._dead_letters(source, refused, tally),
            not_landed=not_landed,
            below_log_start=below,
            other_sources=sides.other_sources,
        )

    def _dead_letters(self, source: Contract, refused: list[Place], tally: Tally) -> int:
        """Count refused records that have a dead letter; one that has none is lost."""
        if not refused:
            return 0
        topic_id = topic_identity(self._settings, _topic(source)).topic_id
        letters = _topic(self._contracts[f"{source.id}.dlq"])
        wanted, found = set(refused), set[Place]()
        for _, letter in dead_letters(self._settings, [letters]):
            if letter is None:
                continue  # Not a dead letter of ours, so it proves nothing.
            place = (letter.partition, letter.offset, letter.index)
            if letter.topic_id == topic_id and place in wanted:
                found.add(place)
        missing = sorted(wanted - found)
        tally.note("lost", len(missing), (":".join(map(str, place)) for place in missing))
        tally.records += len(missing)
        return len(found)

    def _not_landed(self, next_offsets: Mapping[int, int]) -> int:
        return sum(
            self._captured.ends[item] - next_offsets.get(item.partition, 0)
            for item, needed in self._captured.landed_at.items()
            if item.topic == self._topic and next_offsets.get(item.partition, 0) < needed
        )


class _Reparser:
    """The live parser's function over raw records, a state for each topic-partition, refusals with their places."""

    def __init__(self, lineage: Lineage, topic_id: str, limits: ParserLimits) -> None:
        self._limits = limits
        self._remake = ReparseTrades(lineage, topic_id, self._parse)
        self._states: dict[int, ParserState] = {}
        self._parsed_offsets: set[int] = set()
        self._refused: list[Place] = []

    def remember(self, partition: int, rows: pa.Table) -> None:
        """Take the trade ids of rows whose raw records are gone."""
        self._states[partition] = self._remake.remember(self._state(partition), rows)

    def parse(self, partition: int, messages: Sequence[Message]) -> tuple[pa.Table, list[Place]]:
        """Return the rows of raw records and the places of those that are no trades."""
        self._parsed_offsets, self._refused = set(), []
        self._states[partition], remade = self._remake.remake(self._state(partition), messages)
        headless = {message.offset() or 0 for message in messages} - self._parsed_offsets
        return remade.rows, [*self._refused, *((partition, offset, 0) for offset in sorted(headless))]

    def _state(self, partition: int) -> ParserState:
        return self._states.get(partition) or self._remake.initial()

    def _parse(self, state: ParserState, records: Iterable[RawRecord]) -> Parsed:
        taken = list(records)
        self._parsed_offsets.update(record.offset for record in taken)
        parsed = parse_records(state, taken, self._limits)
        self._refused += [(item.record.partition, item.record.offset, item.index) for item in parsed.refusals]
        return parsed


def _chosen(contracts: Contracts, tables: Iterable[str] | None) -> list[Contract]:
    chosen = [item for item in contracts.with_table if item.topic] if tables is None else []
    for name in tables or ():
        contract = contracts.of_table(name)
        if contract.topic is None:
            msg = f"table {name} is not fed from a topic, so there is nothing to compare it with"
            raise ConfigurationError(msg)
        chosen.append(contract)
    return chosen


def _wait(
    settings: Settings,
    catalog: Catalog,
    captured: Captured,
    chosen: Sequence[Contract],
    *,
    deadline_s: float,
    progress: Progress,
) -> None:
    waiting = list(chosen)
    while waiting:
        behind = 0
        for contract in list(waiting):
            state = view_of(load_table(catalog, settings, contract)).state
            reached = state.next_offsets(state.epoch_of(_topic(contract)) or 0)
            needed = {i.partition: end for i, end in captured.landed_at.items() if i.topic == _topic(contract)}
            missing = sum(max(0, end - reached.get(partition, 0)) for partition, end in needed.items())
            behind += missing
            if not missing:
                waiting.remove(contract)
        if not waiting or time.monotonic() > deadline_s:
            return
        progress(f"waiting for {', '.join(contract.id for contract in waiting)}, {behind} offsets behind", 0, 0)
        time.sleep(_POLL_S)


def _topic(contract: Contract) -> str:
    if contract.topic is None:
        msg = f"contract {contract.id} ({contract.path}) has no topic"
        raise ConfigurationError(msg)
    return contract.topic.name


def _put(sides: _Sides, rows: pa.Table, columns: Sequence[str], epoch: int, hashes: Any) -> None:
    epochs, partitions, offsets, indexes = (_numbers(rows[name]) for name in columns)
    known = (epochs == epoch) & (partitions >= 0) & (offsets >= 0) & (indexes >= 0)
    sides.other_sources += int((~known).sum())
    sides.actual.add(partitions[known], offsets[known], indexes[known], hashes[known])


def _judge_by_raw(sides: _Sides, tally: Tally) -> None:
    """Count `lost` again by raw identity, where rows have one.

    A replay makes rows again without knowing their typed record, and a better parser may make none of a record.
    """
    if not tally.lost or sides.by_raw is None or sides.raw is None:
        return
    raw, again = sides.raw, Tally()
    for bucket in sorted(sides.by_raw.buckets()):
        wanted = sides.by_raw.take(bucket)
        judged = within(wanted, bucket, raw.starts.get(bucket.partition, 0), raw.ends.get(bucket.partition, 0))
        unmade = np.setdiff1d(judged["key"], raw.expected.take(bucket)["key"])
        lost_in(again, bucket, wanted[~np.isin(wanted["key"], unmade)], raw.actual.take(bucket))
    tally.lost = again.lost
    tally.examples["lost"] = again.examples.get("lost", [])


def _numbers(column: pa.ChunkedArray[Any]) -> Numbers:
    """Return whole numbers, -1 for null."""
    return np.asarray(column.cast(pa.int64()).fill_null(pa.scalar(-1, pa.int64())), np.int64)


def _least(in_flight: dict[int, int], rows: pa.Table) -> None:
    if "raw_offset" not in rows.column_names:
        return
    partitions, offsets = (np.asarray(rows[name], np.int64) for name in ("raw_partition", "raw_offset"))
    for partition in np.unique(partitions).tolist():
        least = int(offsets[partitions == partition].min())
        in_flight[partition] = min(in_flight.get(partition, least), least)


def _by_partition(messages: Sequence[Message]) -> dict[int, list[Message]]:
    groups: dict[int, list[Message]] = {}
    for message in messages:
        groups.setdefault(message.partition() or 0, []).append(message)
    return groups
