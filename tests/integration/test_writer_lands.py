"""The writer with a real broker and a real catalog: every committed record becomes one row, whatever happens."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from confluent_kafka import TopicPartition as KafkaTopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot

from streamforge.contracts import Contracts
from streamforge.errors import CommitUnknownError, ConfigurationError
from streamforge.lakehouse import commit, table_writer
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.commit import COMMIT_ID_KEY, view_of
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.lakehouse.pipeline_gaps import read_gaps
from streamforge.retention_gaps import open_gaps
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from tests.conftest import MakeTopics
from tests.waiting import wait_until
from tests.writer_support import (
    TRADE_TOPICS,
    next_offsets,
    produce,
    recreate_topic,
    running_writer,
    table_identities,
    topic_identities,
    trade_value,
    trades,
    wait_for_landed,
    writer_settings,
)

pytestmark = pytest.mark.integration


def test_writer_topic_with_aborted_and_bad_records_lands_each_good_one_once(
    platform: Settings, make_topics: MakeTopics
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic, letters = topic_of(contracts, "trades").name, topic_of(contracts, "trades.dlq").name
    produce(settings, topic, trades(40))
    produce(settings, topic, trades(6, start=1_000), abort=True)
    bad = [b"{", trade_value(50, price="1e-30"), None, trade_value(51, aggressor_side="?")]
    produce(settings, topic, [*trades(3, start=40), *bad, *trades(3, start=60)])
    with running_writer(settings, contracts) as writer:
        wait_for_landed(settings, contracts, topic, writer=writer)
    assert writer.exit_code == 0
    found = table_identities(settings, contracts)
    wanted = topic_identities(settings, topic)
    assert not found - wanted
    assert sum((wanted - found).values()) == len(bad)
    assert sum(found.values()) == 46
    assert sum(topic_identities(settings, letters).values()) == len(bad)
    table = load_table(open_catalog(settings), settings, contracts["trades"])
    rows = table.scan().to_arrow()
    assert set(rows["raw_epoch"].to_pylist()) == set(rows["source_epoch"].to_pylist()) == {1}
    assert view_of(table).state.raw_topics.keys() == {1}
    files = [task.file for task in table.scan().plan_files()]
    commits = {str(item.summary[COMMIT_ID_KEY]) for item in table.snapshots() if item.summary and _wrote(item)}
    assert set(rows["commit_id"].to_pylist()) <= commits
    assert len(files) <= len(commits)


def test_writer_only_markers_passed_moves_next_offset_behind_them(platform: Settings, make_topics: MakeTopics) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    with running_writer(settings, contracts) as writer:
        produce(settings, topic, trades(4))
        wait_for_landed(settings, contracts, topic, writer=writer)
        produce(settings, topic, trades(4, start=4), abort=True)
        wait_for_landed(settings, contracts, topic, writer=writer)
        assert sum(table_identities(settings, contracts).values()) == 4


def test_writer_marker_positions_left_out_never_reaches_the_end(
    platform: Settings, make_topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 8 left out: with positions taken from records only, waits for the end of a topic never end."""
    real = table_writer.TableWriter.take

    def take(self: table_writer.TableWriter, messages: object, positions: object) -> object:
        last = {m.partition(): m.offset() + 1 for m in messages}  # type: ignore[attr-defined]
        return real(self, messages, last)  # type: ignore[arg-type]

    monkeypatch.setattr(table_writer.TableWriter, "take", take)
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    produce(settings, topic, trades(4))
    with running_writer(settings, contracts):
        wait_until(lambda: _landed(settings, contracts) == 4, what="four rows")
    assert next_offsets(settings, contracts) == {0: 2, 1: 2}  # and the stable ends are 3, behind the markers


def test_writer_fenced_by_another_stops_with_exit_code_3_and_nothing_is_doubled(
    platform: Settings, make_topics: MakeTopics
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    produce(settings, topic, trades(10))
    # Another group on the same topics: Kafka gives both writers every topic-partition, by mistake.
    other = writer_settings(platform, topic_prefix="other." + platform.topic_prefix)
    with running_writer(settings, contracts) as first:
        wait_for_landed(settings, contracts, topic, writer=first)
        with running_writer(other, contracts) as second:
            wait_until(lambda: _owners(settings, contracts) == {second.worker.owner}, what="the second claims")
            produce(settings, topic, trades(10, start=10))
            assert first.join() == 3
            wait_for_landed(settings, contracts, topic, writer=second)
    assert second.exit_code == 0
    assert table_identities(settings, contracts) == topic_identities(settings, topic)


def test_writer_snapshots_expired_by_another_while_it_runs_goes_on(platform: Settings, make_topics: MakeTopics) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    catalog = open_catalog(settings)
    with running_writer(settings, contracts) as writer:
        for number in range(4):
            produce(settings, topic, trades(6, start=number * 6))
            wait_for_landed(settings, contracts, topic, writer=writer)
            ledger = load_table(catalog, settings, contracts["commits"])
            Maintenance(ledger, contracts["commits"], retained=1).expire(
                load_table(catalog, settings, contracts["trades"])
            )
    assert writer.exit_code == 0
    with running_writer(settings, contracts) as again:
        produce(settings, topic, trades(6, start=24))
        wait_for_landed(settings, contracts, topic, writer=again)
    assert table_identities(settings, contracts) == topic_identities(settings, topic)


def test_writer_bounds_the_snapshots_that_it_retains(platform: Settings, make_topics: MakeTopics) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform, writer_retained_snapshots=3, writer_maintenance_commits=2)
    topic = topic_of(contracts, "trades").name
    with running_writer(settings, contracts) as writer:
        for number in range(6):
            produce(settings, topic, trades(4, start=number * 4))
            wait_for_landed(settings, contracts, topic, writer=writer)
    assert len(load_table(open_catalog(settings), settings, contracts["trades"]).snapshots()) <= 5
    assert table_identities(settings, contracts) == topic_identities(settings, topic)


