"""Trace: where a row came from, by whom it was committed, and when it passed each hop.

A row carries its identity (the record of the table's own topic), that of its raw record, and the id of its commit.
Everything else is looked up: records in Kafka while retention keeps them, raw records in their raw table afterwards;
the commit among the table's snapshots, or in the table `commits` where it has expired.

Times are those of different clocks: venue, loader, broker's producers, catalog. A hop may take less than nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Message
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import And, EqualTo
from pyiceberg.table import Table

from streamforge.contract_model import Contract, Contracts, FieldSource
from streamforge.dead_letters import header_texts, readable
from streamforge.errors import ConfigurationError
from streamforge.kafka import TopicIdentity, admin_client, describe_topics
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.freshness import EVENT_COLUMN, RECEIVE_COLUMN
from streamforge.lakehouse.protocol import TableState
from streamforge.lakehouse.query import ask, quoted
from streamforge.lakehouse.replay_plan import RAW_COLUMNS, SOURCE_COLUMNS, Lineage, compare_with
from streamforge.lakehouse.replay_target import files_with, read_file
from streamforge.lakehouse.rows import COMMIT_ID, CONTRACT_VERSION, RAW_TOPIC_ID
from streamforge.log_reader import read_records_at
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.settings import Settings
from streamforge.times import iso_text, to_ns

LIMIT_ROWS = 10
_NS_PER_MS = 1_000_000
_PAYLOAD = "payload"
_VERSION_COLUMNS = ("parser_version", "processor_version")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where a record lies: the identity that a row points at; `topic` is empty where nothing knows it any more."""

    topic: str
    topic_id: str
    epoch: int
    partition: int
    offset: int
    index: int


@dataclass(frozen=True, slots=True)
class FoundRecord:
    """A record, as far as it can still be had.

    Args:
        place: where it lies.
        found_in: `kafka`, `table <name>`, or empty.
        missing: why it could not be had; empty where it was.
        ts_produced_ns: Kafka's time of it, which is when it was produced; None where only the table has it.
        headers: as text.
        text: the bytes as text, or as base64.
        encoding: `utf-8` or `base64`.
    """

    place: RecordPlace
    found_in: str = ""
    missing: str = ""
    ts_produced_ns: int | None = None
    key: str | None = None
    headers: Mapping[str, str] | None = None
    text: str | None = None
    encoding: str | None = None


@dataclass(frozen=True, slots=True)
class CommitFound:
    """The commit that brought a row.

    Args:
        found_in: `snapshot` while the table has it, `commits` where it has expired, empty where nothing knows it.
        kind: what made it: `write`, `replay`, ...
        who: a process of ours, or a person for a replay; None where its summary does not say.
    """

    commit_id: str
    found_in: str = ""
    snapshot_id: int | None = None
    ts_committed_ns: int | None = None
    kind: str | None = None
    who: str | None = None
    added_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Hop:
    """One step on the way: when, and how long after the step before that is known; None where it is not known."""

    name: str
    ts_ns: int | None
    after_ms: float | None


