"""What people call when the writer refuses to start: `rebind` and `reconcile`, each one empty append.

`rebind`: the topic was recreated or the cluster replaced. The next source epoch is registered for the new topic
id and cluster id, positions at the log start. Old rows and the properties of old epochs stay; a writer that still
holds the old topic is refused by its next compare.

`reconcile`: a person moved `main`. Properties do not move with it, so positions count rows as written that `main`
no longer holds. Each topic-partition is set to what `main` holds, and the writer lands the rest from the log again.

Why nothing is doubled or lost by it. The commits of a topic-partition are sequential, and each was compared with
the `main` that it was built on. So whatever snapshot of ours `main` stands at, it holds all rows below one offset
P of the topic-partition and none at or above it. P is found twice, and the greater is taken, since both are at most P:

- the end of the last source range among the commits that `main` descends from: exactly P, dead letters and
  commit markers included, and so also where a replay has replaced rows since;
- the greatest source offset of the rows in `main`, plus 1. It counts where expiry has cut the chain before such a
  commit. Between it and P lie only markers and dead letters, which come again and are counted by identity.

Without either, `main` holds nothing: P is the start of the first range that any commit told, where expiry has taken
none before it, else 0.
`next_offset` is no bound in either direction: where `main` is moved forward again it lies below P. An older epoch
of a topic is complete when `main` holds anything of a later one.

One case is left, where only rows tell P and a replay made the last of them anew without finding their typed record
(its `source_*` is null): these typed records land beside them. `rows_without_source` counts such rows, and a replay
of their raw range leaves each once. A replay that is under way is planned again (`streamforge.replay-epoch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pyiceberg.table import Table

from streamforge.contract_model import Contracts
from streamforge.errors import CommitConflictError, RetentionGapError
from streamforge.kafka import admin_client, describe_topics
from streamforge.lakehouse import commit
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.held import ends_of_commits, ends_of_rows, starts_of_commits
from streamforge.lakehouse.kafka_reader import topic_identity
from streamforge.lakehouse.pipeline_gaps import given_up, record_gaps
from streamforge.lakehouse.protocol import (
    SourceIdentity,
    SourcePartition,
    TableState,
    Verdict,
    check_history,
    check_identity,
    rebind_properties,
    reconcile_properties,
)
from streamforge.lakehouse.replay_run import REPLAY_EPOCH_KEY, replay_epoch
from streamforge.lakehouse.replay_target import topic_settings
from streamforge.log_reader import log_starts
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import ProcessIdentity

REBIND = "rebind"
RECONCILE = "reconcile"


@dataclass(frozen=True, slots=True)
class Rebind:
    """A topic's next source epoch.

    Args:
        table: its name.
        stored: the topic as the table knows it.
        found: the topic as Kafka has it.
        old_epoch: current source epoch of the topic, which ends.
        epoch: the one that begins.
        left: `next_offset`s at which the old epoch ends; what the old topic held from there on was not landed.
        log_starts: first offset of each topic-partition of the new topic, where the writer begins.
    """

    table: str
    stored: SourceIdentity
    found: SourceIdentity
    old_epoch: int
    epoch: int
    left: Mapping[int, int]
    log_starts: Mapping[int, int]


class KnownBy(StrEnum):
    """How it is known what `main` holds of a topic-partition."""

    COMMITS = "commits"
    ROWS = "rows"
    LATER_EPOCH = "later epoch"
    NOTHING = "nothing in main"


@dataclass(frozen=True, slots=True)
class PartitionRepair:
    """One topic-partition of a table that was moved.

    Args:
        topic: name.
        source: its number, and the source epoch.
        next_offset: as the properties say.
        held: `main` holds all below, and nothing from there on.
        known_by: how `held` is known.
        log_start: first offset in Kafka; None where this topic id is gone.
    """

    topic: str
    source: SourcePartition
    next_offset: int
    held: int
    known_by: KnownBy
    log_start: int | None

    @property
    def missing(self) -> tuple[int, int] | None:
        """Return the offsets `[start, end)` that count as written and are not in `main`."""
        return (self.held, self.next_offset) if self.held < self.next_offset else None

    @property
    def gap(self) -> tuple[int, int] | None:
        """Return the part of `missing` that Kafka cannot give again."""
        if self.missing is None or self.log_start is None:
            return self.missing
        return (self.held, min(self.log_start, self.next_offset)) if self.held < self.log_start else None

    @property
    def restart(self) -> int:
        """Return the new `next_offset`: what `main` holds, or behind the gap where Kafka still has more."""
        return self.gap[1] if self.gap and self.log_start is not None else self.held

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values for a JSON report."""
        return {
            "topic": self.topic,
            "source_epoch": self.source.epoch,
            "partition": self.source.partition,
            "next_offset": self.next_offset,
            "held": self.held,
            "known_by": str(self.known_by),
            "missing": self.missing,
            "log_start": self.log_start,
            "gap": self.gap,
            "restart": self.restart,
        }


