"""Dagster's pages in a real browser: the asset graph, and a replay launched by its button."""

from __future__ import annotations

import runpy
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from streamforge.platform.control_plane import with_dagster
from streamforge.platform.lifecycle import serve_on_free_ports
from streamforge.platform.plan import PlatformFiles, PlatformPlan
from streamforge.settings import Settings
from tests.pipeline_support import make_pipeline
from tests.replay_support import BTC, frames, land

pages = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "docs" / "screenshots.py")))
CHROMIUM = pages.find_chromium()

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: `apt-get install chromium`"),
]


@pytest.fixture
def settings(broker_settings: Settings, tmp_path: Path) -> Settings:
    pipeline = make_pipeline(broker_settings, tmp_path, f"w{uuid.uuid4().hex[:8]}.")
    land(pipeline, frames(BTC, range(20)))
    return pipeline.settings


def test_asset_graph_opens_and_a_replay_is_launched_and_succeeds(settings: Settings) -> None:
    nothing_else = PlatformPlan(home=str(settings.home_path), processes=[], notes=[])
    seen: list[str] = []

    def browse(plan: PlatformPlan) -> None:
        assert plan.ui_url is not None
        with pages.open_page(CHROMIUM) as page:
            pages.open_asset_graph(page, plan.ui_url)
            seen.append("graph")
            pages.open_launchpad(page, plan.ui_url)
            pages.launch_replay(page)
            seen.append(page.url)

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
