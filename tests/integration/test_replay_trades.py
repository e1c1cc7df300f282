"""Replay of `trades` on a real broker and catalog: exactly the wrong rows change, once, in one table snapshot."""

from __future__ import annotations

import pytest
from confluent_kafka import Producer
from pyiceberg.table import Table

from streamforge.errors import DataQualityError
from streamforge.kafka import producer_config
from streamforge.lakehouse import commit
from streamforge.lakehouse.commit import KIND_KEY
from streamforge.lakehouse.replay import KIND, REPLAY_EPOCH_KEY, preview, replay
from streamforge.lakehouse.replay_plan import SOURCE_COLUMNS
from streamforge.market.records import RAW_HEADERS
from tests.object_store import on_both_stores
from tests.pipeline_support import Pipeline, RawFrame
from tests.replay_support import (
    BTC,
    ETH,
    blind,
    forgetful,
    frames,
    inverted,
    is_within,
    land,
    open_table,
    partition_of,
    positions_of,
    raw_range,
    rows_of,
    snapshot_ids,
    with_parser,
)

pytestmark = pytest.mark.integration


def test_replay_after_a_parser_bug_changes_exactly_the_wrong_rows_of_the_range(pipeline: Pipeline) -> None:
    raw = [frame for pair in zip(frames(BTC, range(60)), frames(ETH, range(60)), strict=True) for frame in pair]
    batches = [raw[start : start + 30] for start in range(0, len(raw), 30)]
    land(pipeline, *batches, parse=inverted(lambda t: int(t.trade_id) % 3 == 0))
    before, files_before = rows_of(pipeline), {f.file.file_path for f in open_table(pipeline).scan().plan_files()}
    positions, snapshots = positions_of(pipeline), snapshot_ids(pipeline)
    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 10, 40)]

    report = replay(pipeline.settings, pipeline.contracts, "trades", ranges)

    after = rows_of(pipeline)
    assert len(before) == len(after) == 120
    remade = 0
    for old, new in zip(before, after, strict=True):
        if not is_within(old, ranges):
            assert new == old, "a row outside the range is untouched in every column"
            continue
        remade += 1
        wrong = int(old["trade_id"]) % 3 == 0
        assert (new["aggressor_side"] != old["aggressor_side"]) == wrong
        assert new["aggressor_side"] == "SELL", "Binance's m: true means that the aggressor sold"
        provenance = {"aggressor_side", "commit_id", "contract_version", "parser_version"}
        assert {k: v for k, v in new.items() if k not in provenance} == {
            k: v for k, v in old.items() if k not in provenance
        }
        assert new["commit_id"] == report.commit_id != old["commit_id"]
    assert remade == report.plan.counts.after == report.plan.counts.now
    assert report.plan.counts.changed == sum(int(r["trade_id"]) % 3 == 0 for r in before if is_within(r, ranges))
    assert positions_of(pipeline) == positions, "the writer's keys are left alone"
    assert report.committed is not None
    assert snapshot_ids(pipeline) == [*snapshots, report.committed.snapshot_id], "exactly one new table snapshot"
    summary = open_table(pipeline).metadata.snapshot_by_id(report.committed.snapshot_id).summary
    assert (summary.operation.value, summary[KIND_KEY]) == ("overwrite", KIND)
    files_after = {f.file.file_path for f in open_table(pipeline).scan().plan_files()}
    assert len(files_before - files_after) == len(report.plan.touched)
    assert files_before & files_after, "files without rows of the range stay"


def test_replay_of_an_equal_range_makes_no_commit(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(50)))
    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 50)]
    metadata = open_table(pipeline).metadata_location
    report = replay(pipeline.settings, pipeline.contracts, "trades", ranges)
    assert report.committed is None
    assert (report.plan.counts.equal, report.plan.counts.now, report.files_added) == (50, 50, 0)
    assert open_table(pipeline).metadata_location == metadata, "not even the table's metadata is written"


