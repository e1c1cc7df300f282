"""The demo's report tells a loss, a double, a changed table and what nobody compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from assets.checks import FRESHNESS
from streamforge.demo.jobs import CheckFigure, JobFigures
from streamforge.demo.report import DemoReport, LedgerFigures, ReplayFigures, Verdict, make_report
from streamforge.lakehouse.table_freshness import TableAges, quantiles

UNCHANGED = ReplayFigures("market.trades", ["raw-trades-3[0,9)"], 9, committed=False, hash_before="a", hash_after="a")


def ages(table: str, *received_ms: int) -> TableAges:
    event = np.array(received_ms, np.int64) + 5
    return TableAges(table, len(received_ms), 1, np.array(received_ms, np.int64), event)


def ran(**changes: Any) -> JobFigures:
    given: dict[str, Any] = {
        "job": "observe",
        "run_id": "r",
        "status": "SUCCESS",
        "wall_s": 1.0,
        "assets": [],
        "checks": [],
        "metadata": {},
        "failure": "",
    }
    return JobFigures(**(given | changes))


def report(**changes: Any) -> DemoReport:
    given: dict[str, Any] = {
        "events_produced": 300,
        "live_s": 3.0,
        "wall_s": 9.0,
        "ages": [ages("market.raw_trades", 100, 200, 300), ages("market.trades", 1000, 2000)],
        "verdicts": [Verdict("market.raw_trades", 0, 0), Verdict("market.trades", 0, 0)],
        "ledger": LedgerFigures(300, 300, 0, 0),
        "replay": UNCHANGED,
        "runs": [],
        "problems": [],
        "phases": {"live": 3.0},
        "files": {},
    }
    return make_report(**(given | changes))


def test_report_of_a_good_run_is_ok_and_counts_over_all_tables() -> None:
    found = report().as_dict()
    assert found["ok"] is True
    assert (found["events_produced"], found["rows_landed"], found["lost"], found["doubled"]) == (300, 5, 0, 0)
    assert (found["events_per_s"], found["freshness_p50_s"], found["freshness_p99_s"]) == (100.0, 0.3, 2.0)
    assert found["event_freshness_p99_s"] == 2.005
    assert found["tables"]["market.trades"]["received"] == {"rows": 2, "p50_s": 2.0, "p99_s": 2.0, "max_s": 2.0}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"verdicts": [Verdict("market.raw_trades", 0, 0), Verdict("market.trades", 2, 0)]}, "2 rows are lost"),
        ({"verdicts": [Verdict("market.raw_trades", 0, 0), Verdict("market.trades", 0, 3)]}, "3 rows are doubled"),
        ({"verdicts": [Verdict("market.raw_trades", 0, 0)]}, "market.trades was not verified"),
        ({"ages": [ages("market.raw_trades", 1)]}, "market.trades was verified and cannot be read"),
        (
            {"verdicts": [Verdict("market.raw_trades", 0, 0), Verdict("market.trades", 0, 0, different=4)]},
            "4 rows are not what was sent",
        ),
        (
            {"verdicts": [Verdict("market.raw_trades", 0, 0, not_landed=5), Verdict("market.trades", 0, 0)]},
            "5 offsets did not land",
        ),
        ({"ledger": LedgerFigures(300, 290, 3, 7)}, "7 ids that the market sent"),
        ({"events_produced": 0}, "the market sent nothing"),
        ({"problems": ["the writer stopped"]}, "the writer stopped"),
        ({"runs": [ran(status="FAILURE", failure="no broker")]}, "job observe ended with FAILURE: no broker"),
        ({"runs": [ran(checks=[CheckFigure("tables/bars", "id_is_set", False, "ERROR")])]}, "id_is_set of tables/bars"),
        (
            {"replay": ReplayFigures("market.trades", ["r"], 9, committed=False, hash_before="a", hash_after="b")},
            "content hash a before, b after",
        ),
        (
            {"replay": ReplayFigures("market.trades", ["r"], 9, committed=True, hash_before="a", hash_after="a")},
            "changed market.trades",
        ),
    ],
)
def test_report_of_a_bad_run_is_not_ok_and_says_why(changes: dict[str, Any], problem: str) -> None:
    found = report(**changes)
    assert not found.ok
    assert any(problem in item for item in found.problems)


def test_checks_of_a_stopped_market_and_warnings_are_told_and_are_no_problem() -> None:
    checks = [CheckFigure("t", FRESHNESS, False, "ERROR"), CheckFigure("t", "odd", False, "WARN")]
    found = report(runs=[ran(checks=checks)])
    assert found.ok
    [told] = found.as_dict()["dagster"]
    assert told["checks_failed"] == [f"t:{FRESHNESS}", "t:odd"]


def test_quantiles_never_tell_less_than_a_row_had_to_wait() -> None:
    found = quantiles(np.array([10, 20, 4000], np.int64))
    assert found is not None
    assert (found.rows, found.p50_s, found.p99_s, found.max_s) == (3, 0.02, 4.0, 4.0)
    assert quantiles(np.empty(0, np.int64)) is None
