"""The suite's own arrangement: what shares a broker, Spark or a model is run by one worker of pytest-xdist."""

from __future__ import annotations

import pytest


def test_tests_of_a_file_stay_in_one_worker(request: pytest.FixtureRequest) -> None:
    if not hasattr(request.config, "workerinput"):
        pytest.skip("without pytest-xdist there is one worker")
    # A version of pytest that pytest-xdist does not know leaves the group out, and says nothing.
    assert request.node.nodeid.endswith(f"@{request.node.path}"), request.node.nodeid
