"""A table is moved back and reconciled while a replay is under way: the replay waits for the barrier again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from streamforge.errors import RetryableSourceError
from streamforge.lakehouse import replay_run
from streamforge.lakehouse.barrier import Barrier
from streamforge.lakehouse.repair import reconcile
from streamforge.lakehouse.replay import replay
from tests.pipeline_support import Pipeline, produce_raw
from tests.replay_support import BTC, SteppedLine, frames, inverted, open_table, raw_ranges, rows_of, with_parser
from tests.writer_support import running_writer, wait_for_landed, writer_settings

pytestmark = pytest.mark.integration


def once(action: Callable[[], None], *, after: Callable[..., Any]) -> Callable[..., Any]:
    """Return `after` with `action` behind its first call."""
    left = [action]

    def call(*arguments: Any, **options: Any) -> Any:
        result = after(*arguments, **options)
        if left:
            left.pop()()
        return result

    return call


@pytest.mark.parametrize("moment", ["barrier", "data_written"])
def test_reconcile_during_a_replay_sends_it_back_to_the_barrier_and_nothing_is_doubled(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    line = SteppedLine(pipeline)
    empty = open_table(pipeline).metadata.current_snapshot_id
    assert empty is not None
    produce_raw(pipeline, frames(BTC, range(10)))
    line.parse()
    line.land()

    def move_back() -> None:
        open_table(pipeline).manage_snapshots().rollback_to_snapshot(empty).commit()
        assert reconcile(pipeline.settings, pipeline.contracts, "trades") is not None

    if moment == "barrier":
        monkeypatch.setattr(Barrier, "wait", once(move_back, after=Barrier.wait))
    else:
        monkeypatch.setattr(replay_run, "write_files", once(move_back, after=replay_run.write_files))
    parse = with_parser(inverted(lambda _: True))
    with pytest.raises(RetryableSourceError, match=r"table market\.trades is at 0 of"):
        replay(pipeline.settings, pipeline.contracts, "trades", raw_ranges(pipeline), recompute=parse, wait_s=0)
    with running_writer(writer_settings(pipeline.settings), pipeline.contracts) as writer:
        partitions = len(pipeline.partitions("trades"))
        wait_for_landed(
            pipeline.settings, pipeline.contracts, pipeline.topic("trades"), writer=writer, partitions=partitions
        )
    assert Counter(row["trade_id"] for row in rows_of(pipeline)) == {str(number): 1 for number in range(10)}
