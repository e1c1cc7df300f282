"""Compaction, expiry and orphan removal beside the real writer: nothing is lost or doubled, tags survive."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import dagster as dg
import pytest
import stamina
from pyiceberg.table import Table

from assets.catalogue import PLATFORM_RESOURCE
from assets.maintenance import maintained_tables, maintenance_key, orphan_removal
from orchestration.resources import Platform
from streamforge.contracts import Contracts
from streamforge.errors import CommitConflictError, ConfigurationError
from streamforge.lakehouse.catalog import ensure_table, load_table, open_catalog
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.tags import set_tag
from streamforge.settings import Settings
from streamforge.spark.maintenance import compact_table, remove_orphans
from streamforge.spark.session import spark_session
from streamforge.supervision import topic_of
from tests.conftest import MakeTopics
from tests.dagster_support import failures
from tests.waiting import wait_until
from tests.writer_support import (
    TRADE_TOPICS,
    WriterThread,
    next_offsets,
    produce,
    running_writer,
    table_identities,
    topic_identities,
    trades,
    wait_for_landed,
    writer_settings,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.integration
_OLD_S = 10 * 24 * 3600


class Bench:
    """A platform with the topic `trades`, and what is done to its table."""

    def __init__(self, settings: Settings, contracts: Contracts) -> None:
        self.settings = settings
        self.contracts = contracts
        self.topic = topic_of(contracts, "trades").name
        self.sent = 0

    def table(self) -> Table:
        """Load the table as it is now."""
        return load_table(open_catalog(self.settings), self.settings, self.contracts["trades"])

    def data_folder(self) -> Path:
        """Return the folder of the table's data files."""
        return Path(urlsplit(self.table().location()).path) / "data"

    def land(self, writer: WriterThread, batches: int) -> None:
        """Land some transactions, each in a commit and so in a file of its own."""
        for _ in range(batches):
            self.send()
            wait_for_landed(self.settings, self.contracts, self.topic, writer=writer)

    def send(self) -> None:
        """Produce one transaction of trades."""
        produce(self.settings, self.topic, trades(20, self.sent))
        self.sent += 20

    def compact(self) -> int:
        """Compact in Spark and return how many files were merged; a faster writer is met again."""
        session = spark_session(self.settings)
        for attempt in stamina.retry_context(on=CommitConflictError, attempts=5, wait_initial=0, wait_jitter=0):
            with attempt:
                done = compact_table(session, self.settings, self.contracts, self.contracts["trades"])
        return done.files_rewritten

    def expire_all_but_last(self) -> Table:
        """Expire beside a writer: an expiry that meets a commit gives up, so it is tried until the bound is kept."""
        contract = self.contracts["commits"]
        ledger = ensure_table(open_catalog(self.settings), self.settings, contract)
        maintenance = Maintenance(ledger, contract, retained=1)

        def expired() -> Table | None:
            table = maintenance.expire(self.table())
            untagged = {each.snapshot_id for each in table.snapshots()} - {
                ref.snapshot_id for name, ref in table.refs().items() if name != "main"
            }
            return table if len(untagged) == 1 else None

        return wait_until(expired, what="one table snapshot is left beside tagged ones")

    def assert_exact(self) -> None:
        """Check that every record of the topic is in the table once, and nothing else."""
        found = table_identities(self.settings, self.contracts)
        assert found == topic_identities(self.settings, self.topic)
        assert found.total() == self.sent

    @contextmanager
    def market(self) -> Iterator[None]:
        """Send all the time."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(0.2):
                self.send()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(60)


@pytest.fixture
def bench(spark: SparkSession, platform: Settings, make_topics: MakeTopics) -> Bench:
    return Bench(platform, make_topics(*TRADE_TOPICS))


def test_maintenance_beside_the_writer_keeps_rows_position_and_tags(bench: Bench) -> None:
    settings = writer_settings(bench.settings, writer_commit_interval_s=1.0)
    with running_writer(settings, bench.contracts) as writer:
        bench.land(writer, 3)
        tagged = bench.table().current_snapshot()
        assert tagged is not None
        set_tag(bench.table(), "model-1", tagged.snapshot_id)
        bench.land(writer, 4)
        with bench.market():
            before = bench.sent
            assert bench.compact() >= 7
            bench.expire_all_but_last()
            wait_until(lambda: bench.sent > before, what="the market went on meanwhile")
        wait_for_landed(bench.settings, bench.contracts, bench.topic, writer=writer)
        bench.assert_exact()

        # Now the last table snapshot is Spark's, and the writer's own last commit is gone.
        bench.land(writer, 6)
        held = next_offsets(bench.settings, bench.contracts)
        assert bench.compact() >= 6
        table = bench.expire_all_but_last()
        last = table.current_snapshot()
        assert last is not None
        assert last.summary is not None
        assert last.summary.operation.value == "replace"
        assert {each.snapshot_id for each in table.snapshots()} == {last.snapshot_id, tagged.snapshot_id}
        assert next_offsets(bench.settings, bench.contracts) == held, "the position is in the table's properties"
        bench.land(writer, 1)
        assert bench.compact() == 0, "two files are not worth a commit"
    assert writer.exit_code == 0
    with running_writer(settings, bench.contracts) as writer:
        bench.land(writer, 1)
    assert writer.exit_code == 0
    bench.assert_exact()
    assert bench.table().scan(snapshot_id=tagged.snapshot_id).to_arrow().num_rows == 60


def test_orphans_go_by_age_and_never_what_a_table_snapshot_needs(bench: Bench) -> None:
    with running_writer(writer_settings(bench.settings), bench.contracts) as writer:
        bench.land(writer, 6)
    tagged = bench.table().current_snapshot()
    assert tagged is not None
    set_tag(bench.table(), "model-1", tagged.snapshot_id)
    assert bench.compact() >= 6
    bench.expire_all_but_last()
    needed = {Path(urlsplit(row["file_path"]).path) for row in bench.table().inspect.all_files().to_pylist()}
    planted, young = bench.data_folder() / "orphan.parquet", bench.data_folder() / "young.parquet"
    planted.write_bytes(b"x")
    long_ago_s = time.time() - _OLD_S
    for path in bench.data_folder().parent.rglob("*"):
        os.utime(path, (long_ago_s, long_ago_s))
    young.write_bytes(b"x")
    session, contract, now = spark_session(bench.settings), bench.contracts["trades"], datetime.now(UTC)
    with pytest.raises(ConfigurationError, match="at least 25 hours"):
        remove_orphans(session, bench.settings, contract, older_than_h=1, now=now)
    assert remove_orphans(session, bench.settings, contract, now=now) >= 1
    assert not planted.exists()
    assert young.exists()
    assert all(path.exists() for path in needed)
    bench.assert_exact()
    assert bench.table().scan(snapshot_id=tagged.snapshot_id).to_arrow().num_rows == bench.sent


def test_dagster_maintains_the_chosen_table_beside_the_writer_and_skips_absent_ones(bench: Bench) -> None:
    keys = [maintenance_key(bench.contracts[name]) for name in ("trades", "bars")]
    resources = {PLATFORM_RESOURCE: Platform(bench.settings, bench.contracts)}
    settings = writer_settings(bench.settings, writer_commit_interval_s=1.0)
    with running_writer(settings, bench.contracts) as writer, dg.DagsterInstance.ephemeral() as instance:
        bench.land(writer, 7)
        with bench.market():
            before = bench.sent
            result = dg.materialize(
                [maintained_tables(bench.contracts)],
                instance=instance,
                selection=keys,
                resources=resources,
                run_config={"ops": {"maintain_tables": {"config": {"retained_snapshots": 2}}}},
            )
            removal = orphan_removal(bench.contracts).execute_in_process(resources=resources, instance=instance)
            assert bench.sent > before, "the market went on meanwhile"
        assert (result.success, removal.success) == (True, True)
        (event,) = result.get_asset_materialization_events()
        assert event.asset_key == keys[0], "bars do not exist yet"
        done: dict[str, Any] = {name: value.value for name, value in event.materialization.metadata.items()}
        assert done["files_rewritten"] >= 7
        assert done["table_snapshots_before"] > done["table_snapshots_after"] == 2
        wait_for_landed(bench.settings, bench.contracts, bench.topic, writer=writer)
    assert writer.exit_code == 0
    bench.assert_exact()

    planted = bench.data_folder() / "orphan.parquet"
    planted.write_bytes(b"x")
    os.utime(planted, (time.time() - _OLD_S,) * 2)
    broken = ensure_table(open_catalog(bench.settings), bench.settings, bench.contracts["bars"])
    Path(urlsplit(broken.metadata_location).path).unlink()
    with dg.DagsterInstance.ephemeral() as instance:
        removal = orphan_removal(bench.contracts).execute_in_process(
            resources=resources, instance=instance, raise_on_error=False
        )
    [said] = failures(removal).values()
    assert said.startswith("table bars cannot be read or written: FileNotFoundError")
    assert not planted.exists(), "the tables that are well were cleaned all the same"
    bench.assert_exact()
