"""SIGKILL at each step of a replay: the table is as before or as after, and a second run completes it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from streamforge.lakehouse.replay import REPLAY_STEPS, replay
from tests.forked import streamforge
from tests.pipeline_support import Pipeline, environment
from tests.replay_support import (
    BTC,
    frames,
    inverted,
    land,
    partition_of,
    positions_of,
    raw_range,
    rows_of,
    snapshot_ids,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos]


def test_replay_killed_at_each_step_leaves_the_table_before_or_after_and_a_second_run_completes(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    width = 10
    land(pipeline, frames(BTC, range(width * len(REPLAY_STEPS))), parse=inverted(lambda _: True))
    partition, positions = partition_of(pipeline, BTC), positions_of(pipeline)
    for number, step in enumerate(REPLAY_STEPS):
        start, end = number * width, (number + 1) * width
        offsets = f"{partition}:{start}-{end}"
        before, snapshots = rows_of(pipeline), snapshot_ids(pipeline)

        arguments = ["replay", "trades", "--offsets", offsets, "--output", "json"]
        variables = environment(pipeline.settings, STREAMFORGE_KILL_AT=step)
        killed = streamforge(arguments, variables, log=tmp_path / "log")

        assert killed.wait() == -signal.SIGKILL, f"{step}: {killed.said()}"
        sides = [row["aggressor_side"] for row in rows_of(pipeline)]
        landed = step == REPLAY_STEPS[-1]
        assert sides[start:end] == ["SELL" if landed else "BUY"] * width, step
        assert (len(snapshot_ids(pipeline)) - len(snapshots)) == landed, step
        if not landed:
            assert rows_of(pipeline) == before, step

        again = replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, partition, start, end)])

        assert (again.committed is not None) == (not landed), step
        assert [row["aggressor_side"] for row in rows_of(pipeline)] == ["SELL"] * end + ["BUY"] * (len(sides) - end)
        assert len(snapshot_ids(pipeline)) == len(snapshots) + 1
    assert [int(row["trade_id"]) for row in rows_of(pipeline)] == list(range(width * len(REPLAY_STEPS)))
    assert positions_of(pipeline) == positions, "the writer's keys are left alone, killed or not"
