"""Two writers on one topic: one joins while the other holds records that are not committed, and leaves again.

Intervals are so long that nothing is committed but by the rebalance itself and by the stop. Members are static and
do not leave their group when they end, so the session timeout is as short as the broker allows.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamforge import faults
from streamforge.contracts import Contracts, load_contracts
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.commit import view_of
from streamforge.metrics import ProcessMetrics
from streamforge.settings import Settings, build_settings
from streamforge.supervision import topic_of
from streaming.runner import RunnerOptions, run_worker
from streaming.writer import WriterSettings, WriterWorker
from tests.conftest import MakeTopics
from tests.forked import Forked, become
from tests.waiting import wait_until
from tests.writer_support import (
    TRADE_TOPICS,
    WriterThread,
    produce,
    running_writer,
    table_identities,
    topic_identities,
    trades,
    wait_for_landed,
    writer_environment,
    writer_settings,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

PARTITIONS = 4
BATCH = 40
SESSION = {"session.timeout.ms": 6_000, "heartbeat.interval.ms": 500}


def _run_second(environment: dict[str, str], log: str) -> None:
    """Be `streamforge run writer --slot 1`, but with a short session."""
    become(environment, log)
    settings = build_settings(WriterSettings)
    faults.arm(settings.kill_at)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    metrics = ProcessMetrics("writer", "1")
    worker = WriterWorker(settings, contracts, slot="1", metrics=metrics)
    options = RunnerOptions(poll_s=0.02, consumer=SESSION)
    sys.exit(run_worker(worker, settings, contracts, slot="1", metrics=metrics, options=options))


class Line:
    """A topic that trades are produced to, and what has become of them."""

    def __init__(self, settings: Settings, contracts: Contracts) -> None:
        self.contracts = contracts
        self.settings = writer_settings(settings, writer_commit_interval_s=3_600, writer_idle_interval_s=60)
        self.topic = topic_of(contracts, "trades").name
        self.produced = 0

    def produce(self) -> None:
        """Produce a batch over all topic-partitions."""
        produce(self.settings, self.topic, trades(BATCH, start=self.produced), partitions=PARTITIONS)
        self.produced += BATCH

    def writer(self, slot: str) -> WriterThread:
        """Start a writer that commits nothing by itself."""
        return WriterThread(self.settings, self.contracts, slot=slot, consumer=SESSION).start()

    def owned(self, slot: str) -> int:
        """Return how many topic-partitions belong to a slot, by the table."""
        state = view_of(load_table(open_catalog(self.settings), self.settings, self.contracts["trades"])).state
        return sum(f"writer.{slot}@" in position.owner for position in state.positions.values())

    def rows(self) -> int:
        """Return how many rows the table has."""
        return sum(table_identities(self.settings, self.contracts).values())

    def assert_exact(self) -> None:
        """Let a last writer land what is left, and check that every committed record has one row."""
        with running_writer(writer_settings(self.settings), self.contracts) as last:
            wait_for_landed(self.settings, self.contracts, self.topic, writer=last, partitions=PARTITIONS)
        wanted = topic_identities(self.settings, self.topic, PARTITIONS)
        found = table_identities(self.settings, self.contracts)
        assert sum(wanted.values()) == self.produced
        assert found == wanted, f"doubled {found - wanted}, lost {wanted - found}"


@contextmanager
def process(settings: WriterSettings, log: Path) -> Iterator[Forked]:
    started = Forked(_run_second, (writer_environment(settings), str(log)), log=log)
    try:
        yield started
    finally:
        started.end()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_second_writer_joins_amid_a_batch_and_leaves_loses_and_doubles_nothing(
    platform: Settings, make_topics: MakeTopics, tmp_path: Path, how: signal.Signals
) -> None:
    line = Line(platform, make_topics(*TRADE_TOPICS, partitions=PARTITIONS))
    line.produce()
    first = line.writer("0")
    try:
        wait_until(lambda: first.consumed() == BATCH, what="the first took the batch in")
        assert line.rows() == 0, "and nothing is committed"
        with process(line.settings, tmp_path / "second.log") as second:
            wait_until(lambda: line.owned("1") == PARTITIONS // 2, what="the second claims its half")
            assert line.rows() == BATCH, "the rebalance committed what the first held"
            line.produce()
            wait_until(lambda: first.consumed() == BATCH + BATCH // 2, what="the first took its half in")
            os.kill(second.pid, how)
            assert second.wait(30) == (0 if how is signal.SIGTERM else -how), second.said()
        wait_until(lambda: line.owned("0") == PARTITIONS, what="the first claims all again")
        line.produce()
        wait_until(lambda: first.consumed() >= line.produced - BATCH // 2, what="the first took the rest in")
    finally:
        code = first.stop()
    assert code == 0
    line.assert_exact()


def test_second_writer_killed_amid_its_commit_loses_and_doubles_nothing(
    platform: Settings, make_topics: MakeTopics, tmp_path: Path
) -> None:
    line = Line(platform, make_topics(*TRADE_TOPICS, partitions=PARTITIONS))
    first = line.writer("0")
    try:
        line.produce()
        wait_until(lambda: first.consumed() == BATCH, what="the first took the batch in")
        dying = line.settings.model_copy(update={"writer_commit_interval_s": 0.1, "kill_at": "writer.commit_staged"})
        with process(dying, tmp_path / "second.log") as second:
            wait_until(lambda: line.owned("1") == PARTITIONS // 2, what="the second claims its half")
            line.produce()
            assert second.wait(60) == -signal.SIGKILL, second.said()
        wait_until(lambda: line.owned("0") == PARTITIONS, what="the first claims all again")
        wait_until(lambda: first.consumed() == line.produced, what="the first took the second's half in")
    finally:
        code = first.stop()
    assert code == 0
    line.assert_exact()
