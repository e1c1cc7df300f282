"""The rules of "Exactly once into Iceberg", each as a schedule that loses or doubles rows without it.

Every schedule runs twice: as the code is, where it must be refused where it says so and be exact, and with its
rule left out, where what the rule guards against must be seen to happen: offsets lost or doubled in the table. Two
rules guard more than that; what comes of leaving them out stands with them in `RULES`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.table.update import AssertTableUUID, SetPropertiesUpdate

from streamforge.errors import (
    CommitConflictError,
    CommitError,
    CommitUnknownError,
    FencedError,
    HistoryRolledBackError,
    TopicIdentityError,
)
from streamforge.lakehouse import commit, manifests
from streamforge.lakehouse.protocol import CLEAR, Comparison, Verdict
from streamforge.lakehouse.repair import commit_reconcile, plan_reconcile
from tests.object_store import on_both_stores
from tests.table_rig import RECREATED, NotExactError, Rig, before_send


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Return a patch of its own, so that what a schedule patches lies on top of the rule that is left out."""
    with pytest.MonkeyPatch.context() as context:
        yield context


# Schedules


def state_with_data(rig: Rig, _patch: pytest.MonkeyPatch) -> None:
    writer = rig.writer()
    writer.claim()
    writer.land(10)
    rig.foreign_compaction()
    rig.expire_all_but_last()
    again = writer.restart()
    again.table = rig.fresh()
    again.claim()
    again.land(20)
    rig.assert_exact(20)


