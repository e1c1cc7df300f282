"""A consumer whose offsets were removed: the gap is in the ledger before it stops, claims or goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from streamforge.contracts import load_contracts
from streamforge.errors import ConfigurationError, RetentionGapError
from streamforge.lakehouse.pipeline_gaps import read_gaps
from streamforge.metrics import ProcessMetrics
from streamforge.offsets import OffsetRange
from streamforge.retention_gaps import ConsumerKind, GapState, PipelineGap
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from streaming.retention import Retention

REMOVED = [OffsetRange("raw-trades", 0, 5, 12), OffsetRange("raw-trades", 3, 0, 4)]


@pytest.fixture
def retention(tmp_path: Path) -> Retention:
    settings = Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]
    contracts = load_contracts(settings.contracts_dir)
    topic = topic_of(contracts, "raw-trades")
    return Retention(
        settings, contracts, ConsumerKind.GROUP, "parser", topic, who="parser.0", accepts=False, advice="Do this"
    )


def recorded(retention: Retention) -> list[PipelineGap]:
    return sorted(read_gaps(retention.settings, retention.contracts), key=str)


def unreachable(retention: Retention, tmp_path: Path) -> Retention:
    (tmp_path / "file").write_text("no folder")
    settings = retention.settings.model_copy(update={"catalog_uri": f"sqlite:///{tmp_path}/file/catalog.db"})
    return replace(retention, settings=settings)


def test_removed_offsets_are_recorded_open_and_refused_with_what_to_do(retention: Retention) -> None:
    metrics = ProcessMetrics("parser", "0")
    with pytest.raises(RetentionGapError, match=r"raw-trades-0: .* is 5, .* \[5,12\).* 7 records .*Do this.*1 more"):
        retention.pass_over(REMOVED, metrics, topic_id="id")
    found = recorded(retention)
    assert [(str(gap), gap.state, gap.records_removed) for gap in found] == [
        ("group parser: raw-trades-0[5,12)", GapState.OPEN, 7),
        ("group parser: raw-trades-3[0,4)", GapState.OPEN, 4),
    ]
    assert all(gap.detail.endswith("Do this") for gap in found)
    assert not metrics.counters().get("retention_gap_offsets")


def test_removed_offsets_of_a_transactional_topic_are_not_counted_as_records(retention: Retention) -> None:
    trades = replace(retention, topic=topic_of(retention.contracts, "trades"))
    with pytest.raises(RetentionGapError, match=r"commit markers and aborted records .* can no longer be known"):
        trades.pass_over(REMOVED[:1], ProcessMetrics("bars", "0"), topic_id="id")
    assert [gap.records_removed for gap in recorded(retention)] == [None]


def test_accepted_gap_is_recorded_and_counted(retention: Retention) -> None:
    metrics = ProcessMetrics("parser", "0")
    replace(retention, accepts=True).pass_over(REMOVED, metrics, topic_id="id")
    assert {gap.state for gap in recorded(retention)} == {GapState.ACCEPTED}
    assert metrics.counters()["retention_gap_offsets"] == 11


def test_gap_that_cannot_be_recorded_is_not_passed_over(retention: Retention, tmp_path: Path) -> None:
    metrics, away = ProcessMetrics("parser", "0"), unreachable(retention, tmp_path)
    with pytest.raises(RetentionGapError, match=r"\[5,12\).*could not be recorded in the table pipeline_gaps"):
        away.pass_over(REMOVED, metrics, topic_id="id")
    with pytest.raises(ConfigurationError, match="catalog"):
        replace(away, accepts=True).pass_over(REMOVED, metrics, topic_id="id")
    assert not metrics.counters().get("retention_gap_offsets")
    away.pass_over([], metrics, topic_id="id")
    away.never_had({0: 0, 1: 0}, topic_id="id", source_epoch=1)


def test_first_claim_above_offset_0_is_open_unless_the_setting_accepts_it(retention: Retention) -> None:
    table = replace(retention, kind=ConsumerKind.TABLE, consumer="market.raw_trades")
    table.never_had({0: 0, 1: 9}, topic_id="id", source_epoch=1)
    [gap] = recorded(retention)
    assert (str(gap), gap.state, gap.source_epoch) == ("table market.raw_trades: raw-trades-1[0,9)", GapState.OPEN, 1)
    assert "`streamforge reconcile raw_trades --accept-retention-gap`" in gap.detail
    replace(table, accepts=True).never_had({1: 9}, topic_id="id", source_epoch=1)
    assert [gap.state for gap in recorded(retention)].count(GapState.ACCEPTED) == 1