@dataclass(frozen=True, slots=True)
class Reconcile:
    """What a moved table lacks, and the metadata that says so.

    Args:
        table: its name.
        found: what is wrong with the history.
        main_snapshot_id: where `main` stands.
        last_snapshot_id: our last commit, where it is still retained.
        state: the properties that were read.
        partitions: every topic-partition that the table knows.
        rows_without_source: rows of `main` that a replay made without a typed record.
    """

    table: str
    found: str
    main_snapshot_id: int | None
    last_snapshot_id: int | None
    state: TableState
    partitions: Sequence[PartitionRepair]
    rows_without_source: int

    @property
    def gaps(self) -> list[PartitionRepair]:
        """Return the topic-partitions whose missing rows Kafka cannot give again."""
        return [item for item in self.partitions if item.gap]


def plan_rebind(view: commit.TableView, identity: SourceIdentity, starts: Mapping[int, int]) -> Rebind | None:
    """Return what a rebind would begin; None where the table knows the topic as it is, or not at all.

    Raises:
        HistoryRolledBackError: the table was moved; that is mended first, while positions are those of the old topic.
    """
    if check_identity(view.state, identity).verdict is Verdict.CLEAR:
        return None
    commit.check_not_rolled_back(view)
    old_epoch = view.state.epoch_of(identity.topic) or 0
    return Rebind(
        table=commit.table_name(view.table),
        stored=view.state.sources[old_epoch],
        found=identity,
        old_epoch=old_epoch,
        epoch=max(view.state.sources) + 1,
        left=view.state.next_offsets(old_epoch),
        log_starts=starts,
    )


def rebind(settings: Settings, contracts: Contracts, table_name: str, *, dry_run: bool = False) -> Rebind | None:
    """Start a new source epoch for the topic that feeds a table; None: the table knows the topic as it is.

    Args:
        settings: which cluster and catalog.
        contracts: all of them.
        table_name: table name or contract id.
        dry_run: return what would be done and change nothing.

    Raises:
        ConfigurationError: there is no such table, or no topic feeds it.
        PermanentSourceError: the topic does not exist.
        HistoryRolledBackError: the table was moved by a person: reconcile it first.
        CommitConflictError: another process changed the topic's identity meanwhile.
    """
    contract = contracts.of_table(table_name)
    topic = topic_settings(contract.topic).name
    found = topic_identity(settings, topic)
    identity = SourceIdentity(topic, found.topic_id, found.cluster_id)
    items = [TopicPartition(topic, number) for number in range(found.partitions)]
    starts = {item.partition: offset for item, offset in log_starts(settings, items).items()}
    table = load_table(open_catalog(settings), settings, contract)
    plan = plan_rebind(commit.view_of(table), identity, starts)
    if plan is not None and not dry_run:
        owner = repair_owner(settings, REBIND)
        never = {SourcePartition(plan.epoch, number): (0, start) for number, start in plan.log_starts.items() if start}
        record_gaps(settings, contracts, given_up(plan.table, contract, {plan.epoch: identity}, never, by=owner))
        commit_rebind(table, plan, owner=owner)
    return plan


def commit_rebind(table: Table, plan: Rebind, *, owner: str) -> commit.Committed:
    """Register the new epoch of `plan` by an empty append."""

    def decide(view: commit.TableView) -> Mapping[str, str]:
        if plan_rebind(view, plan.found, plan.log_starts) != plan:
            raise _changed(plan.table)
        return rebind_properties(view.state, owner=owner, identity=plan.found, log_starts=plan.log_starts)

    return commit.commit_snapshot(table, decide=decide, summary=_summary(REBIND, owner))


def plan_reconcile(view: commit.TableView, live: Mapping[SourcePartition, int]) -> Reconcile | None:
    """Compare what the positions count as written with what `main` holds; None where `main` was not moved.

    Args:
        view: the metadata.
        live: log start of every topic-partition whose topic id Kafka still has.

    Raises:
        CommitError: the rows of `main` cannot be read.
    """
    history = check_history(view.state, view.history)
    if history.verdict is Verdict.CLEAR:
        return None
    by_commits = ends_of_commits(view)
    by_rows, without_source = ends_of_rows(view.table)
    first = starts_of_commits(view)
    state, snapshots = view.state, view.history.parents
    later = {source.epoch for source in by_commits.keys() | by_rows.keys()}
    partitions = []
    for source, position in sorted(state.positions.items()):
        topic = state.sources[source.epoch].topic
        if any(epoch > source.epoch and state.sources[epoch].topic == topic for epoch in later & state.sources.keys()):
            held, known_by = position.next_offset, KnownBy.LATER_EPOCH
        elif source in by_commits or source in by_rows:
            held = max(by_commits.get(source, 0), by_rows.get(source, 0))
            known_by = KnownBy.COMMITS if source in by_commits else KnownBy.ROWS
        else:
            held, known_by = first.get(source, 0), KnownBy.NOTHING
        partitions.append(PartitionRepair(topic, source, position.next_offset, held, known_by, live.get(source)))
    last = state.last_commit
    return Reconcile(
        table=commit.table_name(view.table),
        found=f"expected {history.expected}, found {history.found}",
        main_snapshot_id=view.history.main_snapshot_id,
        last_snapshot_id=last.snapshot_id if last and last.snapshot_id in snapshots else None,
        state=state,
        partitions=partitions,
        rows_without_source=without_source,
    )


