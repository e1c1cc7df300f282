"""The ledger of retention gaps: what Kafka removed before a table or a processor had it.

Whoever notices a gap appends it to the table `pipeline_gaps` before it stops or goes on, so that a kill at any
instruction leaves it noticed or to be noticed again. A row is appended once for each gap and state: every attempt is
a compare-and-set on the very `main` in which the rows were looked up. Rows are never changed; a gap that is
accepted later gets a second row.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from pyiceberg.table import Table

from streamforge.contract_model import Contract, Contracts
from streamforge.errors import CommitConflictError, CommitError
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import CATALOG_ERRORS, ensure_table, load_table, open_catalog, table_identifier
from streamforge.lakehouse.protocol import SourceIdentity, SourcePartition
from streamforge.retention_gaps import ConsumerKind, GapState, PipelineGap, open_gaps
from streamforge.settings import Settings

LEDGER_ID = "pipeline-gaps"
"""Id of the ledger's contract."""

_KIND = "gaps"
_ATTEMPTS = 10


def record_gaps(settings: Settings, contracts: Contracts, gaps: Sequence[PipelineGap]) -> int:
    """Append those of `gaps` that the ledger does not have in that state; return how many these were.

    Raises:
        CommitError: the ledger cannot be read or written; nothing was recorded, or it is not known.
        ConfigurationError: the catalog cannot be opened.
    """
    if not gaps:
        return 0
    contract = contracts[LEDGER_ID]
    table = ensure_table(open_catalog(settings), settings, contract)
    for _ in range(_ATTEMPTS):
        table = commit.refresh(table)
        known = {(gap.gap_id, gap.state) for gap in _read(table)}
        missing = {(gap.gap_id, gap.state): gap for gap in gaps if (gap.gap_id, gap.state) not in known}
        if not missing:
            return 0
        with suppress(commit.PositionsMovedError):
            _append(table, contract, list(missing.values()))
            return len(missing)
    msg = f"table {commit.table_name(table)}: other processes were always faster; {len(gaps)} gaps are not recorded"
    raise CommitConflictError(msg)


def read_gaps(settings: Settings, contracts: Contracts) -> list[PipelineGap]:
    """Return every row of the ledger; see `read_ledger`."""
    return read_ledger(settings, contracts[LEDGER_ID])


def read_ledger(settings: Settings, contract: Contract) -> list[PipelineGap]:
    """Return every row of the ledger, by its contract; none where the table does not exist yet.

    Raises:
        CommitError: it cannot be read.
        ConfigurationError: the catalog cannot be opened.
        SchemaMismatchError: it has other fields than its contract.
    """
    catalog = open_catalog(settings)
    try:
        exists = catalog.table_exists(table_identifier(settings, contract))
    except CATALOG_ERRORS as error:
        msg = f"the catalog does not say whether the table pipeline_gaps exists: {type(error).__name__}: {error}"
        raise CommitError(msg) from error
    return _read(load_table(catalog, settings, contract)) if exists else []


def accept_passed_gaps(
    settings: Settings, contracts: Contracts, table_name: str, *, accepted_by: str
) -> list[PipelineGap]:
    """Accept the open gaps of a table that its positions have passed; return them.

    A gap that its `next_offset` still lies below is not passed: the writer refuses to start until its own setting
    accepts it.

    Raises:
        ConfigurationError: there is no such table.
        CommitError: table or ledger cannot be read or written.
    """
    contract = contracts.of_table(table_name)
    found = open_gaps(gaps_of_table(read_gaps(settings, contracts), settings, contract))
    if not found:
        return []
    state = commit.view_of(load_table(open_catalog(settings), settings, contract)).state
    passed = []
    for gap in found:
        epoch = state.epoch_of(gap.topic)
        ends = state.next_offsets(epoch) if epoch is not None else {}
        if epoch != gap.source_epoch or ends.get(gap.source_partition, 0) >= gap.end_offset:
            detail = f"{gap.topic}-{gap.source_partition}: accepted by a person after the table had passed it"
            passed.append(replace(gap, state=GapState.ACCEPTED, detected_by=accepted_by, detail=detail))
    record_gaps(settings, contracts, passed)
    return passed


def given_up(
    table: str,
    contract: Contract,
    sources: Mapping[int, SourceIdentity],
    ranges: Mapping[SourcePartition, tuple[int, int]],
    *,
    by: str,
) -> list[PipelineGap]:
    """Return offset ranges that a person gives up, as accepted gaps of a table.

    Args:
        table: name with namespace.
        contract: of the table.
        sources: the table's topics by source epoch.
        ranges: offsets `[start, end)` by topic-partition.
        by: who gave them up.
    """
    is_transactional = contract.topic is not None and contract.topic.transactional
    return [
        PipelineGap(
            state=GapState.ACCEPTED,
            consumer_kind=ConsumerKind.TABLE,
            consumer=table,
            topic=sources[source.epoch].topic,
            topic_id=sources[source.epoch].topic_id,
            source_epoch=source.epoch,
            source_partition=source.partition,
            start_offset=start,
            end_offset=end,
            records_removed=None if is_transactional else end - start,
            detail=f"{source}: offsets [{start},{end}) were given up by a person",
            detected_by=by,
        )
        for source, (start, end) in sorted(ranges.items())
    ]


def gaps_of_table(gaps: Iterable[PipelineGap], settings: Settings, contract: Contract) -> list[PipelineGap]:
    """Return those of `gaps` that the contract's table has."""
    name = ".".join(table_identifier(settings, contract))
    return [gap for gap in gaps if (gap.consumer_kind, gap.consumer) == (ConsumerKind.TABLE, name)]


def _append(table: Table, contract: Contract, gaps: Sequence[PipelineGap]) -> None:
    seen_id = table.metadata.current_snapshot_id

    def decide(view: commit.TableView) -> dict[str, str]:
        if view.history.main_snapshot_id != seen_id:
            msg = f"main was at {seen_id} when the ledger was read, found {view.history.main_snapshot_id}"
            raise commit.PositionsMovedError(msg)
        return {}

    now = datetime.now(UTC)
    rows = [asdict(gap) | {"gap_id": gap.gap_id, "ts_detected": now} for gap in gaps]
    try:
        files = commit.write_data_files(table, pa.Table.from_pylist(rows, schema=contract.arrow_schema))
    except CATALOG_ERRORS as error:
        msg = (
            f"table {commit.table_name(table)}: a gap could not be written: {type(error).__name__}: {error}. "
            "Mend the storage; a restart notices the gap again"
        )
        raise CommitError(msg) from error
    summary = {commit.KIND_KEY: _KIND, commit.COMMIT_ID_KEY: uuid.uuid4().hex}
    commit.commit_snapshot(table, decide=decide, added=files, summary=summary)


def _read(table: Table) -> list[PipelineGap]:
    names = tuple(field.name for field in fields(PipelineGap))
    try:
        rows: list[dict[str, Any]] = table.scan(selected_fields=names).to_arrow().to_pylist()
    except CATALOG_ERRORS as error:
        msg = f"table {commit.table_name(table)} cannot be read: {type(error).__name__}: {error}. Mend the storage"
        raise CommitError(msg) from error
    return [
        PipelineGap(**row | {"state": GapState(row["state"]), "consumer_kind": ConsumerKind(row["consumer_kind"])})
        for row in rows
    ]
