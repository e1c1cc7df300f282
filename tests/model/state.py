"""The world of a scenario at one moment, as a value, and what may still happen in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from streamforge.offsets import OffsetRange
from tests.model.clients import Client
from tests.model.seams import Lost
from tests.model.world import Log, Request, Table
from tests.model.writers import Writer

REPLAY, COMPACTION, EXPIRY, RECONCILE = range(4)


class Left(NamedTuple):
    """What may still happen, and how often."""

    rebalances: int = 0
    crashes: int = 0
    lost_answers: int = 0
    rollbacks: int = 0
    compactions: int = 0
    expiries: int = 0
    replays: int = 0


class Step(NamedTuple):
    """What happens, where it leads, and whether it may also never happen."""

    label: str
    state: State
    is_fault: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """The world at one moment.

    Args:
        table: as the catalog has it.
        owners: the group's view: writer and generation, by topic-partition.
        writers: the processes.
        clients: `REPLAY`, `COMPACTION`, `EXPIRY`, `RECONCILE`.
        late: requests whose sender has no answer and which may still land.
        left: faults and others' deeds that may still come.
        claimed: greatest generation for which a claim has landed, by topic-partition.
        assigned: greatest generation whose assignment has ended well.
        is_harmed: a person has taken rows off `main`, and nobody has mended the positions.
    """

    table: Table
    owners: tuple[tuple[int, int], ...]
    writers: tuple[Writer, ...]
    clients: tuple[Client, ...]
    late: frozenset[Request]
    left: Left
    claimed: tuple[int, ...]
    assigned: tuple[int, ...]
    is_harmed: bool = False


@dataclass(frozen=True)
class Scenario:
    """Who is there, and what may happen.

    Args:
        name: of the scenario.
        says: what it is about.
        logs: of the topic-partitions.
        owners: which writer each topic-partition is first assigned to.
        left: faults and others' deeds, and how many.
        writers: number of writers.
        replayed: what a replay is asked for, by topic-partition.
        reads_ahead: a fetch may be made before the one before it is taken in.
        retained: table snapshots that a writer keeps when it expires some after each commit; None: it never does.
        asks: before a rebalance the group may wait for the writer to let go of its topic-partitions.
        begun: every topic-partition is claimed at the start, so that there are fewer steps to what is of interest.
        landed: so many fetches of the first writer have been committed at the start.
        lost: what a sender hears whose answer is lost.
    """

    name: str
    says: str
    logs: tuple[Log, ...]
    owners: tuple[int, ...]
    left: Left
    writers: int = 2
    replayed: tuple[OffsetRange, ...] = ()
    reads_ahead: bool = False
    retained: int | None = None
    asks: bool = False
    begun: bool = False
    landed: int = 0
    lost: tuple[Lost, ...] = (Lost.RESET,)
