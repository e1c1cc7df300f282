"""What must hold, at each commit that lands, at each refusal and where nothing goes on by itself."""

from __future__ import annotations

from collections import Counter

from streamforge.errors import FencedError, HistoryRolledBackError, StreamForgeError
from tests.model.clients import CORRECTED, is_within
from tests.model.state import Scenario, State
from tests.model.world import Request, Row, Table, difference_from_log
from tests.model.writers import Writer

OUR_KINDS = frozenset({"claim", "write", "replay"})
"""Kinds of our commits that a table which was moved back must refuse."""


class BrokenError(Exception):
    """Something that must hold does not."""


def check_landed(before: State, after: State, request: Request, scenario: Scenario) -> None:
    """Check a commit that has landed: its sender was allowed to, and it changes what it may.

    Raises:
        BrokenError: rows are lost, doubled or of the wrong parser, or who was fenced has landed.
    """
    _check_sender(before, request)
    if request.kind == "replay":
        _check_replay(before.table, after.table, scenario)
    else:
        _check_rows(before.table, after.table, request)
    difference = "" if after.is_harmed else difference_from_log(after.table, scenario.logs)
    if difference:
        raise BrokenError(difference)


def _check_sender(state: State, request: Request) -> None:
    if state.is_harmed and request.kind in OUR_KINDS:
        msg = f"a commit of {request.author} landed on a table that was moved back"
        raise BrokenError(msg)
    for p, generation in request.generations:
        if request.kind == "claim" and generation < state.claimed[p]:
            msg = f"{request.author} has claimed partition {p} back from its heir"
            raise BrokenError(msg)
        if request.kind == "write" and generation < state.assigned[p]:
            msg = f"{request.author}, fenced since its heir took over partition {p}, has landed rows"
            raise BrokenError(msg)


def _check_rows(before: Table, after: Table, request: Request) -> None:
    """Check that a write only adds, and that nobody else changes a row."""
    had, has = _counted(before), _counted(after)
    if had - has or (has != had and request.kind != "write"):
        what = f"a {request.kind}" if request.kind else "a commit"
        msg = f"{what} of {request.author} changed {_said(had - has)} to {_said(has - had)}"
        raise BrokenError(msg)


def _check_replay(before: Table, after: Table, scenario: Scenario) -> None:
    """Check that a replay makes its ranges anew, all of them and nothing else, and is no empty commit."""
    had, has = _counted(before), _counted(after)
    wanted = Counter({row: count for row, count in had.items() if not is_within(row, scenario.replayed)})
    wanted.update(
        Row(each.partition, offset, CORRECTED)
        for each in scenario.replayed
        for offset in scenario.logs[each.partition].within(each.start, each.end, corrected=True)
    )
    if has != wanted or has == had:
        msg = f"a replay changed {_said(had - has)} to {_said(has - had)}"
        raise BrokenError(msg)


def check_refusal(state: State, number: int, writer: Writer, error: StreamForgeError, *, is_mended: bool) -> None:
    """Check that a writer is stopped for a reason.

    Args:
        state: the world.
        number: of the writer.
        writer: in the call that was refused.
        error: what it raised.
        is_mended: a repair has fenced the writer, on purpose.

    Raises:
        BrokenError: the group counts on it and no repair has fenced it, or nobody has moved the table.
    """
    rightful = all(state.owners[p] == (number, generation) for p, generation in writer.generations)
    if isinstance(error, FencedError) and rightful and not is_mended:
        msg = f"writer {'AB'[number]}, to which the group has given it, is fenced: {error}"
        raise BrokenError(msg)
    seen = [item for item in (writer.table, *writer.answers) if isinstance(item, Table)][-1]
    if isinstance(error, HistoryRolledBackError) and not seen.is_moved:
        msg = f"a table that nobody has moved is refused: {error}"
        raise BrokenError(msg)


def check_end(state: State, scenario: Scenario) -> None:
    """Check that where nothing goes on by itself, everything has landed.

    Raises:
        BrokenError: it has not.
    """
    ends = {source.partition: position.next_offset for source, position in state.table.state.positions.items()}
    behind = [p for p, log in enumerate(scenario.logs) if ends.get(p, 0) < log.end]
    if behind:
        said = "; ".join(f"partition {p} is at {ends.get(p)} of {scenario.logs[p].end}" for p in behind)
        stopped = ", ".join(f"writer {'AB'[i]}: {writer.status}" for i, writer in enumerate(state.writers))
        msg = f"nothing goes on, and not everything has landed: {said} ({stopped})"
        raise BrokenError(msg)


def _counted(table: Table) -> Counter[Row]:
    return Counter(table.head.rows if table.head else ())


def _said(rows: Counter[Row]) -> str:
    return ", ".join(f"{r.partition}:{r.offset} of parser {r.parser}" for r in sorted(rows.elements())) or "nothing"