def claim_compares(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    first, second = rig.writer("a"), rig.writer("b")
    second.claim()
    before_send(patch, lambda: second.land(10))
    first.table = rig.fresh()
    first.claim()
    first.land(20)
    rig.assert_exact(20)


def claim_spares_the_heir(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    frozen, late, heir = rig.writer("frozen"), rig.writer("late"), rig.writer("heir")

    def take_over() -> None:
        heir.claim()
        heir.land(10)

    # One stood still with its compare behind it, the other before it; Kafka has given both up since.
    before_send(patch, take_over)
    for zombie in (late, frozen):
        with rig.refuses(commit.ClaimedMeanwhileError, match="heir"):
            zombie.claim()
    heir.land(20)
    rig.assert_exact(20)


def zombie_is_fenced(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    zombie, heir = rig.writer("zombie"), rig.writer("heir")
    zombie.claim()

    def take_over() -> None:
        heir.table = rig.fresh()
        heir.claim()
        heir.land(10)

    before_send(patch, take_over)
    with rig.refuses(FencedError, match="heir"):
        zombie.land(10)
    rig.assert_exact(10)


def every_attempt_compares(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    zombie, heir = rig.writer("zombie"), rig.writer("heir")
    zombie.claim()

    def take_over() -> None:
        heir.table = rig.fresh()
        heir.claim()
        heir.land(10)

    # The zombie's compare was clear when its commit was sent: only the one before the second attempt tells.
    before_send(patch, rig.foreign_append, take_over)
    with rig.refuses(FencedError):
        zombie.land(10)
    rig.assert_exact(10)


def start_must_be_next_offset(rig: Rig, _patch: pytest.MonkeyPatch) -> None:
    writer = rig.writer()
    writer.claim()
    writer.land(10)
    writer.ends = {0: 5}
    with rig.refuses(commit.PositionsMovedError):
        writer.land(15)
    rig.assert_exact(*([15] if rig.not_refused else [10]))


def rollback_is_refused(rig: Rig, _patch: pytest.MonkeyPatch) -> None:
    _roll_back_and_go_on(rig, expire=False)


def rollback_after_expiry_is_refused(rig: Rig, _patch: pytest.MonkeyPatch) -> None:
    _roll_back_and_go_on(rig, expire=True)


def _roll_back_and_go_on(rig: Rig, *, expire: bool) -> None:
    """A person takes 10 to 20 off `main`: whoever goes on at 20 loses them, whoever reconciles does not."""
    writer = rig.writer()
    writer.claim()
    first = writer.land(10)
    writer.land(20)
    rig.roll_back(first.snapshot_id)
    if expire:
        rig.expire_all_but_last()
    writer.table = rig.fresh()
    with rig.refuses(HistoryRolledBackError, match="streamforge reconcile"):
        writer.land(30)
    if not rig.not_refused:
        again = writer.restart()
        with rig.refuses(HistoryRolledBackError, match="streamforge reconcile"):
            again.claim()
        view = commit.view_of(rig.fresh())
        plan = plan_reconcile(view, dict.fromkeys(view.state.positions, 0))
        assert plan is not None
        commit_reconcile(rig.fresh(), plan, owner="repair")
        again.table = rig.fresh()
        again.claim()
        again.land(30)
    rig.assert_exact(30)


def all_or_nothing(rig: Rig, _patch: pytest.MonkeyPatch) -> None:
    writer, other = rig.writer("a"), rig.writer("b")
    writer.claim(0, 1)
    other.table = rig.fresh()
    other.claim(1)
    other.land_up_to({1: 10})
    writer.table = rig.fresh()
    with rig.refuses(FencedError, match="partition 1"):
        writer.land(10, 10)
    rig.assert_exact(*([10, 10] if rig.not_refused else [0, 10]))


def lost_answer_is_looked_for(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    writer = rig.writer()
    writer.claim()
    for number, answer in enumerate((ConnectionError("reset"), CommitFailedException("409 after landing")), start=1):
        answer_with(rig, patch, answer, land=True)
        assert writer.land(number * 10).attempts == 1
    writer.land(30)
    rig.assert_exact(30)


def positions_need_a_snapshot(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    zombie, heir = rig.writer("zombie"), rig.writer("heir")
    zombie.claim()

    def take_over() -> None:
        heir.table = rig.fresh()
        heir.claim()
        heir.land(10)

    before_send(patch, take_over)
    with rig.refuses(FencedError):
        zombie.land(5, rows=False)
    after = heir.restart()
    after.claim()
    after.land(20)
    rig.assert_exact(20)


def recreated_topic_is_refused(rig: Rig, _patch: pytest.MonkeyPatch) -> None:
    """The new topic's offsets start at 0 again: whoever goes on at 10 passes over what lies before."""
    writer = rig.writer()
    writer.claim()
    writer.land(10)
    with rig.refuses(TopicIdentityError, match=r"topic-id .*another-topic-id.*streamforge rebind"):
        start = writer.restart().claim(identity=RECREATED)[0]
        if start:
            msg = f"lost: 0 to {start} of the new topic"
            raise NotExactError(msg)


# Rules left out


def no_properties(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "batch_properties", lambda _batch: {})


def claim_is_properties_only(patch: pytest.MonkeyPatch) -> None:
    _properties_only(patch, when=lambda draft: draft.summary.get(commit.KIND_KEY) == "claim")


def positions_are_properties_only(patch: pytest.MonkeyPatch) -> None:
    _properties_only(patch, when=lambda draft: not draft.added and commit.KIND_KEY not in draft.summary)


def no_owner_check(patch: pytest.MonkeyPatch) -> None:
    _ignoring(patch, Verdict.FENCED)


def first_attempt_only(patch: pytest.MonkeyPatch) -> None:
    real, seen = commit.check_batch, set[int]()

    def check(view: commit.TableView, batch: Any) -> None:
        if id(batch) not in seen:
            seen.add(id(batch))
            real(view, batch)

    patch.setattr(commit, "check_batch", check)


def no_position_check(patch: pytest.MonkeyPatch) -> None:
    _ignoring(patch, Verdict.MOVED)


def no_history_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "check_history", lambda *_: CLEAR)
    _ignoring(patch, Verdict.ROLLED_BACK)


def no_total_records_check(patch: pytest.MonkeyPatch) -> None:
    real = commit.view_of

    def view_of(table: Any) -> commit.TableView:
        view = real(table)
        last = view.state.last_commit
        if last is None:
            return view
        agreed = replace(view.history, total_records=last.total_records, sequence_number=last.sequence_number)
        return replace(view, history=agreed)

    patch.setattr(commit, "view_of", view_of)


def only_the_first_partition_is_compared(patch: pytest.MonkeyPatch) -> None:
    real = commit.compare
    patch.setattr(
        commit,
        "compare",
        lambda state, history, batch: real(state, history, replace(batch, moves=dict([min(batch.moves.items())]))),
    )


def no_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "has_landed", lambda *_: False)


def no_unclaimed_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "check_unclaimed", lambda *_: CLEAR)


def no_identity_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "check_identity", lambda *_: CLEAR)


@dataclass(frozen=True)
class Rule:
    """A rule of the design, the schedule that it is for, how it is left out, and what comes of that."""

    number: str
    schedule: Callable[[Rig, pytest.MonkeyPatch], None]
    leave_out: Callable[[pytest.MonkeyPatch], None]
    effect: type[Exception] = NotExactError


RULES = [
    Rule("2", state_with_data, no_properties),
    Rule("3", claim_compares, claim_is_properties_only),
    # Nothing is lost: the heir, which Kafka has given the topic-partition, is stopped for good by a zombie.
    Rule("3-heir", claim_spares_the_heir, no_unclaimed_check, FencedError),
    Rule("4-owner", zombie_is_fenced, no_owner_check),
    Rule("4-every-attempt", every_attempt_compares, first_attempt_only),
    Rule("4-position", start_must_be_next_offset, no_position_check),
    Rule("4-history", rollback_is_refused, no_history_check),
    Rule("4-history-cut", rollback_after_expiry_is_refused, no_total_records_check),
    Rule("4-all-or-nothing", all_or_nothing, only_the_first_partition_is_compared),
    # Nothing is lost, since positions are compared too: a commit of ours is taken for another's.
    Rule("5", lost_answer_is_looked_for, no_look, commit.PositionsMovedError),
    Rule("6", positions_need_a_snapshot, positions_are_properties_only),
    Rule("7", recreated_topic_is_refused, no_identity_check),
]
_IDS = [rule.number for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=_IDS)
def test_rule_schedule_is_refused_and_exact(rule: Rule, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rule.schedule(rig, monkeypatch)
    assert not rig.not_refused


@pytest.mark.parametrize("rule", RULES, ids=_IDS)
def test_rule_left_out_loses_or_doubles(
    rule: Rule, rig: Rig, patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule.leave_out(patch)
    with pytest.raises(rule.effect):
        rule.schedule(rig, monkeypatch)


# Rule 5 in full


@pytest.mark.parametrize("answer", [ConnectionError("reset"), CommitFailedException("409"), TimeoutError("late")])
def test_commit_refused_or_lost_on_the_way_lands_once_at_the_next_attempt(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, answer: Exception
) -> None:
    writer = rig.writer()
    writer.claim()
    answer_with(rig, monkeypatch, answer, land=False)
    assert writer.land(10).attempts == 2
    rig.assert_exact(10)


def test_commit_catalog_silent_until_the_deadline_is_unknown_and_names_the_snapshot(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = rig.writer()
    writer.claim()
    with monkeypatch.context() as silent:
        silent.setattr(type(rig.catalog), "commit_table", _raise(ConnectionError("reset")))
        silent.setattr(type(rig.catalog), "load_table", _raise(ConnectionError("reset")))
        with pytest.raises(CommitUnknownError, match=r"table snapshot \d+"):
            commit.commit_snapshot(writer.table, decide=lambda _view: {}, deadline_s=0, sleep=lambda _s: None)
    rig.assert_exact(0)


def test_commit_others_always_faster_gives_up_at_the_deadline(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = rig.writer()
    writer.claim()
    monkeypatch.setattr(type(rig.catalog), "commit_table", _raise(CommitFailedException("faster")))
    with pytest.raises(CommitConflictError, match="faster"):
        commit.commit_snapshot(writer.table, decide=lambda _view: {}, deadline_s=0, sleep=lambda _s: None)


def test_commit_answered_409_after_landing_keeps_its_manifests_where_the_library_deletes_them(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = rig.writer()
    writer.claim()
    answer_with(rig, monkeypatch, CommitFailedException("409"), land=True)
    writer.land(10)
    rig.assert_exact(10)
    # Why the library's own commit is not used: the same answer, and the table cannot be read any more.
    table = rig.fresh()
    with table.transaction() as transaction:
        transaction.set_properties({"commit.retry.num-retries": "0"})
    answer_with(rig, monkeypatch, CommitFailedException("409"), land=True)
    with pytest.raises(CommitFailedException):
        rig.fresh().append(rig.rows([(0, 10)]))
    with pytest.raises(FileNotFoundError):
        rig.content()


def test_commit_beside_foreign_append_and_property_is_rebased_without_writing_data_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = rig.writer()
    writer.claim()
    before_send(monkeypatch, rig.foreign_append, rig.foreign_property)
    committed = writer.land(10)
    assert committed.attempts == 2
    assert committed.table.properties["comment"] == "hello"
    rig.assert_exact(10)
    assert len(rig.stored_data_files()) == 2


@on_both_stores
def test_commit_delayed_while_main_went_forward_and_back_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The asserted `main` is the same again: only the catalog's own check of sequence numbers tells."""
    late, other = rig.writer("late"), rig.writer("other")
    other.claim(1)
    late.table = rig.fresh()
    late.claim(0)
    other.table = rig.fresh()
    compared = other.table.metadata.current_snapshot_id
    assert compared is not None

    def there_and_back() -> None:
        other.land_up_to({1: 10})
        rig.roll_back(compared)

    before_send(monkeypatch, there_and_back)
    with pytest.raises(HistoryRolledBackError, match="streamforge reconcile"):
        late.land(10)
    assert rig.fresh().metadata.current_snapshot_id == compared


@on_both_stores
def test_two_writers_given_one_partition_one_wins_and_the_other_is_fenced(rig: Rig) -> None:
    first, second = rig.writer("first"), rig.writer("second")
    first.claim()
    second.table = rig.fresh()
    second.claim()
    first.table = rig.fresh()
    with pytest.raises(FencedError, match="second") as error:
        first.land(10)
    assert error.value.exit_code == 3
    second.land(10)
    rig.assert_exact(10)


def test_commit_without_space_for_manifests_sends_nothing_and_goes_on_afterwards(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = rig.writer()
    writer.claim()
    with monkeypatch.context() as full:
        full.setattr(manifests, "write_manifest_list", _raise(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CommitError, match="No space left on device"):
            writer.land(10)
    rig.assert_exact(0)
    writer.land(10)
    rig.assert_exact(10)


# Helpers


def answer_with(rig: Rig, patch: pytest.MonkeyPatch, answer: Exception, *, land: bool) -> None:
    """Let the next commit of anyone end in `answer`, after it has landed or without."""
    kind = type(rig.catalog)
    real = kind.commit_table
    left = [answer]

    def commit_table(self: Catalog, *arguments: Any) -> Any:
        if not left:
            return real(self, *arguments)
        error = left.pop()
        if land:
            real(self, *arguments)
        raise error

    patch.setattr(kind, "commit_table", commit_table)


def _raise(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def _ignoring(patch: pytest.MonkeyPatch, verdict: Verdict) -> None:
    real = commit.compare

    def compare(*arguments: Any) -> Comparison:
        found = real(*arguments)
        return CLEAR if found.verdict is verdict else found

    patch.setattr(commit, "compare", compare)


def _properties_only(patch: pytest.MonkeyPatch, *, when: Callable[[Any], bool]) -> None:
    real = commit.stage_snapshot

    def stage(table: Any, draft: Any, properties: Any) -> Any:
        staged = real(table, draft, properties)
        if not when(draft):
            return staged
        return commit.StagedSnapshot(
            updates=(SetPropertiesUpdate(updates=dict(properties)),),
            requirements=(AssertTableUUID(uuid=table.metadata.table_uuid),),
        )

    patch.setattr(commit, "stage_snapshot", stage)
