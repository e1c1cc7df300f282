"""`streamforge rebind` and `streamforge reconcile` beside a real broker: afterwards the writer lands all, once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import TopicPartition as KafkaTopicPartition
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner

from cli.app import app
from streamforge import faults
from streamforge.contracts import Contracts
from streamforge.errors import CommitError
from streamforge.kafka import describe_topics
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.pipeline_gaps import read_gaps
from streamforge.lakehouse.verify import verify_tables
from streamforge.retention_gaps import GapState, open_gaps
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from tests.conftest import MakeTopics
from tests.writer_support import (
    TRADE_TOPICS,
    next_offsets,
    produce,
    recreate_topic,
    running_writer,
    table_identities,
    topic_identities,
    trades,
    wait_for_landed,
    writer_settings,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("restored_logging")]

Call = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def call(platform: Settings, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return what calls `streamforge ... --output json` on the platform: exit code and result."""
    for name in ("home", "topic_prefix", "bootstrap_servers"):
        monkeypatch.setenv(f"STREAMFORGE_{name.upper()}", str(getattr(platform, name)))

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(app, [*arguments, "--output", "json"])
        return result.exit_code, json.loads(result.stdout)

    return run


def land(settings: Settings, contracts: Contracts, topic: str, *numbers: int) -> None:
    """Produce trades and let a writer land them; one run of it for each of `numbers`."""
    for number in numbers:
        produce(settings, topic, trades(6, start=number * 6))
        with running_writer(writer_settings(settings), contracts) as writer:
            wait_for_landed(settings, contracts, topic, writer=writer)


def is_clean(settings: Settings, contracts: Contracts) -> bool:
    return all(item.tally.is_clean and not item.not_landed for item in verify_tables(settings, contracts, ["trades"]))


def epochs(settings: Settings, contracts: Contracts) -> Counter[int]:
    table = load_table(open_catalog(settings), settings, contracts["trades"])
    return Counter(table.scan(selected_fields=("source_epoch",)).to_arrow()["source_epoch"].to_pylist())


def test_rebind_recreated_topic_lands_under_a_new_epoch_beside_the_old_rows(
    platform: Settings, make_topics: MakeTopics, admin: AdminClient, call: Call
) -> None:
    contracts = make_topics(*TRADE_TOPICS, "raw-trades")
    topic = topic_of(contracts, "trades")
    land(platform, contracts, topic.name, 0)
    assert call("rebind", "trades") == (0, {"table": "trades", "dry_run": False, "changes": False, "rebind": None})
    stored = describe_topics(admin, [topic.name])[topic.name].topic_id
    recreate_topic(admin, topic.name, topic.partitions)
    found = describe_topics(admin, [topic.name])[topic.name].topic_id
    produce(platform, topic.name, trades(6, start=6))
    with running_writer(writer_settings(platform), contracts) as refused:
        assert refused.join(60) == 1
    for arguments in (["--dry-run"], []):
        code, said = call("rebind", "trades", *arguments)
        plan = said["rebind"]
        assert (code, plan["stored"]["topic_id"], plan["found"]["topic_id"]) == (0, stored, found)
        assert (plan["epoch"], plan["left"]) == (2, {"0": 4, "1": 4})
    with running_writer(writer_settings(platform), contracts) as again:
        wait_for_landed(platform, contracts, topic.name, writer=again)
    assert epochs(platform, contracts) == {1: 6, 2: 6}
    assert is_clean(platform, contracts)