def reconcile(
    settings: Settings,
    contracts: Contracts,
    table_name: str,
    *,
    accept_retention_gap: bool = False,
    dry_run: bool = False,
) -> Reconcile | None:
    """Set the positions of a moved table to what `main` holds; None: `main` is where our last commit left it.

    Args:
        settings: which cluster and catalog.
        contracts: all of them.
        table_name: table name or contract id.
        accept_retention_gap: give up what Kafka no longer has.
        dry_run: return what would be done and change nothing; gaps are in it and do not raise.

    Raises:
        ConfigurationError: there is no such table.
        RetentionGapError: Kafka no longer has all that is missing; nothing was changed.
        CommitConflictError: another process changed the table meanwhile; nothing was changed.
    """
    contract = contracts.of_table(table_name)
    topic_settings(contract.topic)  # refuses a table that no topic feeds
    table = load_table(open_catalog(settings), settings, contract)
    view = commit.view_of(table)
    plan = plan_reconcile(view, _live(settings, view.state))
    if plan is not None and not dry_run:
        if plan.gaps and not accept_retention_gap:
            raise RetentionGapError(gap_text(plan))
        owner = repair_owner(settings, RECONCILE)
        gaps = {item.source: item.gap for item in plan.gaps if item.gap}
        record_gaps(settings, contracts, given_up(plan.table, contract, plan.state.sources, gaps, by=owner))
        commit_reconcile(table, plan, owner=owner)
    return plan


def commit_reconcile(table: Table, plan: Reconcile, *, owner: str) -> commit.Committed:
    """Set the positions of `plan` by an empty append, if the metadata is still the one that was planned on."""
    next_offsets = {item.source: item.restart for item in plan.partitions}

    def decide(view: commit.TableView) -> Mapping[str, str]:
        if (view.history.main_snapshot_id, view.state) != (plan.main_snapshot_id, plan.state):
            raise _changed(plan.table)
        return {
            REPLAY_EPOCH_KEY: str(replay_epoch(view.table) + 1),
            **reconcile_properties(view.state, owner=owner, next_offsets=next_offsets),
        }

    return commit.commit_snapshot(table, decide=decide, summary=_summary(RECONCILE, owner))


def gap_text(plan: Reconcile) -> str:
    """Say what Kafka cannot give again, and what can be done."""
    parts = []
    for item in plan.gaps:
        has = "this topic id is gone" if item.log_start is None else f"Kafka's log starts at {item.log_start}"
        start, end = item.gap or (0, 0)
        parts.append(
            f"{item.topic}-{item.source.partition} (source epoch {item.source.epoch}): wanted from offset {item.held}, "
            f"{has}, [{start},{end}) cannot be landed again"
        )
    kept = (
        f"Table snapshot {plan.last_snapshot_id}, our last commit, is still there: moving main to it brings all back. "
        if plan.last_snapshot_id is not None
        else ""
    )
    return (
        f"table {plan.table}: Kafka no longer has all that main lost: {'; '.join(parts)}. {kept}"
        "To give these offsets up, use --accept-retention-gap"
    )


def _live(settings: Settings, state: TableState) -> dict[SourcePartition, int]:
    """Return the log start of every known topic-partition whose topic is still the one that the table knows."""
    found = describe_topics(admin_client(settings), {item.topic for item in state.sources.values()})
    here = {
        epoch: stored.topic
        for epoch, stored in state.sources.items()
        if (now := found.get(stored.topic)) is not None
        and stored == SourceIdentity(now.topic, now.topic_id, now.cluster_id)
    }
    items = {
        source: TopicPartition(here[source.epoch], source.partition)
        for source in state.positions
        if source.epoch in here
    }
    starts = log_starts(settings, items.values())
    return {source: starts[item] for source, item in items.items()}


def _changed(table: str) -> CommitConflictError:
    return CommitConflictError(
        f"table {table} was changed by another process while it was looked at; nothing was changed, run it again"
    )


def _summary(kind: str, owner: str) -> dict[str, str]:
    return {commit.KIND_KEY: kind, commit.OWNER_KEY: owner}


def repair_owner(settings: Settings, kind: str) -> str:
    """Return what the table and the ledger of gaps say of this process."""
    return ProcessIdentity.of_this_process(kind, "0").owner(settings.topic_prefix)
