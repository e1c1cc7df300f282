"""The ledger of retention gaps on a real catalog: each gap once, whoever is faster, and accepted when it is passed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from streamforge.contract_model import Contracts
from streamforge.contracts import load_contracts
from streamforge.errors import CommitConflictError
from streamforge.lakehouse import commit, pipeline_gaps
from streamforge.lakehouse.catalog import ensure_table, load_table, open_catalog
from streamforge.lakehouse.pipeline_gaps import accept_passed_gaps, read_gaps, record_gaps
from streamforge.lakehouse.protocol import SourceIdentity
from streamforge.retention_gaps import GapState, PipelineGap, open_gaps
from streamforge.settings import Settings
from tests.gaps_support import GAP

SETTINGS_ID = SourceIdentity("trades", "id-1", "cluster")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]


@pytest.fixture
def contracts(settings: Settings) -> Contracts:
    return load_contracts(settings.contracts_dir)


def test_gap_is_recorded_once_for_each_state(settings: Settings, contracts: Contracts) -> None:
    assert read_gaps(settings, contracts) == []
    assert record_gaps(settings, contracts, [GAP, GAP]) == 1
    assert record_gaps(settings, contracts, [GAP]) == 0, "a restart notices it again"
    accepted = replace(GAP, state=GapState.ACCEPTED)
    other = replace(GAP, end_offset=30, records_removed=20)
    assert record_gaps(settings, contracts, [accepted, GAP, other]) == 2
    found = read_gaps(settings, contracts)
    assert (len(found), set(found)) == (3, {GAP, accepted, other})
    assert open_gaps(found) == [other]


def test_gap_that_another_process_records_meanwhile_is_not_doubled(
    settings: Settings, contracts: Contracts, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(GAP, source_partition=9)
    write, raced = pipeline_gaps._append, []

    def behind(*arguments: object) -> None:
        if not raced:
            raced.append(True)
            record_gaps(settings, contracts, [GAP])
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline_gaps, "_append", behind)
    assert record_gaps(settings, contracts, [GAP, other]) == 1
    found = read_gaps(settings, contracts)
    assert (len(found), set(found)) == (2, {GAP, other})


def test_gap_that_cannot_be_recorded_is_an_error_and_never_passed_over(
    settings: Settings, contracts: Contracts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        msg = "refused"
        raise commit.PositionsMovedError(msg)

    monkeypatch.setattr(commit, "commit_snapshot", refuse)
    with pytest.raises(CommitConflictError, match="not recorded"):
        record_gaps(settings, contracts, [GAP])


def accept(settings: Settings, contracts: Contracts) -> list[PipelineGap]:
    return accept_passed_gaps(settings, contracts, "trades", accepted_by="person")


def test_open_gap_is_accepted_only_where_the_table_has_passed_it(settings: Settings, contracts: Contracts) -> None:
    table = ensure_table(open_catalog(settings), settings, contracts["trades"])
    # First claims at the log starts: 15 lies inside the gap, 20 at its end.
    commit.claim(table, owner="writer", identity=SETTINGS_ID, log_starts={3: 15, 4: 20})
    passed, bars = replace(GAP, source_partition=4), replace(GAP, consumer="market.bars", source_partition=4)
    recreated = replace(GAP, topic_id="id-0", source_epoch=0)
    record_gaps(settings, contracts, [GAP, passed, bars, recreated])
    accepted = {gap.gap_id for gap in accept(settings, contracts)}
    assert accepted == {passed.gap_id, recreated.gap_id}, "the topic before was rebound: nothing can bring it back"
    assert set(open_gaps(read_gaps(settings, contracts))) == {GAP, bars}
    assert accept(settings, contracts) == []
    ledger = load_table(open_catalog(settings), settings, contracts[pipeline_gaps.LEDGER_ID])
    assert len(ledger.metadata.snapshots) == 2, "nothing to accept makes no commit"