def test_reconcile_table_that_was_moved_back_lands_what_is_missing_once(
    platform: Settings, make_topics: MakeTopics, call: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    contracts = make_topics(*TRADE_TOPICS, "raw-trades")
    topic = topic_of(contracts, "trades").name
    land(platform, contracts, topic, 0)
    assert call("reconcile", "trades")[1]["changes"] is False
    table = load_table(open_catalog(platform), platform, contracts["trades"])
    kept, at = table.metadata.current_snapshot_id, next_offsets(platform, contracts)
    land(platform, contracts, topic, 1, 2)
    assert kept is not None
    load_table(open_catalog(platform), platform, contracts["trades"]).manage_snapshots().rollback_to_snapshot(
        kept
    ).commit()
    with running_writer(writer_settings(platform), contracts) as refused:
        assert refused.join(60) == 1
    assert "streamforge reconcile" in "".join(capfd.readouterr())
    ends = next_offsets(platform, contracts)
    code, said = call("reconcile", "trades", "--dry-run")
    assert (code, {item["partition"]: item["missing"] for item in said["partitions"]}) == (
        0,
        {partition: [at[partition], end] for partition, end in ends.items()},
    )
    assert next_offsets(platform, contracts) == ends, "a dry run changes nothing"
    assert call("reconcile", "trades")[0] == 0
    assert next_offsets(platform, contracts) == at
    with running_writer(writer_settings(platform), contracts) as again:
        wait_for_landed(platform, contracts, topic, writer=again)
    assert table_identities(platform, contracts) == topic_identities(platform, topic)
    assert is_clean(platform, contracts)


def test_reconcile_what_kafka_has_removed_is_refused_until_accepted(
    platform: Settings, make_topics: MakeTopics, admin: AdminClient, call: Call
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    topic = topic_of(contracts, "trades").name
    land(platform, contracts, topic, 0)
    kept = load_table(open_catalog(platform), platform, contracts["trades"]).metadata.current_snapshot_id
    land(platform, contracts, topic, 1)
    assert kept is not None
    load_table(open_catalog(platform), platform, contracts["trades"]).manage_snapshots().rollback_to_snapshot(
        kept
    ).commit()
    before = next_offsets(platform, contracts)
    for future in admin.delete_records([KafkaTopicPartition(topic, 0, 6)]).values():
        future.result()
    code, said = call("reconcile", "trades")
    assert (code, said["error"]) == (1, "RetentionGapError")
    assert f"{topic}-0 (source epoch 1): wanted from offset 4, Kafka's log starts at 6, [4,6)" in said["message"]
    assert call("reconcile", "trades", "--dry-run")[0] == 1
    assert next_offsets(platform, contracts) == before, "nothing was changed"
    assert read_gaps(platform, contracts) == []
    assert call("reconcile", "trades", "--accept-retention-gap")[0] == 0
    [gap] = read_gaps(platform, contracts)
    assert (str(gap), gap.state) == (f"table market.trades: {topic}-0[4,6)", GapState.ACCEPTED)
    assert next_offsets(platform, contracts) == {0: 6, 1: 4}
    with running_writer(writer_settings(platform), contracts) as again:
        wait_for_landed(platform, contracts, topic, writer=again)
    lost = {(0, 4), (0, 5)}
    assert table_identities(platform, contracts) == Counter(
        {(partition, offset): 1 for partition in (0, 1) for offset in (0, 1, 2, 4, 5, 6)} | dict.fromkeys(lost, 0)
    )


def test_first_claim_above_offset_0_is_an_open_gap_until_a_person_accepts_it(
    platform: Settings,
    make_topics: MakeTopics,
    admin: AdminClient,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    topic = topic_of(contracts, "trades").name
    produce(platform, topic, trades(6))
    for future in admin.delete_records([KafkaTopicPartition(topic, 1, 2)]).values():
        future.result()

    def die(step: str) -> None:
        if step == "writer.claim_sent":
            raise CommitError(step)

    with monkeypatch.context() as patch:
        patch.setattr(faults, "step", die)
        with running_writer(writer_settings(platform), contracts) as killed:
            assert killed.join(60) == 1, "the claim is made, and the process knows nothing of it"
    for _ in range(2):
        with running_writer(writer_settings(platform), contracts) as writer:
            wait_for_landed(platform, contracts, topic, writer=writer)
    [gap] = read_gaps(platform, contracts)
    assert open_gaps([gap]) == [gap]
    assert (str(gap), gap.source_epoch) == (f"table market.trades: {topic}-1[0,2)", 1)
    assert "streamforge reconcile trades --accept-retention-gap" in gap.detail
    assert call("reconcile", "trades", "--accept-retention-gap")[1]["accepted_gaps"] == [str(gap)]
    assert open_gaps(read_gaps(platform, contracts)) == []
    assert call("reconcile", "trades", "--accept-retention-gap")[1]["accepted_gaps"] == []
