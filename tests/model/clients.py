"""Everybody beside the writers: a replay (real), a compaction and an expiry (foreign), a repair (real)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table.refs import MAIN_BRANCH

from streamforge.errors import StreamForgeError
from streamforge.kafka import TopicIdentity
from streamforge.lakehouse import commit, repair
from streamforge.lakehouse import replay as replay_module
from streamforge.lakehouse.content_hash import ContentHash
from streamforge.lakehouse.protocol import SourcePartition
from streamforge.lakehouse.remake import Reland, lineage_of
from streamforge.lakehouse.replay_plan import Counts, Plan, TouchedFile, merged_ranges
from streamforge.lakehouse.replay_run import Engine, replay_epoch
from streamforge.lakehouse.replay_target import Progress, Target
from streamforge.offsets import OffsetRange
from tests.model.seams import Answer, Asks, Load, Lost, Port, Send
from tests.model.world import Log, ModelFile, ModelSnapshot, Request, Row, Table, interned
from tests.model.writers import CONTRACT, IDENTITY, TOPIC, Asked, Ended, settings

CORRECTED = 2
"""The parser that a replay re-runs; the live one is 1."""


@dataclass(frozen=True, slots=True)
class Client:
    """A process that does one thing when it is called.

    Args:
        drafts: snapshot ids that it has given.
        is_called: it is in the middle of it.
        answers: to the questions of the call.
    """

    drafts: int = 0
    is_called: bool = False
    answers: tuple[Answer, ...] = ()


class Again(BaseException):
    """Ends a run that waits for what others have to do first."""


class ClientModel:
    """Runs one thing that a process does.

    Args:
        name: of the process.
        number: of the process.
        work: what it does.
    """

    def __init__(self, name: str, number: int, work: Callable[[Port], object]) -> None:
        self.name = name
        self._number = number
        self._work = work
        self._runs: dict[Client, Asked | Ended] = {}

    def run(self, client: Client) -> Asked | Ended:
        """Run the call to its next question or its end; a run is made once for each value."""
        if client not in self._runs:
            self._runs[client] = self._run(client)
        return self._runs[client]

    def _run(self, client: Client) -> Asked | Ended:
        port = Port(self.name, self._number, client.answers, client.drafts)
        error: StreamForgeError | None = None
        try:
            self._work(port)
        except Asks as asks:
            return Asked(asks.question, port.drafts)
        except Again:
            return Ended(replace(client, answers=()))
        except StreamForgeError as raised:
            error = raised
        return Ended(Client(port.drafts), error)


# The replay


@dataclass(frozen=True, slots=True)
class ModelTarget(Target):
    """The real target of a table that its own topic feeds, with the model's catalog."""

    port: Port

    def load(self) -> IcebergTable:
        """Load the table as it is now."""
        return load(self.port)

    def barrier(self, ranges: Iterable[OffsetRange]) -> Any:
        """Return the real barrier; where the real one sleeps, this one begins anew."""
        real = Target.barrier(self, ranges)
        return SimpleNamespace(wait=partial(real.wait, monotonic_s=lambda: 0.0, sleep=_begin_again))

    def checked(self, ranges: Iterable[OffsetRange]) -> tuple[OffsetRange, ...]:
        """Return `ranges`: the model's log has them all."""
        return merged_ranges(ranges)


def _begin_again(_seconds: float) -> NoReturn:
    raise Again


class ModelEngine:
    """The two passes over rows that are tuples; what is compared and committed is the real replay's affair."""

    name = "model"

    def __init__(self, port: Port, logs: tuple[Log, ...]) -> None:
        self._port = port
        self._logs = logs

    def plan(self, target: Target, table: IcebergTable, ranges: Sequence[OffsetRange], _progress: Progress) -> Plan:
        """Compare the rows of `ranges` with those that the corrected parser makes."""
        metadata: Any = table.metadata
        value: Table = metadata.value
        touched, now = [], list[Row]()
        for file in value.head.files if value.head else ():
            found = [row for row in file.rows if is_within(row, ranges)]
            if found:
                task: Any = SimpleNamespace(file=file)
                touched.append(TouchedFile(task, len(found)))
                now += found
        after = self._remade(ranges)
        same = sum(1 for row in now if row in after)
        changed = sum(1 for row in now if row not in after and row._replace(parser=CORRECTED) in after)
        index: Any = None
        return Plan(
            table=commit.table_name(table),
            ranges=tuple(ranges),
            epoch=target.epoch_in(commit.view_of(table).state),
            snapshot_id=value.main,
            replay_epoch=replay_epoch(table),
            touched=tuple(touched),
            kept_rows=sum(item.task.file.record_count for item in touched) - len(now),
            counts=Counts(len(now), len(after), same, changed),
            hash_now=_hash(now),
            hash_after=_hash(after),
            dropped={},
            index=index,
        )

    def write(
        self, _target: Target, _table: IcebergTable, plan: Plan, _commit_id: str, _progress: Progress
    ) -> list[DataFile]:
        """Write the re-made rows, and those of the replaced files that stay."""
        files: list[ModelFile] = [each.task.file for each in plan.touched]  # type: ignore[misc]
        kept = [row for file in files for row in file.rows if not is_within(row, plan.ranges)]
        written: list[Any] = [self._port.new_file([*kept, *self._remade(plan.ranges)])]
        return written

    def _remade(self, ranges: Sequence[OffsetRange]) -> list[Row]:
        return [
            Row(each.partition, offset, CORRECTED)
            for each in ranges
            for offset in self._logs[each.partition].within(each.start, each.end, corrected=True)
        ]


