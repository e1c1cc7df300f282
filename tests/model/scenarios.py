"""The scenarios: each is small enough to be searched to its end, together they are the promises of the protocol."""

from __future__ import annotations

from dataclasses import replace

from streamforge.offsets import OffsetRange
from tests.model.seams import Lost
from tests.model.state import Left, Scenario
from tests.model.world import Log
from tests.model.writers import TOPIC

ONE = Log((0,), 1)
TWO = Log((0, 1), 2)
HOLES = Log((0, 2), 4)
"""Two committed records; between and behind them an aborted one and a commit marker."""
LETTER = Log((0, 2), 3, dead_letters=(1,))
"""Between two records one that the live parser could not read."""

_HANDOVER = Scenario(
    "handover",
    "a topic-partition goes to the other writer at any step; an answer of the catalog is lost, or mistaken",
    logs=(ONE,),
    owners=(0,),
    left=Left(rebalances=1, lost_answers=1),
    lost=tuple(Lost),
)
_REPLAY = Scenario(
    "replay",
    "a part of what a data file holds is replayed beside the writer, and the files are compacted",
    logs=(HOLES,),
    owners=(0,),
    left=Left(replays=1, compactions=1),
    writers=1,
    replayed=(OffsetRange(TOPIC, 0, 0, 2),),
    begun=True,
    landed=1,
)
_ROLLED_BACK = Scenario(
    "rolled back",
    "a person moves main back while requests are under way; the table is reconciled",
    logs=(ONE, ONE),
    owners=(0, 1),
    left=Left(rollbacks=1),
    begun=True,
)
_ALL = (
    _HANDOVER,
    replace(
        _HANDOVER,
        name="holes",
        says="a topic-partition with aborted records and markers goes to the other writer",
        logs=(HOLES,),
        left=Left(rebalances=1),
    ),
    replace(
        _HANDOVER,
        name="to and fro",
        says="a topic-partition goes to the other writer and back",
        left=Left(rebalances=2),
    ),
    replace(
        _HANDOVER,
        name="killed",
        says="a writer is killed at any step, before or after its commit was sent, and the group moves on",
        left=Left(rebalances=1, crashes=1),
    ),
    replace(
        _HANDOVER,
        name="maintained",
        says="a writer loads the table after each commit, to expire snapshots, while it loses its topic-partition",
        logs=(HOLES,),
        left=Left(rebalances=1),
        retained=2,
        begun=True,
    ),
    replace(
        _HANDOVER,
        name="together",
        says="a writer commits two topic-partitions at once and loses one of them",
        logs=(ONE, ONE),
        owners=(0, 0),
        left=Left(rebalances=1),
        begun=True,
    ),
    replace(
        _HANDOVER,
        name="asked",
        says="a writer is asked for its topic-partition and lands what it has before it lets go; an answer is lost",
        left=Left(rebalances=1, lost_answers=1),
        lost=(Lost.RESET,),
        asks=True,
        begun=True,
    ),
    Scenario(
        "two owners",
        "two writers land their own topic-partitions in one table; snapshots expire, an answer is lost",
        logs=(ONE, ONE),
        owners=(0, 1),
        left=Left(expiries=1, lost_answers=1),
        begun=True,
    ),
    Scenario(
        "ahead",
        "a writer fetches before it has taken in what it fetched, and is killed",
        logs=(HOLES,),
        owners=(0,),
        left=Left(crashes=1),
        writers=1,
        reads_ahead=True,
        begun=True,
    ),
    _REPLAY,
    replace(
        _REPLAY,
        name="replay unlanded",
        says="a range that has not landed is replayed, and an answer is lost",
        left=Left(replays=1, lost_answers=1),
        landed=0,
    ),
    replace(
        _REPLAY,
        name="replay killed",
        says="a replay that adds a row is killed at any step and run again, and once more",
        logs=(LETTER,),
        left=Left(replays=2, crashes=1),
        replayed=(OffsetRange(TOPIC, 0, 1, 2),),
    ),
    _ROLLED_BACK,
    replace(
        _ROLLED_BACK,
        name="rolled back and expired",
        says="a person moves main back, and expiry takes the snapshots that it left",
        logs=(TWO,),
        owners=(0,),
        left=Left(rollbacks=1, expiries=1),
        writers=1,
    ),
    replace(
        _ROLLED_BACK,
        name="rolled back and maintained",
        says="a person moves main back behind a compaction, and a writer that has not noticed expires snapshots",
        logs=(TWO,),
        owners=(0,),
        left=Left(rollbacks=1, compactions=1),
        writers=1,
        retained=2,
    ),
    replace(
        _REPLAY,
        name="rolled back and replayed",
        says="a person moves main back while a replay is planned or sent",
        left=Left(rollbacks=1, replays=1),
        landed=3,
    ),
)
SCENARIOS = {item.name: item for item in _ALL}


def larger_scenarios() -> dict[str, Scenario]:
    """Return the scenarios with every fault and all others in each, those that are then the same only once."""
    found: dict[Scenario, str] = {}
    for item in _ALL:
        found.setdefault(replace(_larger(item), name="", says=""), item.name)
    return {name: replace(item, name=name, says=SCENARIOS[name].says) for item, name in found.items()}


def _larger(scenario: Scenario) -> Scenario:
    left = Left(*(max(count, 1) for count in scenario.left))
    left = left._replace(rebalances=2 if scenario.writers > 1 else 0)
    return replace(scenario, left=left, replayed=scenario.replayed or (OffsetRange(TOPIC, 0, 0, 1),))
