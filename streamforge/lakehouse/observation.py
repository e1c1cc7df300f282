"""Where streams and tables stand, seen from outside: offsets, lag of each consumer, rows, table snapshot, newest event.

Lag is counted in records, commit markers included: end offset minus next offset. Consumers of a topic are its own
table, whose position is in the table (the writer's group is only a hint), and every consumer group of the
platform that has committed an offset on the topic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from confluent_kafka import KafkaException
from pyiceberg.catalog import Catalog

from streamforge.contract_model import Contract, Contracts
from streamforge.errors import ConfigurationError, RetryableSourceError
from streamforge.kafka import REQUEST_TIMEOUT_S, TopicIdentity, admin_client, describe_topics
from streamforge.lakehouse.barrier import NOTHING, group_offsets
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.column_bounds import greatest
from streamforge.lakehouse.commit import KIND_KEY, table_name, view_of
from streamforge.lakehouse.manifests import total_rows
from streamforge.log_reader import log_starts, stable_ends
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from streamforge.times import from_ns

EVENT_COLUMNS = ("ts_event_ns", "ts_end_ns", "ts_receive_ns", "ts_detected_ns", "ts_ns")
"""Columns that say when what a row tells of happened, the best one first."""

_WRITER = "writer"


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where one topic stands.

    Args:
        starts: log start of each topic-partition number.
        ends: last stable offset of each.
        lag: records behind the ends, by consumer: `table <name>` or the kind of a processor.
    """

    topic: TopicIdentity
    starts: Mapping[int, int]
    ends: Mapping[int, int]
    lag: Mapping[str, int]

    @property
    def retained(self) -> int:
        """Return how many offsets the log holds."""
        return sum(self.ends.values()) - sum(self.starts.values())


@dataclass(frozen=True, slots=True)
class TableState:
    """Where one table stands; what needs a table snapshot is None before the first one."""

    name: str
    location: str
    snapshot_id: int | None
    committed_at: datetime | None
    kind: str | None
    rows: int
    files: int
    bytes: int
    snapshots: int
    newest_event_at: datetime | None


def look_at_streams(settings: Settings, contracts: Contracts, chosen: Sequence[Contract]) -> Mapping[str, StreamState]:
    """Return where the topics of `chosen` stand, by contract id; topics that do not exist are left out.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    names = {contract.id: topic_of(contracts, contract.id).name for contract in chosen}
    found = describe_topics(admin_client(settings), names.values())
    partitions = {
        name: [TopicPartition(name, number) for number in range(identity.partitions)]
        for name, identity in found.items()
    }
    everything = [item for items in partitions.values() for item in items]
    # Positions before ends: a consumer that goes on meanwhile is never ahead of the end.
    groups = {group: group_offsets(settings, group, everything) for group in platform_groups(settings)}
    landed = {item.id: _landed(settings, item, names[item.id]) for item in chosen if names[item.id] in found}
    starts, ends = log_starts(settings, everything), stable_ends(settings, everything)
    states = {}
    for contract in chosen:
        if names[contract.id] not in found:
            continue
        mine = partitions[names[contract.id]]
        my_starts, my_ends = ({item.partition: side[item] for item in mine} for side in (starts, ends))
        consumers = _consumers(settings, contract, mine, groups)
        positions = landed[contract.id]
        if contract.table is not None and positions is not None:
            consumers = {f"table {contract.table.name}": positions} | consumers
        lag = {
            name: sum(max(0, end - max(at.get(number, NOTHING), my_starts[number])) for number, end in my_ends.items())
            for name, at in consumers.items()
        }
        states[contract.id] = StreamState(found[names[contract.id]], my_starts, my_ends, lag)
    return states


def look_at_table(catalog: Catalog, settings: Settings, contract: Contract) -> TableState:
    """Return where the contract's table stands, from its metadata alone.

    Raises:
        ConfigurationError: it does not exist.
        SchemaMismatchError: it is not as the contract says.
        CommitError: its metadata cannot be read.
    """
    table = load_table(catalog, settings, contract)
    snapshot = table.current_snapshot()
    summary = snapshot.summary.additional_properties if snapshot and snapshot.summary else {}
    column = event_column(contract)
    newest_ns = greatest(table, column) if column is not None else None
    return TableState(
        name=table_name(table),
        location=table.location(),
        snapshot_id=snapshot.snapshot_id if snapshot else None,
        committed_at=from_ns(snapshot.timestamp_ms * 1_000_000) if snapshot else None,
        kind=summary.get(KIND_KEY, "by another program") if snapshot else None,
        rows=total_rows(snapshot),
        files=int(summary.get("total-data-files", 0)),
        bytes=int(summary.get("total-files-size", 0)),
        snapshots=len(table.metadata.snapshots),
        newest_event_at=from_ns(newest_ns) if newest_ns is not None else None,
    )


def event_column(contract: Contract) -> str | None:
    """Return the column that says when what a row tells of happened; None where rows tell of no time."""
    names = {item.name for item in contract.fields}
    return next((name for name in EVENT_COLUMNS if name in names), None)


def platform_groups(settings: Settings) -> list[str]:
    """Return the consumer groups of this platform that Kafka knows.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    admin = admin_client(settings)
    try:
        listed = admin.list_consumer_groups(request_timeout=REQUEST_TIMEOUT_S).result()
    except KafkaException as error:
        msg = f"the broker does not list consumer groups: {error.args[0].str()}. Is it up? `streamforge status`"
        raise RetryableSourceError(msg) from error
    return sorted(item.group_id for item in listed.valid if item.group_id.startswith(settings.topic_prefix))


def _landed(settings: Settings, contract: Contract, topic: str) -> Mapping[int, int] | None:
    """Return the table's `next_offset` of each topic-partition; None where there is no table yet."""
    if contract.table is None:
        return None
    try:
        state = view_of(load_table(open_catalog(settings), settings, contract)).state
    except ConfigurationError:
        return None
    epoch = state.epoch_of(topic)
    return {} if epoch is None else state.next_offsets(epoch)


def _consumers(
    settings: Settings,
    contract: Contract,
    partitions: Sequence[TopicPartition],
    groups: Mapping[str, Mapping[TopicPartition, int]],
) -> dict[str, Mapping[int, int]]:
    """Return the committed offsets on a topic by kind of consumer; only of those that have any there."""
    found: dict[str, Mapping[int, int]] = {}
    for group, offsets in groups.items():
        kind = group.removeprefix(settings.topic_prefix)
        positions = {item.partition: offsets[item] for item in partitions if offsets[item] > NOTHING}
        if positions and not (contract.table is not None and kind == _WRITER):
            found[kind] = positions
    return found
