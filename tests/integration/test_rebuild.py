"""Rebuild on a real broker and catalog: a table made anew from Kafka and the raw table, in one table snapshot."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.app import app
from streamforge.lakehouse.pipeline_gaps import record_gaps
from streamforge.lakehouse.protocol import LAST_COMMIT_KEY
from streamforge.lakehouse.rebuild import everything, preview_rebuild, rebuild
from streamforge.lakehouse.replay import REPLAY_EPOCH_KEY, preview
from streamforge.lakehouse.replay_target import open_target
from tests.gaps_support import GAP
from tests.pipeline_support import Pipeline, environment
from tests.replay_support import (
    BTC,
    OTHERS,
    cut,
    frames,
    inverted,
    land,
    land_direct,
    open_table,
    partition_of,
    positions_of,
    raw_range,
    raw_ranges,
    rows_of,
    snapshot_ids,
)

pytestmark = pytest.mark.integration

COUNTED = (REPLAY_EPOCH_KEY, LAST_COMMIT_KEY)


def properties(pipeline: Pipeline) -> dict[str, str]:
    return {name: value for name, value in open_table(pipeline).properties.items() if name not in COUNTED}


def test_rebuild_makes_every_row_anew_in_one_snapshot_from_both_sources(pipeline: Pipeline) -> None:
    raw = [frame for name in (BTC, *OTHERS) for frame in frames(name, range(20))]
    wrong = inverted(lambda t: int(t.trade_id) % 2 == 0)
    land(pipeline, raw[:50], raw[50:], parse=wrong)
    land_direct(pipeline, "raw-trades")
    ranges = raw_ranges(pipeline)
    assert len(ranges) == 2
    cut(pipeline, ranges[0].partition, 9)
    before, uuid = rows_of(pipeline), open_table(pipeline).metadata.table_uuid
    said, positions, snapshots = properties(pipeline), positions_of(pipeline), snapshot_ids(pipeline)
    at_once = preview(pipeline.settings, pipeline.contracts, "trades", ranges)[0]
    planned = preview_rebuild(pipeline.settings, pipeline.contracts, "trades")[0]
    assert planned.as_dict() == at_once.as_dict()
    assert (len(planned.index), len(at_once.index)) == (0, 120), "no part's index outlives its part"
    assert planned.from_table == (raw_range(pipeline, ranges[0].partition, 0, 9),)

    seen: list[bool] = []
    heard: dict[str, list[tuple[int, int]]] = {}

    def read(stage: str, done: int, total: int) -> None:
        heard.setdefault(stage, []).append((done, total))
        if stage == "commit":
            seen.append(rows_of(pipeline) == before)

    report = rebuild(pipeline.settings, pipeline.contracts, "trades", progress=read)
    assert seen == [True, False], "readers see the old table until the commit, then the new one"
    assert all(told == sorted(told) and told[-1] == (120, 120) for told in (heard["plan"], heard["write"]))
    after = rows_of(pipeline)
    assert len(after) == len(before) == 120
    assert {row["aggressor_side"] for row in after} == {"SELL"}
    assert {row["commit_id"] for row in after} == {report.commit_id}, "every row is made anew"
    assert report.committed is not None
    assert snapshot_ids(pipeline) == [*snapshots, report.committed.snapshot_id]
    table = open_table(pipeline)
    assert (table.metadata.table_uuid, properties(pipeline), positions_of(pipeline)) == (uuid, said, positions)

    again = rebuild(pipeline.settings, pipeline.contracts, "trades")
    assert (again.committed, again.plan.hash_now) == (None, report.plan.hash_after)
    table.delete()
    assert rows_of(pipeline) == []
    refilled = rebuild(pipeline.settings, pipeline.contracts, "trades")
    assert (refilled.plan.hash_after, refilled.plan.counts.added) == (report.plan.hash_after, 120)
    assert [row["trade_id"] for row in rows_of(pipeline)] == [row["trade_id"] for row in after]


def test_rebuild_leaves_rows_whose_records_nobody_has(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(20)), parse=inverted(lambda _: True))
    land_direct(pipeline, "raw-trades")
    partition = partition_of(pipeline, BTC)
    cut(pipeline, partition, 12)
    target = open_target(pipeline.settings, pipeline.contracts, "trades")
    assert everything(target) == (raw_range(pipeline, partition, 0, 20),)
    gap = replace(
        GAP,
        consumer="market.raw_trades",
        topic_id=target.source.topic_id,
        source_partition=partition,
        start_offset=3,
        end_offset=7,
    )
    record_gaps(
        pipeline.settings, pipeline.contracts, [gap, replace(gap, topic_id="of an earlier topic", end_offset=9)]
    )
    held = [raw_range(pipeline, partition, 0, 3), raw_range(pipeline, partition, 7, 20)]
    assert everything(target) == tuple(held)

    def command(*arguments: str) -> dict[str, Any]:
        env = environment(pipeline.settings)
        result = CliRunner().invoke(app, ["rebuild", "trades", *arguments, "-o", "json"], env=env)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    snapshots = snapshot_ids(pipeline)
    assert (command("--dry-run")["rows_changed"], snapshot_ids(pipeline)) == (16, snapshots)
    done = command()
    assert (done["committed"], done["rows_changed"], done["rows_kept_in_files"]) == (True, 16, 4)
    sides = [row["aggressor_side"] for row in rows_of(pipeline)]
    assert sides == ["SELL"] * 3 + ["BUY"] * 4 + ["SELL"] * 13
    assert target.checked(held) == tuple(held)