def is_within(row: Row, ranges: Sequence[OffsetRange]) -> bool:
    """Return whether a row came from one of `ranges`."""
    return any(row.partition == each.partition and each.start <= row.offset < each.end for each in ranges)


def _hash(rows: Sequence[Row]) -> ContentHash:
    return ContentHash(
        len(rows), (sum(1 << (8 * row.partition + row.offset) for row in rows), sum(r.parser for r in rows))
    )


def replay(ranges: Sequence[OffsetRange], logs: tuple[Log, ...], port: Port) -> None:
    """Run the real replay of `ranges`."""
    made, contracts = settings()
    lineage = lineage_of(contracts, CONTRACT)
    source = TopicIdentity(IDENTITY.cluster_id, TOPIC, IDENTITY.topic_id, len(logs))
    catalog: Any = None
    target = ModelTarget(made, catalog, lineage, source, Reland(lineage, source.topic_id), Reland, port)
    engine: Engine = ModelEngine(port, logs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_module, "open_target", lambda *_: target)
        replay_module.replay(made, contracts, CONTRACT, ranges, engine=engine, monotonic_s=lambda: 0.0)


# Repair


def reconcile(port: Port) -> None:
    """Run the real `streamforge reconcile`; Kafka has all that the table ever had."""
    table = load(port)
    view = commit.view_of(table)
    plan = repair.plan_reconcile(view, dict.fromkeys(view.state.positions, 0))
    if plan is not None:
        repair.commit_reconcile(table, plan, owner=port.author)


def ends_of_rows(table: IcebergTable) -> tuple[dict[SourcePartition, int], int]:
    """Return the greatest offset + 1 of the rows in `main`; it stands in for a scan of the data files."""
    metadata: Any = table.metadata
    ends: dict[SourcePartition, int] = {}
    for row in metadata.value.head.rows if metadata.value.head else ():
        source = SourcePartition(1, row.partition)
        ends[source] = max(row.offset + 1, ends.get(source, 0))
    return ends, 0


# Others, with no code of ours


def compact(port: Port) -> None:
    """Replace all files by one, as Spark does: on a conflict again, as long as the files are there."""
    table = _value(load(port))
    files = table.head.files if table.head else ()
    if not files:
        return
    merged = port.new_file(row for file in files for row in file.rows)
    port.drafts += 1
    snapshot_id = port.number * 1000 + port.drafts
    while table.head is not None and set(files) <= set(table.head.files) and table.snapshot(snapshot_id) is None:
        snapshot = ModelSnapshot(
            snapshot_id=snapshot_id,
            parent_snapshot_id=table.main,
            sequence_number=table.last_sequence_number + 1,
            files=(*(file for file in table.head.files if file not in files), merged),
            total=table.head.total,
        )
        asserted = ((MAIN_BRANCH, table.main),)
        request = Request(port.author, asserted, snapshot=interned(snapshot), main=snapshot_id)
        if not isinstance(port.ask(Send(interned(request))), Lost):
            return
        table = _value(load(port))


def expire(port: Port) -> None:
    """Expire every snapshot but the head of `main`, as Spark's `retain_last => 1` does; once."""
    table = _value(load(port))
    expired = frozenset(item.snapshot_id for item in table.snapshots if item.snapshot_id != table.main)
    if expired:
        port.ask(Send(interned(Request(port.author, ((MAIN_BRANCH, table.main),), expired=expired))))


def load(port: Port) -> IcebergTable:
    """Load the table as it is now."""
    answer = port.ask(Load())
    assert isinstance(answer, Table)
    return port.table(answer)


def _value(table: IcebergTable) -> Table:
    metadata: Any = table.metadata
    value: Table = metadata.value
    return value


def connect(patch: pytest.MonkeyPatch) -> None:
    """Connect the real repair to the model's rows."""
    patch.setattr(repair, "ends_of_rows", ends_of_rows)