@on_both_stores
def test_replay_twice_equals_once(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(40)), parse=inverted(lambda _: True))
    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 5, 35)]
    first = replay(pipeline.settings, pipeline.contracts, "trades", ranges)
    once, snapshots = rows_of(pipeline), snapshot_ids(pipeline)
    second = replay(pipeline.settings, pipeline.contracts, "trades", ranges)
    assert first.committed is not None
    assert second.committed is None
    assert rows_of(pipeline) == once
    assert snapshot_ids(pipeline) == snapshots
    assert second.plan.hash_now == first.plan.hash_after


def test_preview_says_what_a_replay_then_does_and_changes_nothing(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(30)), parse=inverted(lambda t: int(t.trade_id) < 7))
    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 30)]
    location = open_table(pipeline).metadata_location
    plan, barrier = preview(pipeline.settings, pipeline.contracts, "trades", ranges)
    assert open_table(pipeline).metadata_location == location
    assert not barrier.missing
    assert plan.changes
    assert (plan.counts.now, plan.counts.after, plan.counts.equal, plan.counts.changed) == (30, 30, 23, 7)
    report = replay(pipeline.settings, pipeline.contracts, "trades", ranges)
    assert report.plan == plan


def test_replay_that_starts_inside_a_duplicate_pair_does_not_land_the_second_one(pipeline: Pipeline) -> None:
    again = [*frames(BTC, range(20)), *frames(BTC, range(10, 30))]  # ids 10 to 19 come twice
    land(pipeline, again, parse=inverted(lambda t: int(t.trade_id) >= 20))
    assert [row["trade_id"] for row in rows_of(pipeline)] == [str(n) for n in range(30)]
    partition = partition_of(pipeline, BTC)
    # From offset 15: the first of each pair below 15 lies before the range, its second one inside.
    report = replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, partition, 15, 40)])
    assert report.committed is not None
    assert [row["trade_id"] for row in rows_of(pipeline)] == [str(n) for n in range(30)]
    assert report.plan.dropped == {"duplicates": 10}
    assert report.plan.counts.changed == 10
    # Two ranges with the first of a pair between them.
    ranges = [raw_range(pipeline, partition, 0, 12), raw_range(pipeline, partition, 25, 40)]
    assert replay(pipeline.settings, pipeline.contracts, "trades", ranges).committed is None


def test_replay_does_not_land_a_trade_again_whose_second_record_landed_behind_the_range(pipeline: Pipeline) -> None:
    """The first record of trade 5 could not be parsed, so the row is that of the second one, at offset 20."""
    land(pipeline, [*frames(BTC, range(20)), *frames(BTC, [5])], parse=blind(lambda record: record.offset == 5))
    partition = partition_of(pipeline, BTC)
    part = replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, partition, 0, 10)])
    assert part.committed is None
    assert part.plan.dropped == {"duplicates": 1}
    whole = replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, partition, 0, 21)])
    assert (whole.plan.counts.added, whole.plan.counts.gone) == (1, 1)
    assert [(row["trade_id"], row["raw_offset"]) for row in rows_of(pipeline)] == [(str(n), n) for n in range(20)]


def test_replay_adds_trades_that_the_parser_had_lost_without_a_typed_position(pipeline: Pipeline) -> None:
    lost = range(7, 12)
    land(pipeline, frames(BTC, range(30)), parse=forgetful(lambda t: int(t.trade_id) in lost))
    assert len(rows_of(pipeline)) == 25
    partition = partition_of(pipeline, BTC)
    report = replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, partition, 0, 30)])
    rows = rows_of(pipeline)
    assert [int(row["trade_id"]) for row in rows] == list(range(30))
    assert [int(row["trade_id"]) for row in rows if row["source_offset"] is None] == list(lost)
    assert all(row[name] is None for row in rows for name in SOURCE_COLUMNS if int(row["trade_id"]) in lost)
    assert (report.plan.counts.added, report.plan.counts.equal) == (5, 25)
    again = replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, partition, 0, 30)])
    assert again.committed is None


def test_replay_removes_rows_that_the_fixed_parser_does_not_make(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(20)))
    partition = partition_of(pipeline, BTC)
    report = replay(
        pipeline.settings,
        pipeline.contracts,
        "trades",
        [raw_range(pipeline, partition, 0, 10)],
        recompute=with_parser(forgetful(lambda _: True)),
    )
    assert [int(row["trade_id"]) for row in rows_of(pipeline)] == list(range(10, 20))
    assert (report.plan.counts.gone, report.plan.counts.after) == (10, 0)


