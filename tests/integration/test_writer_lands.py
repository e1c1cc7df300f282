"""The writer with a real broker and a real catalog: every committed record becomes one row."""

from __future__ import annotations

import pytest

from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from tests.conftest import MakeTopics
from tests.waiting import wait_until
from tests.writer_support import (
    TRADE_TOPICS,
    produce,
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
        assert writer.worker.positions()
    assert writer.exit_code == 0
    wanted = topic_identities(settings, topic)
    found = table_identities(settings, contracts)
    assert sum(found.values()) == 46
    assert not found - wanted
    assert sum((wanted - found).values()) == len(bad)
    refused = wait_until(lambda: topic_identities(settings, letters, partitions=2), what="dead letters")
    assert sum(refused.values()) == len(bad)
    table = load_table(open_catalog(settings), settings, contracts["trades"])
    rows = table.scan().to_arrow()
    assert set(rows["raw_epoch"].to_pylist()) == {1}
    assert set(rows["source_epoch"].to_pylist()) == {1}
