"""Dagster's pages in a real browser: the asset graph, and a replay launched by its button."""

from __future__ import annotations

import runpy
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from streamforge.platform.control_plane import with_dagster
from streamforge.platform.lifecycle import serve_on_free_ports
from streamforge.platform.plan import PlatformFiles, PlatformPlan
from streamforge.settings import Settings
from tests.pipeline_support import RawFrame, make_pipeline, trade_frame
from tests.replay_support import BTC, land

pages = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "docs" / "screenshots.py")))
CHROMIUM = pages.find_chromium()

TRADES = 20
QUERY = """
query Run($run: ID!) {
  runOrError(runId: $run) {
    ... on Run {
      jobName
      status
      eventConnection {
        events { ... on ExecutionStepOutputEvent { metadataEntries { label ... on IntMetadataEntry { intValue } } } }
      }
    }
  }
}
"""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: `apt-get install chromium`"),
]


@pytest.fixture
def settings(broker_settings: Settings, tmp_path: Path) -> Settings:
    pipeline = make_pipeline(broker_settings, tmp_path, f"w{uuid.uuid4().hex[:8]}.")
    # The form asks for the last hour of event time.
    now_ms = int(time.time() * 1000)
    land(
        pipeline,
        [
            RawFrame(BTC, trade_frame(BTC, n, ts_ms=now_ms - 1_000 * (TRADES - n)), ts_receive_ns=now_ms * 1_000_000)
            for n in range(TRADES)
        ],
    )
    return pipeline.settings


def test_asset_graph_opens_and_a_replay_is_launched_and_succeeds(settings: Settings) -> None:
    nothing_else = PlatformPlan(home=str(settings.home_path), processes=[], notes=[])
    seen: list[str] = []
    runs: list[dict[str, Any]] = []

    def browse(plan: PlatformPlan) -> None:
        assert plan.ui_url is not None
        with pages.open_page(CHROMIUM) as page:
            pages.open_asset_graph(page, plan.ui_url)
            seen.append("graph")
            pages.open_launchpad(page, plan.ui_url)
            pages.launch_replay(page)
            seen.append(page.url)
            run_id = page.url.partition("/runs/")[2].partition("?")[0]
            runs.append(ask(plan.ui_url, run_id))

    serve_on_free_ports(
        settings,
        PlatformFiles(settings.home_path),
        lambda: with_dagster(nothing_else, remember=True),
        detach=False,
        tell=lambda _: None,
        ready=lambda _: None,
        hold=browse,
    )
    assert seen[0] == "graph"
    assert "/runs/" in seen[1]
    [run] = runs
    assert (run["jobName"], run["status"]) == ("replay", "SUCCESS")
    numbers = {
        entry["label"]: entry["intValue"]
        for event in run["eventConnection"]["events"]
        for entry in event.get("metadataEntries", ())
        if "intValue" in entry
    }
    assert numbers["source_records"] >= TRADES, "the replay had nothing to do"
    assert (numbers["rows_now"], numbers["rows_equal"]) == (TRADES, TRADES)


def ask(url: str, run_id: str) -> dict[str, Any]:
    """Return what Dagster says of a run that the page shows."""
    reply = httpx.post(f"{url}/graphql", json={"query": QUERY, "variables": {"run": run_id}}, timeout=60.0)
    reply.raise_for_status()
    run: dict[str, Any] = reply.json()["data"]["runOrError"]
    return run