def test_replay_with_undecodable_records_in_the_range_counts_them_and_makes_the_others(pipeline: Pipeline) -> None:
    raw = frames(BTC, range(20))
    raw[5:5] = [RawFrame(BTC, b"{not json"), RawFrame(BTC, b"{}", headers=(("venue", "SIM"),))]
    land(pipeline, raw, parse=inverted(lambda _: True))
    report = replay(
        pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, partition_of(pipeline, BTC), 0, 22)]
    )
    assert report.plan.dropped == {"malformed_json": 1, "missing_header": 1}
    assert report.plan.counts.changed == 20
    assert {row["aggressor_side"] for row in rows_of(pipeline)} == {"SELL"}


def test_replay_of_a_raw_range_that_ends_in_a_commit_marker_ends(pipeline: Pipeline) -> None:
    """Ours writes raw without transactions; a mirror of another cluster may not."""
    config = producer_config(pipeline.settings, transactional_id=f"{pipeline.settings.topic_prefix}mirror")
    producer = Producer(config)
    producer.init_transactions(30)
    producer.begin_transaction()
    for n, frame in enumerate(frames(BTC, range(10))):
        headers = [*zip(RAW_HEADERS, ["SIM", "trade", "c1", str(n), str(frame.ts_receive_ns)], strict=True)]
        producer.produce(pipeline.topic("raw-trades"), frame.payload, BTC.encode(), partition=0, headers=headers)
    producer.commit_transaction(30)
    land(pipeline, [], parse=inverted(lambda _: True))
    assert len(rows_of(pipeline)) == 10
    report = replay(pipeline.settings, pipeline.contracts, "trades", [raw_range(pipeline, 0, 4, 11)])
    assert report.plan.counts.changed == 6


def test_replay_is_planned_again_when_another_replay_or_compaction_came_between(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(40)), parse=forgetful(lambda t: int(t.trade_id) >= 20))
    partition = partition_of(pipeline, BTC)
    empty = [raw_range(pipeline, partition, 20, 40)]  # no rows: two replays of it remove no common file
    between = {"write": lambda: replay(pipeline.settings, pipeline.contracts, "trades", empty)}

    def interfere(stage: str, done: int, total: int) -> None:
        if done == total and stage in between:
            between.pop(stage)()

    report = replay(pipeline.settings, pipeline.contracts, "trades", empty, progress=interfere)
    assert [int(row["trade_id"]) for row in rows_of(pipeline)] == list(range(40)), "nothing twice"
    assert (report.plans, report.committed) == (2, None)

    between["write"] = lambda: compact(open_table(pipeline))
    wrong = with_parser(inverted(lambda _: True))
    all_of_it = [raw_range(pipeline, partition, 0, 40)]
    report = replay(pipeline.settings, pipeline.contracts, "trades", all_of_it, recompute=wrong, progress=interfere)
    assert report.plans == 2
    assert report.committed is not None
    assert [int(row["trade_id"]) for row in rows_of(pipeline)] == list(range(40))
    assert {row["aggressor_side"] for row in rows_of(pipeline)} == {"BUY"}
    assert open_table(pipeline).metadata.properties[REPLAY_EPOCH_KEY] == "2"


def compact(table: Table) -> None:
    """Write all rows into new files, as a compaction by someone else does."""
    removed = [task.file for task in table.scan().plan_files()]
    added = commit.write_data_files(table, table.scan().to_arrow())
    commit.commit_snapshot(table, decide=lambda _: {}, added=added, removed=removed)


def test_replay_of_a_parser_that_is_not_repeatable_changes_nothing(pipeline: Pipeline) -> None:
    land(pipeline, frames(BTC, range(10)))
    calls = iter([True, False])
    fickle = with_parser(inverted(lambda _: next(calls)))
    ranges = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 1)]
    snapshots = snapshot_ids(pipeline)
    with pytest.raises(DataQualityError, match="not repeatable"):
        replay(pipeline.settings, pipeline.contracts, "trades", ranges, recompute=fickle)
    assert snapshot_ids(pipeline) == snapshots
