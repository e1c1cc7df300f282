"""The steps that lead on from a state.

A step is whatever one party does between two calls of the catalog or the group, or a fault. All parties are at
every moment free to take their next step, so a process that stands still and wakes as a zombie needs no step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from tests.model.clients import Client, ClientModel, compact, expire, reconcile, replay
from tests.model.invariants import check_landed, check_refusal
from tests.model.seams import Answer, Confirm, Load, Lost, Port, Send
from tests.model.state import COMPACTION, EXPIRY, RECONCILE, REPLAY, Left, Scenario, State, Step
from tests.model.world import Request, Table, apply, difference_from_log, interned, is_sequence_stale
from tests.model.writers import Asked, Status, Writer, WriterModel


class Model:
    """The steps of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._logs = scenario.logs
        self._writers = [WriterModel(number, scenario.logs, scenario.retained) for number in range(scenario.writers)]
        works: tuple[Callable[[Port], object], ...]
        works = (partial(replay, scenario.replayed, scenario.logs), compact, expire, reconcile)
        names = ("replay", "compaction", "expiry", "reconcile")
        self._clients = [
            ClientModel(name, 10 + i, work) for i, (name, work) in enumerate(zip(names, works, strict=True))
        ]

    def first(self) -> State:
        """Return where the scenario begins."""
        nothing = (0,) * len(self._logs)
        state = State(
            table=interned(Table()),
            owners=tuple((owner, 1) for owner in self.scenario.owners),
            writers=tuple(model.first() for model in self._writers),
            clients=(Client(),) * len(self._clients),
            late=frozenset(),
            left=self.scenario.left,
            claimed=nothing,
            assigned=nothing,
        )
        return self._begun(state) if self.scenario.begun else state

    def _begun(self, state: State) -> State:
        for number in range(len(self._writers)):
            while state.writers[number].believed != self._owned(state, number) or state.writers[number].call:
                state = next(self._writer_steps(state, number)).state
        for _ in range(self.scenario.landed):
            state = next(self._writer_steps(state, 0)).state
        if self.scenario.landed:
            moved = [item.partition for item in state.writers[0].held if item.end > item.start]
            state = self._go_on(state, 0, state.writers[0].called("commit", moved))
            while state.writers[0].call:
                state = next(self._writer_steps(state, 0)).state
        return state

    def steps(self, state: State) -> Iterator[Step]:
        """Return every step that can be taken; a broken rule is raised when the step is made."""
        for number in range(len(self._writers)):
            yield from self._writer_steps(state, number)
            yield from self._group_steps(state, number)
        for number in range(len(self._clients)):
            yield from self._client_steps(state, number)
        for request in state.late:
            landed = self._landed(replace(state, late=state.late - {request}), request)
            if landed is not None:
                yield Step(f"a late commit of {request.author} ({request.kind or 'no kind'}) lands", landed, True)
        yield from self._person_steps(state)

    # Writers

    def _writer_steps(self, state: State, number: int) -> Iterator[Step]:
        writer, name = state.writers[number], self._writers[number].name
        if self._is_restarted(state, number):
            restarted = writer if writer.status is not Status.UP else writer.restarted(writer.drafts)
            yield Step(f"{name} is restarted", _with(state, number, replace(restarted, status=Status.UP)))
        if writer.status is not Status.UP:
            return
        if writer.call:
            outcome = self._writers[number].run(writer)
            assert isinstance(outcome, Asked)
            for label, after, answer, is_fault in self._answers(state, number, outcome):
                answered = replace(writer, answers=(*writer.answers, answer))
                yield Step(f"{name} {label}", self._go_on(after, number, answered), is_fault)
        else:
            yield from self._idle_steps(state, number)
        if state.left.crashes and (writer.call or writer.held):
            yield Step(f"{name} is killed and restarted", self._killed(state, number), True)

    def _is_restarted(self, state: State, number: int) -> bool:
        """Return whether a supervisor starts the writer again, or the person who has just mended the table."""
        writer = state.writers[number]
        if writer.status is Status.FAILED:
            return True
        if writer.status is Status.ROLLED_BACK:
            return not state.table.is_moved
        return (
            not writer.call and bool(writer.held or writer.status is Status.FENCED) and self._is_mended(state, number)
        )

    def _is_mended(self, state: State, number: int) -> bool:
        """Return whether a repair has fenced the writer that the group has given a topic-partition to."""
        positions = state.table.state.positions
        mended = {source.partition for source, position in positions.items() if position.owner == "reconcile"}
        return any(owner == number for p, (owner, _) in enumerate(state.owners) if p in mended)

    def _idle_steps(self, state: State, number: int) -> Iterator[Step]:
        writer, name = state.writers[number], self._writers[number].name
        owned = self._owned(state, number)
        if writer.believed != owned:
            yield Step(f"{name} polls and is assigned {_said(owned)}", self._polled(state, number, owned))
        for item in writer.held:
            if writer.ahead is None and writer.reading[item.partition] < self._logs[item.partition].end:
                fetched = self._go_on(state, number, writer.called("fetch", [item.partition]))
                if not self.scenario.reads_ahead:
                    fetched = self._taken(fetched, number)
                yield Step(f"{name} fetches from partition {item.partition}", fetched)
        if writer.ahead is not None:
            yield Step(f"{name} takes in what it has fetched", self._taken(state, number))
        moved = [item.partition for item in writer.held if item.end > item.start]
        if moved:
            yield Step(f"{name} begins a commit", self._go_on(state, number, writer.called("commit", moved)))

    def _polled(self, state: State, number: int, owned: tuple[int | None, ...]) -> State:
        writer = state.writers[number]
        before = [p for p, generation in enumerate(writer.believed) if generation is not None]
        if before:
            state = self._go_on(state, number, writer.called("lost", before))
            writer = state.writers[number]
        now = [p for p, generation in enumerate(owned) if generation is not None]
        if not now:
            return _with(state, number, replace(writer, believed=owned))
        return self._go_on(state, number, writer.called("assigned", now, owned))

    def _taken(self, state: State, number: int) -> State:
        writer = state.writers[number]
        assert writer.ahead is not None
        return self._go_on(state, number, writer.called("take", [writer.ahead.partition]))

    def _go_on(self, state: State, number: int, writer: Writer) -> State:
        """Run the writer's call; where it ends, check how and take in what came of it."""
        outcome = self._writers[number].run(writer)
        if isinstance(outcome, Asked):
            return _with(state, number, writer)
        if outcome.error is not None:
            check_refusal(state, number, writer, outcome.error, is_mended=self._is_mended(state, number))
        elif writer.call == "assigned":
            state = replace(state, assigned=_raised(state.assigned, writer.generations))
        process: Writer = outcome.process
        if writer.hands_over is not None and outcome.error is None:
            state = self._given(state, writer.hands_over, (number + 1) % len(self._writers))
            process = replace(process, believed=(None,) * len(process.believed))
        return _with(state, number, process)

    def _killed(self, state: State, number: int) -> State:
        writer, model = state.writers[number], self._writers[number]
        drafts, late = writer.drafts, state.late
        if writer.call:
            outcome = model.run(writer)
            assert isinstance(outcome, Asked)
            drafts = outcome.drafts
            if isinstance(outcome.question, Send) and apply(state.table, outcome.question.request) is not None:
                late |= {outcome.question.request}
        owners = tuple((owner, g + 1) if owner == number else (owner, g) for owner, g in state.owners)
        left = state.left._replace(crashes=state.left.crashes - 1)
        return self._pruned(
            replace(_with(state, number, writer.restarted(drafts)), owners=owners, left=left, late=late)
        )

    def _owned(self, state: State, number: int) -> tuple[int | None, ...]:
        return tuple(generation if owner == number else None for owner, generation in state.owners)

    # The group, others, a person

    def _group_steps(self, state: State, number: int) -> Iterator[Step]:
        """Give a topic-partition of a writer to the next one: any time, and where it stopped for good."""
        other = (number + 1) % len(self._writers)
        if other == number or state.writers[other].status is Status.FENCED:
            return
        is_gone = state.writers[number].status is Status.FENCED
        for p, (owner, generation) in enumerate(state.owners):
            if owner != number or not (is_gone or state.left.rebalances):
                continue
            left = state.left if is_gone else state.left._replace(rebalances=state.left.rebalances - 1)
            after = replace(state, left=left)
            label = f"the group gives partition {p} to {self._writers[other].name}"
            yield Step(label, self._given(after, p, other), not is_gone)
            writer = state.writers[number]
            if self.scenario.asks and not is_gone and not writer.call and writer.believed[p] == generation:
                asked = replace(writer.called("revoked", [item.partition for item in writer.held]), hands_over=p)
                label = f"the group asks {self._writers[number].name} for partition {p}"
                yield Step(label, self._go_on(after, number, asked), True)

    def _given(self, state: State, partition: int, number: int) -> State:
        _, generation = state.owners[partition]
        owners = (*state.owners[:partition], (number, generation + 1), *state.owners[partition + 1 :])
        return replace(state, owners=owners)

    def _client_steps(self, state: State, number: int) -> Iterator[Step]:
        client, model = state.clients[number], self._clients[number]
        if client.is_called:
            outcome = model.run(client)
            assert isinstance(outcome, Asked)
            for label, after, answer, is_fault in self._answers(state, None, outcome):
                answered = replace(client, answers=(*client.answers, answer))
                yield Step(f"{model.name} {label}", self._client_goes_on(after, number, answered), is_fault)
            if state.left.crashes:
                yield Step(f"{model.name} is killed", self._client_killed(state, number, outcome), True)
            return
        left = self._left_after_call(state, number)
        if left is not None:
            called = self._client_goes_on(replace(state, left=left), number, replace(client, is_called=True))
            yield Step(f"{model.name} begins", called, number != RECONCILE)

    def _left_after_call(self, state: State, number: int) -> Left | None:
        """Return what is left when a client begins, None where it may not."""
        if number == RECONCILE:
            return state.left if state.table.is_moved else None
        name = {REPLAY: "replays", COMPACTION: "compactions", EXPIRY: "expiries"}[number]
        count: int = getattr(state.left, name)
        return state.left._replace(**{name: count - 1}) if count else None

    def _client_goes_on(self, state: State, number: int, client: Client) -> State:
        outcome = self._clients[number].run(client)
        after = client if isinstance(outcome, Asked) else outcome.process
        return replace(state, clients=(*state.clients[:number], after, *state.clients[number + 1 :]))

    def _client_killed(self, state: State, number: int, outcome: Asked) -> State:
        late = state.late
        if isinstance(outcome.question, Send) and apply(state.table, outcome.question.request) is not None:
            late |= {outcome.question.request}
        left = state.left._replace(crashes=state.left.crashes - 1)
        if number == REPLAY:  # whoever started it starts it again
            left = left._replace(replays=left.replays + 1)
        clients = (*state.clients[:number], Client(outcome.drafts), *state.clients[number + 1 :])
        return replace(state, clients=clients, left=left, late=late)

    def _person_steps(self, state: State) -> Iterator[Step]:
        """Move `main` to each older snapshot that is retained."""
        if not state.left.rollbacks:
            return
        left = state.left._replace(rollbacks=state.left.rollbacks - 1)
        for snapshot in state.table.ancestors:
            table = interned(replace(state.table, main=snapshot.snapshot_id))
            is_harmed = state.is_harmed or bool(difference_from_log(table, self._logs))
            label = f"a person moves main back to table snapshot {snapshot.snapshot_id}"
            yield Step(label, replace(state, table=table, left=left, is_harmed=is_harmed), True)

    # The catalog

    def _answers(self, state: State, number: int | None, asked: Asked) -> Iterator[tuple[str, State, Answer, bool]]:
        """Return every answer that a question can get, and the world after it."""
        match asked.question:
            case Load():
                yield "loads the table", state, state.table, False
            case Confirm(generations):
                is_owner = all(state.owners[p] == (number, g) for p, g in generations)
                yield f"asks the group, which says {'yes' if is_owner else 'no'}", state, is_owner, False
            case Send(request):
                what = f"sends a commit ({request.kind or 'no kind'})"
                landed = self._landed(state, request)
                if landed is None:
                    yield f"{what}, which is refused", state, Lost.REFUSED, False
                    return
                yield f"{what}, which lands", landed, landed.table, False
                if state.left.lost_answers:
                    left = state.left._replace(lost_answers=state.left.lost_answers - 1)
                    after = replace(state, left=left, late=state.late | {request})
                    for answer in self.scenario.lost:
                        yield f"{what}, whose answer is lost ({answer})", after, answer, True

    def _landed(self, state: State, request: Request) -> State | None:
        """Return the world after `request` has landed, and check it; None where the catalog refuses it."""
        table = apply(state.table, request)
        if table is None:
            return None
        is_harmed = state.is_harmed and request.kind != "reconcile"
        after = replace(state, table=table, is_harmed=is_harmed)
        check_landed(state, after, request, self.scenario)
        if request.kind == "claim":
            after = replace(after, claimed=_raised(state.claimed, request.generations))
        return self._pruned(after)

    def _pruned(self, state: State) -> State:
        """Forget late requests that can never land any more."""

        def can_land(request: Request) -> bool:
            added = request.snapshot
            stale = added is not None and is_sequence_stale(state.table, added)
            return apply(state.table, request) is not None or (bool(state.left.rollbacks) and not stale)

        kept = frozenset(filter(can_land, state.late))
        return state if kept == state.late else replace(state, late=kept)


def _with(state: State, number: int, writer: Writer) -> State:
    return replace(state, writers=(*state.writers[:number], writer, *state.writers[number + 1 :]))


def _raised(values: tuple[int, ...], generations: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    new = dict(generations)
    return tuple(max(value, new.get(p, 0)) for p, value in enumerate(values))


def _said(owned: Sequence[int | None]) -> str:
    found = [f"partition {p}" for p, generation in enumerate(owned) if generation is not None]
    return ", ".join(found) or "nothing"
