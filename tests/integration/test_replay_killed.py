"""SIGKILL at each step of a replay: the table is as before or as after, and a second run completes it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from streamforge.lakehouse.replay import REPLAY_STEPS, replay
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


def run(pipeline: Pipeline, offsets: str, *, kill_at: str) -> subprocess.CompletedProcess[str]:
    """Run `streamforge replay trades` as a process of its own that kills itself at a step."""
    command = [sys.executable, "-m", "cli", "replay", "trades", "--offsets", offsets, "--output", "json"]
    env = environment(pipeline.settings, STREAMFORGE_KILL_AT=kill_at)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_replay_killed_at_each_step_leaves_the_table_before_or_after_and_a_second_run_completes(
    pipeline: Pipeline,
) -> None:
    width = 10
    land(pipeline, frames(BTC, range(width * len(REPLAY_STEPS))), parse=inverted(lambda _: True))
    partition, positions = partition_of(pipeline, BTC), positions_of(pipeline)
    for number, step in enumerate(REPLAY_STEPS):
        start, end = number * width, (number + 1) * width
        offsets = f"{partition}:{start}-{end}"
        before, snapshots = rows_of(pipeline), snapshot_ids(pipeline)

        killed = run(pipeline, offsets, kill_at=step)

        assert killed.returncode == -signal.SIGKILL, f"{step}: {killed.stdout}{killed.stderr}"
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