@dataclass(frozen=True, slots=True)
class TracedRow:
    """One row and its way.

    Args:
        record: of the table's own topic; None in a row that a replay made where no typed record matches.
        raw: the raw record; None where rows have none, as bars.
        versions: contract version, and parser or processor version where the row has one.
    """

    row: Row
    record: FoundRecord | None
    raw: FoundRecord | None
    commit: CommitFound
    versions: Mapping[str, str]
    hops: Sequence[Hop]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values for a JSON report; times are also ISO 8601 text."""
        plain = asdict(self)
        plain["row"] = dict(self.row)
        plain["hops"] = [
            asdict(hop) | {"time": None if hop.ts_ns is None else iso_text(hop.ts_ns)} for hop in self.hops
        ]
        return plain


@dataclass(frozen=True, slots=True)
class Traced:
    """The first rows that were asked for; `is_cut` says that there are more."""

    rows: Sequence[TracedRow]
    is_cut: bool


def trace(
    settings: Settings, contracts: Contracts, table_name: str, where: str, *, limit_rows: int = LIMIT_ROWS
) -> Traced:
    """Find the rows of a table for which `where` is true, and the way of each.

    Args:
        settings: which cluster and catalog.
        contracts: all of them.
        table_name: table name or contract id.
        where: an expression of DuckDB's SQL.
        limit_rows: most rows to trace.

    Raises:
        ConfigurationError: no such table, or one that no topic feeds; or the expression is wrong.
        RetryableSourceError: the broker does not answer.
        CommitError: the table cannot be read.
    """
    contract = contracts.of_table(table_name)
    if contract.table is None or contract.topic is None:
        msg = f"rows of table {table_name} come from no topic: there is no way to trace. Ask with `streamforge sql`"
        raise ConfigurationError(msg)
    relation = f"{quoted(settings.namespace)}.{quoted(contract.table.name)}"
    query = f"SELECT * FROM {relation} WHERE ({where}\n)"  # noqa: S608 - a person's own question; tables are read only
    answer = ask(settings, contracts, query, limit_rows=limit_rows)
    rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    return Traced(_Tracer(settings, contracts, contract).trace(rows), answer.is_cut)


class _Tracer:
    """Looks up the ways of some rows of one table."""

    def __init__(self, settings: Settings, contracts: Contracts, contract: Contract) -> None:
        self._settings = settings
        self._contracts = contracts
        self._contract = contract
        self._raw_contracts = [contracts[name] for name in contract.inputs if contracts[name].topic is not None]
        self._catalog: Catalog = open_catalog(settings)
        self._table = load_table(self._catalog, settings, contract)
        self._state: TableState = commit.view_of(self._table).state

    def trace(self, rows: Sequence[Row]) -> list[TracedRow]:
        """Return the way of each row; records are read from Kafka for all rows together."""
        typed = [self._typed_place(row) for row in rows]
        raw = [self._raw_place(row) for row in rows]
        messages = self._read([place for place in (*typed, *raw) if place is not None])
        commits = {name: self._commit(name) for name in {str(row[COMMIT_ID]) for row in rows}}
        return [
            self._traced(
                row,
                None if typed_place is None else self._found(typed_place, messages, self._contract),
                None if raw_place is None else self._found(raw_place, messages, self._raw_contract(raw_place)),
                commits[str(row[COMMIT_ID])],
            )
            for row, typed_place, raw_place in zip(rows, typed, raw, strict=True)
        ]

    def _traced(self, row: Row, record: FoundRecord | None, raw: FoundRecord | None, made: CommitFound) -> TracedRow:
        versions = {name: str(row[name]) for name in (CONTRACT_VERSION, *_VERSION_COLUMNS) if row.get(name) is not None}
        times: list[tuple[str, int | None]] = [("event", row[EVENT_COLUMN])] if EVENT_COLUMN in row else []
        times += [("receive", row[RECEIVE_COLUMN])] if RECEIVE_COLUMN in row else []
        times += [] if raw is None else [("produce of raw", raw.ts_produced_ns)]
        times.append((f"produce of {self._contract.id}", record.ts_produced_ns if record else None))
        times.append(("commit", made.ts_committed_ns))
        return TracedRow(row, record, raw, made, versions, hops_of(times))

    def _typed_place(self, row: Row) -> RecordPlace | None:
        epoch, partition, offset, index = (row[name] for name in SOURCE_COLUMNS)
        source = self._state.sources.get(epoch)
        if partition is None or offset is None or source is None:
            return None
        return RecordPlace(source.topic, source.topic_id, epoch, partition, offset, index or 0)

    def _raw_place(self, row: Row) -> RecordPlace | None:
        if RAW_TOPIC_ID not in row:
            return None
        topic_id = str(row[RAW_TOPIC_ID])
        topic = next((name for name, found in self._topics.items() if found.topic_id == topic_id), "")
        epoch, partition, offset, index = (row[name] for name in RAW_COLUMNS)
        return RecordPlace(topic, topic_id, epoch, partition, offset, index)

    @cached_property
    def _topics(self) -> Mapping[str, TopicIdentity]:
        """Return the topics that records may lie in, as they are now."""
        names = {each.topic.name for each in (self._contract, *self._raw_contracts) if each.topic is not None}
        return describe_topics(admin_client(self._settings), sorted(names))

    def _read(self, places: Sequence[RecordPlace]) -> Mapping[tuple[TopicPartition, int], Message]:
        wanted = [
            (TopicPartition(place.topic, place.partition), place.offset)
            for place in places
            if (found := self._topics.get(place.topic)) is not None and found.topic_id == place.topic_id
        ]
        return read_records_at(self._settings, wanted)

    def _found(
        self, place: RecordPlace, messages: Mapping[tuple[TopicPartition, int], Message], contract: Contract | None
    ) -> FoundRecord:
        message = messages.get((TopicPartition(place.topic, place.partition), place.offset))
        if message is not None:
            return _from_message(place, message)
        gone = (
            f"Kafka has removed it from {place.topic} by retention"
            if place.topic in self._topics and self._topics[place.topic].topic_id == place.topic_id
            else f"its topic (id {place.topic_id}) is no longer in Kafka"
        )
        return self._from_table(place, contract, gone)

    def _raw_contract(self, place: RecordPlace) -> Contract | None:
        """Return the contract of a raw record's topic; of a topic that is gone only a single input can be it."""
        for each in self._raw_contracts:
            if each.topic is not None and place.topic == each.topic.name:
                return each
        return self._raw_contracts[0] if len(self._raw_contracts) == 1 else None

    def _from_table(self, place: RecordPlace, contract: Contract | None, gone: str) -> FoundRecord:
        """Return a record of a topic whose table keeps its bytes."""
        if contract is None or contract.table is None or _PAYLOAD not in contract.arrow_schema.names:
            return FoundRecord(place, missing=f"{gone}, and no table keeps the bytes of its records")
        name = f"{self._settings.namespace}.{contract.table.name}"
        table = load_table(self._catalog, self._settings, contract)
        sources = commit.view_of(table).state.sources
        epoch = next((number for number, source in sources.items() if source.topic_id == place.topic_id), None)
        row = None if epoch is None else _row_at(table, contract, epoch, place)
        if row is None:
            return FoundRecord(place, missing=f"{gone}, and table {name} has no row of it")
        text, encoding = readable(row[_PAYLOAD])
        kept = {item.source: item.name for item in contract.own_fields if item.source is FieldSource.KEY}
        key = row[kept[FieldSource.KEY]] if kept else None
        names = [item.name for item in contract.own_fields if item.source is FieldSource.HEADER]
        headers = {each: str(row[each]) for each in names if row[each] is not None}
        return FoundRecord(place, found_in=f"table {name}", key=key, headers=headers, text=text, encoding=encoding)

    def _commit(self, commit_id: str) -> CommitFound:
        for snapshot in self._table.metadata.snapshots:
            summary = snapshot.summary.additional_properties if snapshot.summary else {}
            if summary.get(commit.COMMIT_ID_KEY) == commit_id:
                when_ns = snapshot.timestamp_ms * _NS_PER_MS
                return _commit_found(commit_id, "snapshot", snapshot.snapshot_id, when_ns, summary)
        ledger = load_table(self._catalog, self._settings, self._contracts["commits"])
        name = commit.table_name(self._table)
        wanted = And(compare_with(EqualTo, "table_name", name), compare_with(EqualTo, COMMIT_ID, commit_id))
        for task in files_with(ledger, wanted):
            for row in read_file(ledger, task, ("snapshot_id", "ts_committed", "summary"), wanted).to_pylist():
                when_ns = to_ns(row["ts_committed"])
                return _commit_found(commit_id, "commits", row["snapshot_id"], when_ns, json.loads(row["summary"]))
        return CommitFound(commit_id)


