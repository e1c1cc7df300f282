"""Every interleaving of the scenarios holds, and no rule of the design can be left out without being noticed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.model.__main__ import main
from tests.model.bugs import BUGS, Bug
from tests.model.connected import connected
from tests.model.scenarios import SCENARIOS, larger_scenarios
from tests.model.search import search, walk
from tests.model.state import Scenario

STATES_MIN = 200
"""A scenario with fewer states has lost its processes on the way and says nothing."""


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_scenario_holds_in_every_interleaving(
    scenario: Scenario, record_property: Callable[[str, object], None]
) -> None:
    with connected():
        result = search(scenario)
    record_property("states", result.states)
    assert result.broken is None, str(result)
    assert result.is_complete
    assert result.states > STATES_MIN


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_rule_left_out_is_found(bug: Bug) -> None:
    with connected() as patch:
        bug.plant(patch)
        result = search(SCENARIOS[bug.scenario])
    assert result.broken is not None, f"{result.states} states, and nothing is broken"
    assert bug.says in result.broken, str(result)
    assert result.history


def test_search_and_walks_with_all_faults_print_states_explored(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--depth", "3", "--walks", "2", "--output", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["states"] == sum(item["states"] for item in report["scenarios"]) > len(SCENARIOS)
    assert {item["scenario"] for item in report["scenarios"]} == set(larger_scenarios())


def test_walk_finds_a_rule_left_out_too() -> None:
    bug = next(bug for bug in BUGS if bug.scenario == "handover")
    with connected() as patch:
        bug.plant(patch)
        result = walk(SCENARIOS[bug.scenario], walks=200, seed=1)
    assert result.broken is not None
    assert bug.says in result.broken
