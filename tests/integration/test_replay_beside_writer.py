"""Replays beside a live writer: all of them land, and nothing is lost or doubled."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from streamforge.lakehouse.commit import KIND_KEY
from streamforge.lakehouse.replay import replay
from tests.pipeline_support import Pipeline, produce_raw
from tests.replay_support import (
    BTC,
    ETH,
    frames,
    inverted,
    live_line,
    open_table,
    partition_of,
    positions_of,
    raw_range,
    rows_of,
    with_parser,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration
LARGE = 8_000
REPLAYS = 10


def test_ten_replays_of_a_large_range_beside_commits_all_land_and_nothing_is_lost_or_doubled(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    sent = [0]

    def keep_producing() -> None:
        while not stop.is_set():
            produce_raw(pipeline, frames(ETH, range(sent[0], sent[0] + 20)))
            sent[0] += 20
            stop.wait(0.05)

    with live_line(pipeline, monkeypatch, writer_commit_interval_s=1.0) as line:
        produce_raw(pipeline, frames(BTC, range(LARGE)))
        line.wait()
        whole = [raw_range(pipeline, partition_of(pipeline, BTC), 0, LARGE)]
        feeder = threading.Thread(target=keep_producing, daemon=True)
        feeder.start()
        try:
            wait_until(lambda: sent[0] > 100, what="the market is alive")
            for number in range(REPLAYS):
                # Right and wrong in turn, so that each of them has rows to replace.
                wrong = with_parser(inverted(lambda t: t.instrument == BTC)) if number % 2 == 0 else None
                report = replay(pipeline.settings, pipeline.contracts, "trades", whole, recompute=wrong)
                assert report.committed is not None
                assert report.plan.counts.changed == LARGE
        finally:
            stop.set()
            feeder.join(30)
        line.wait()
        positions = dict(line.writer.worker.positions())
    assert line.writer.exit_code == 0
    rows = rows_of(pipeline)
    assert Counter((row["instrument"], int(row["trade_id"])) for row in rows) == Counter(
        [(BTC, n) for n in range(LARGE)] + [(ETH, n) for n in range(sent[0])]
    )
    assert all(row["source_offset"] is not None for row in rows), "typed positions survive replay after replay"
    assert {row["aggressor_side"] for row in rows} == {"SELL"}, "the tenth was right"
    kinds = Counter(each.summary[KIND_KEY] for each in open_table(pipeline).metadata.snapshots)
    assert kinds["replay"] == REPLAYS
    assert kinds["write"] > 3
    assert {item.partition: held.next_offset for item, held in positions_of(pipeline).items()} == {
        item.partition: offset for item, offset in positions.items()
    }


def test_writer_goes_on_after_a_replay_and_a_restarted_one_claims(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = inverted(lambda t: int(t.trade_id) < 50)
    with live_line(pipeline, monkeypatch, parse=wrong) as line:
        produce_raw(pipeline, frames(BTC, range(50)))
        line.wait()
        first = [raw_range(pipeline, partition_of(pipeline, BTC), 0, 30)]
        assert replay(pipeline.settings, pipeline.contracts, "trades", first).committed is not None
        produce_raw(pipeline, frames(BTC, range(50, 70)))
        line.wait()
    assert line.writer.exit_code == 0
    with live_line(pipeline, monkeypatch) as line:
        produce_raw(pipeline, frames(BTC, range(70, 90)))
        line.wait()
    assert line.writer.exit_code == 0
    assert [int(row["trade_id"]) for row in rows_of(pipeline)] == list(range(90))
    assert [n for n, row in enumerate(rows_of(pipeline)) if row["aggressor_side"] == "BUY"] == list(range(30, 50))
