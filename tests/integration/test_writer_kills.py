"""SIGKILL of the writer's process at every step of claim and commit: after a restart nothing is lost or doubled.

Each process is the restart of the one that was killed before it, at another step. After every kill the table
must hold exactly the good records below its `next_offset`s.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from streamforge.log_reader import read_range, stable_ends
from streamforge.market.records import DeadLetter, GapKind, MarketGap
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from streaming.writer import WRITER_STEPS
from tests.conftest import MakeTopics
from tests.writer_support import (
    PARTITIONS,
    TRADE_TOPICS,
    Identity,
    assert_consistent,
    kill_writer_at,
    produce,
    running_writer,
    table_identities,
    topic_identities,
    trades,
    wait_for_landed,
    writer_settings,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(600)]

GOOD = 40
BAD = [b"{", b"[]"]
CLAIM_STEPS = tuple(step for step in WRITER_STEPS if "claim" in step)
COMMIT_STEPS = tuple(step for step in WRITER_STEPS if "claim" not in step)


@pytest.mark.parametrize("steps", [CLAIM_STEPS, COMMIT_STEPS], ids=["claim", "commit"])
def test_writer_killed_at_each_step_in_turn_loses_and_doubles_nothing(
    steps: tuple[str, ...], platform: Settings, make_topics: MakeTopics, tmp_path: Path
) -> None:
    contracts = make_topics(*TRADE_TOPICS)
    settings = writer_settings(platform)
    topic, letters = topic_of(contracts, "trades").name, topic_of(contracts, "trades.dlq").name
    for number, step in enumerate(steps):
        produce(settings, topic, [*trades(GOOD, start=number * GOOD), *BAD])
        kill_writer_at(step, settings, tmp_path / "writer.log")
        assert_consistent(settings, contracts, topic, step)
    with running_writer(settings, contracts) as writer:
        wait_for_landed(settings, contracts, topic, writer=writer)
    assert writer.exit_code == 0
    assert_consistent(settings, contracts, topic, "stop")
    assert sum(table_identities(settings, contracts).values()) == GOOD * len(steps)
    # Dead letters are at least once: killed between their flush and the commit they come again. Each counts once.
    bad = topic_identities(settings, topic) - topic_identities(settings, topic, only_good=True)
    assert len(bad) == len(BAD) * len(steps)
    assert _letter_identities(settings, letters) == set(bad)


def test_writer_killed_between_the_commits_of_two_tables_loses_and_doubles_nothing(
    platform: Settings, make_topics: MakeTopics, tmp_path: Path
) -> None:
    """One round commits both tables, each by itself: the second's rows come again, the first's do not."""
    contracts = make_topics(*TRADE_TOPICS, "market-gaps", "market-gaps.dlq")
    topics = {name: topic_of(contracts, name).name for name in ("trades", "market-gaps")}
    settings = writer_settings(platform, writer_contracts=tuple(topics))
    produce(settings, topics["trades"], trades(GOOD))
    produce(settings, topics["market-gaps"], [_gap(number) for number in range(GOOD)])
    together = {"writer_commit_interval_s": 3_600, "writer_max_rows": 2 * GOOD}
    kill_writer_at("writer.after_commit", settings.model_copy(update=together), tmp_path / "writer.log")
    landed = [sum(table_identities(settings, contracts, name).values()) for name in topics]
    assert sorted(landed) == [0, GOOD]
    with running_writer(settings, contracts) as writer:
        for name, topic in topics.items():
            wait_for_landed(settings, contracts, topic, name, writer=writer)
    assert writer.exit_code == 0
    for name, topic in topics.items():
        assert table_identities(settings, contracts, name) == topic_identities(settings, topic)


def _letter_identities(settings: Settings, letters: str) -> set[Identity]:
    """Return (partition, offset) of every record that has a dead letter; all are of one topic, none has a part."""
    items = [TopicPartition(letters, number) for number in range(PARTITIONS)]
    found = [
        msgspec.json.decode(message.value() or b"", type=DeadLetter)
        for messages in read_range(settings, dict.fromkeys(items, 0), stable_ends(settings, items))
        for message in messages
    ]
    assert len({(letter.topic, letter.topic_id, letter.index) for letter in found}) == 1
    return {(letter.partition, letter.offset) for letter in found}


def _gap(number: int) -> bytes:
    gap = MarketGap(
        gap_id=str(number),
        kind=GapKind.RECONNECT,
        venue="SIM",
        channel="trade",
        instrument="BTC-USDT.SIM",
        ts_start_ns=1_700_000_000_000_000_000,
        ts_end_ns=1_700_000_000_000_000_001,
        records_dropped=0,
        bytes_dropped=0,
        detail="",
        ts_detected_ns=1_700_000_000_000_000_002,
    )
    return msgspec.json.encode(gap)