def hops_of(times: Sequence[tuple[str, int | None]]) -> list[Hop]:
    """Return the hops of a way, each with the time since the one before it that is known."""
    hops: list[Hop] = []
    before_ns: int | None = None
    for name, ts_ns in times:
        after_ms = None if ts_ns is None or before_ns is None else (ts_ns - before_ns) / _NS_PER_MS
        hops.append(Hop(name, ts_ns, after_ms))
        before_ns = before_ns if ts_ns is None else ts_ns
    return hops


def _commit_found(
    commit_id: str, found_in: str, snapshot_id: int, when_ns: int, summary: Mapping[str, str]
) -> CommitFound:
    return CommitFound(
        commit_id,
        found_in,
        snapshot_id,
        when_ns,
        kind=summary.get(commit.KIND_KEY),
        who=summary.get(commit.OWNER_KEY),
        added_rows=int(summary.get("added-records", 0)),
    )


def _row_at(table: Table, contract: Contract, epoch: int, place: RecordPlace) -> Row | None:
    names = [item.name for item in contract.own_fields]
    here = OffsetRange(place.topic, place.partition, place.offset, place.offset + 1)
    wanted = Lineage(contract, contract).row_filter(epoch, [here])
    for task in files_with(table, wanted):
        rows: Sequence[Row] = read_file(table, task, names, wanted).to_pylist()
        if rows:
            return rows[0]
    return None


def _from_message(place: RecordPlace, message: Message) -> FoundRecord:
    kind, time_ms = message.timestamp()
    value, key = message.value() or b"", message.key()
    text, encoding = readable(value)
    return FoundRecord(
        place,
        found_in="kafka",
        ts_produced_ns=None if kind == TIMESTAMP_NOT_AVAILABLE else time_ms * _NS_PER_MS,
        key=None if key is None else readable(key)[0],
        headers=header_texts(message.headers()),
        text=text,
        encoding=encoding,
    )