def test_writer_dead_letter_not_acknowledged_lets_no_offset_pass(
    platform: Settings, make_topics: MakeTopics, admin: AdminClient
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic, letters = topic_of(contracts, "trades").name, topic_of(contracts, "trades.dlq").name
    limit = ConfigEntry("max.message.bytes", "64", incremental_operation=AlterConfigOpType.SET)
    small = ConfigResource(ConfigResource.Type.TOPIC, letters, incremental_configs=[limit])
    for future in admin.incremental_alter_configs([small]).values():
        future.result()
    produce(settings, topic, [*trades(5), b"{"])
    with running_writer(settings, contracts) as writer:
        assert writer.join(60) == 1
    assert set(next_offsets(settings, contracts).values()) == {0}
    assert not table_identities(settings, contracts)


def test_writer_topic_recreated_refuses_to_start_and_names_both(
    platform: Settings, make_topics: MakeTopics, admin: AdminClient, capfd: pytest.CaptureFixture[str]
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades")
    produce(settings, topic.name, trades(6))
    with running_writer(settings, contracts) as writer:
        wait_for_landed(settings, contracts, topic.name, writer=writer)
    before, after = recreate_topic(admin, topic.name, topic.partitions)
    produce(settings, topic.name, trades(6))
    with running_writer(settings, contracts) as again:
        assert again.join(60) == 1
    said = capfd.readouterr()
    assert all(text in said.out + said.err for text in (before, after, "streamforge rebind"))
    assert sum(table_identities(settings, contracts).values()) == 6


def test_writer_records_removed_before_they_landed_is_a_retention_gap_until_accepted(
    platform: Settings, make_topics: MakeTopics, admin: AdminClient, capfd: pytest.CaptureFixture[str]
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    produce(settings, topic, trades(4))
    with running_writer(settings, contracts) as writer:
        wait_for_landed(settings, contracts, topic, writer=writer)
    produce(settings, topic, trades(4, start=4))
    for future in admin.delete_records([KafkaTopicPartition(topic, 0, 4)]).values():
        future.result()
    for _ in range(2):
        with running_writer(settings, contracts) as refused:
            assert refused.join(60) == 1
    assert "can no longer be known" in "".join(capfd.readouterr())
    [gap] = read_gaps(settings, contracts)
    assert open_gaps([gap]) == [gap], "recorded once, although it was noticed twice"
    assert str(gap) == f"table market.trades: {topic}-0[3,4)"
    assert (gap.source_epoch, gap.records_removed) == (1, None), "the topic is transactional: a marker may have been it"
    assert "STREAMFORGE_WRITER_ACCEPT_RETENTION_GAP" in gap.detail
    accepting = writer_settings(platform, writer_accept_retention_gap=True)
    with running_writer(accepting, contracts) as again:
        wait_for_landed(settings, contracts, topic, writer=again)
    assert sum(table_identities(settings, contracts).values()) == 7
    gaps = read_gaps(settings, contracts)
    assert (len(gaps), open_gaps(gaps)) == (2, [])


def test_writer_without_space_for_data_stops_and_a_restart_loses_nothing(
    platform: Settings, make_topics: MakeTopics, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    produce(settings, topic, trades(10))
    with monkeypatch.context() as disk:
        disk.setattr(commit, "write_data_files", full)
        with running_writer(settings, contracts) as writer:
            assert writer.join(60) == 1
    assert "No space left on device" in "".join(capfd.readouterr())
    with running_writer(settings, contracts) as again:
        wait_for_landed(settings, contracts, topic, writer=again)
    assert table_identities(settings, contracts) == topic_identities(settings, topic)


def test_writer_whose_table_is_elsewhere_forgets_the_batch_seeks_and_goes_on(
    platform: Settings, make_topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that was lost, and a look that did not find the commit: the next compare says that we are behind."""
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic = topic_of(contracts, "trades").name
    real, lost = commit.send_once, [True]

    def send(table: Table, *arguments: Any) -> Table:
        landed = real(table, *arguments)
        if lost and table.name()[-1] == "trades" and _wrote(landed.current_snapshot()):
            lost.pop()
            msg = "the answer was lost"
            raise CommitUnknownError(msg)
        return landed

    monkeypatch.setattr(commit, "send_once", send)
    monkeypatch.setattr(commit, "has_landed", lambda *_: False)
    with running_writer(settings, contracts) as writer:
        for number in range(3):
            produce(settings, topic, trades(10, start=number * 10))
            wait_for_landed(settings, contracts, topic, writer=writer)
    assert not lost
    assert writer.metrics.counters()["commit_conflicts"] == 1
    assert table_identities(settings, contracts) == topic_identities(settings, topic)


def _wrote(snapshot: Snapshot | None) -> bool:
    return snapshot is not None and snapshot.summary is not None and snapshot.summary["streamforge.kind"] == "write"


def _landed(settings: Settings, contracts: Contracts) -> int:
    try:
        return sum(table_identities(settings, contracts).values())
    except ConfigurationError:
        return 0  # the table is not there yet


def _owners(settings: Settings, contracts: Contracts) -> set[str]:
    table = load_table(open_catalog(settings), settings, contracts["trades"])
    return {position.owner for position in view_of(table).state.positions.values()}
