"""The running line seen from outside: what lies in the topics, what has landed, and when all of it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from streamforge.contract_model import Contract, Contracts
from streamforge.errors import TableMissingError
from streamforge.gnn.libraries import missing_libraries
from streamforge.lakehouse.barrier import Barrier, BarrierState
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.commit import view_of
from streamforge.lakehouse.kafka_reader import topic_partitions
from streamforge.lakehouse.manifests import total_rows
from streamforge.lakehouse.table_freshness import TableAges, read_ages
from streamforge.log_reader import log_ends, log_starts
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import topic_of

_MADE_BY = {
    "trades": ("parser", "raw-trades"),
    "bars": ("bars", "trades"),
    "venue-bars": ("history-parser", "raw-candles-backfill"),
    "predictions": ("inference", "bars"),
}
"""Consumer group and source of the tables that a processor stands before."""

_FLOW = (
    "raw-depth",
    "raw-trades",
    "trades",
    "bars",
    "market-gaps",
    "raw-candles-backfill",
    "venue-bars",
    "predictions",
    "letter-decisions",
)
"""Every topic that the writer lands, what is fed behind what feeds it: only then is it known where its topic ends."""

Look = Callable[[str, BarrierState], None]
"""Hears of which contract is waited for, and how far it is."""


@dataclass(frozen=True, slots=True)
class LineState:
    """How far each landed contract is, by contract id.

    Args:
        log_end: end offsets of the topic, summed: its records, and the commit markers where it has them.
        lag: log end minus the table's `next_offset`, summed.
        rows: rows of the table.
    """

    log_end: Mapping[str, int]
    lag: Mapping[str, int]
    rows: Mapping[str, int]


class Line:
    """Looks at topics and tables of one platform; it changes nothing.

    Args:
        settings: which cluster and catalog.
        contracts: topics and tables.

    Raises:
        ConfigurationError: the catalog cannot be opened.
    """

    def __init__(self, settings: Settings, contracts: Contracts) -> None:
        self._settings = settings
        self._contracts = contracts
        self._catalog = open_catalog(settings)
        self._partitions: Sequence[TopicPartition] = ()
        self.landed: Sequence[Contract] = tuple(contracts[name] for name in _FLOW)

    def look(self) -> LineState:
        """Return how far everything is now; a table that no writer has made yet has no rows.

        Raises:
            RetryableSourceError: the broker does not answer.
        """
        names = {item.id: topic_of(self._contracts, item.id).name for item in self.landed}
        self._partitions = self._partitions or topic_partitions(self._settings, names.values())
        ends = log_ends(self._settings, self._partitions)
        log_end, lag, rows = {}, {}, {}
        for contract in self.landed:
            mine = {item.partition: end for item, end in ends.items() if item.topic == names[contract.id]}
            table = _table_or_none(self._catalog, self._settings, contract)
            reached = _next_offsets(table, names[contract.id])
            log_end[contract.id] = sum(mine.values())
            lag[contract.id] = sum(end - reached.get(partition, 0) for partition, end in mine.items())
            rows[contract.id] = 0 if table is None else total_rows(table.current_snapshot())
        return LineState(log_end, lag, rows)

    def wait_until_landed(self, timeout_s: float, *, on_look: Look = lambda _name, _state: None) -> None:
        """Wait until everything that lies in the topics now is processed and in the tables.

        The topics are taken in the order of the flow, so that what a processor makes on the way is waited for too.

        Raises:
            RetryableSourceError: it is not within `timeout_s`; says who is behind and by how much.
        """
        deadline_s = time.monotonic() + timeout_s
        for contract in self.landed:
            left_s = max(1.0, deadline_s - time.monotonic())
            barrier = self._barrier(contract)
            if barrier.ranges:
                barrier.wait(left_s, on_look=lambda state, name=contract.id: on_look(name, state))  # type: ignore[misc]

    def ages(self) -> list[TableAges]:
        """Return how old the rows of each table were when they landed."""
        return [read_ages(self._catalog, self._settings, self._contracts, item) for item in self.landed]

    def _barrier(self, contract: Contract) -> Barrier:
        kind, source = _MADE_BY.get(contract.id, (None, contract.id))
        if contract.id == "predictions" and missing_libraries():
            kind, source = None, contract.id  # nobody here makes any: what lies in the topic is all there is
        partitions = topic_partitions(self._settings, [topic_of(self._contracts, source).name])
        starts, ends = log_starts(self._settings, partitions), log_ends(self._settings, partitions)
        ranges = [OffsetRange(item.topic, item.partition, starts[item], end) for item, end in ends.items() if end]
        return barrier_of(self._settings, self._contracts, contract.id, ranges, group_kind=kind)


def barrier_of(
    settings: Settings, contracts: Contracts, contract_id: str, ranges: Sequence[OffsetRange], *, group_kind: str | None
) -> Barrier:
    """Return what waits until source `ranges` are processed and their rows are in a contract's table.

    Args:
        settings: which cluster and catalog.
        contracts: topics and tables.
        contract_id: whose table.
        ranges: of the topic that the table is made from.
        group_kind: kind of the processor between, None where the table's own topic is its source.
    """
    contract, topic = contracts[contract_id], topic_of(contracts, contract_id).name
    catalog = open_catalog(settings)
    return Barrier(
        settings=settings,
        ranges=ranges,
        table=contract_id,
        group=None if group_kind is None else f"{settings.topic_prefix}{group_kind}",
        topic=topic,
        next_offsets=lambda: _next_offsets(_table_or_none(catalog, settings, contract), topic),
    )


def _table_or_none(catalog: Catalog, settings: Settings, contract: Contract) -> Table | None:
    """Return the table; None while no writer has made it: nothing has landed in it."""
    try:
        return load_table(catalog, settings, contract)
    except TableMissingError:
        return None


def _next_offsets(table: Table | None, topic: str) -> Mapping[int, int]:
    if table is None:
        return {}
    state = view_of(table).state
    epoch = state.epoch_of(topic)
    return {} if epoch is None else state.next_offsets(epoch)
