"""Make docs/images/*.png of Dagster's UI: `uv run python docs/screenshots.py`, while `streamforge up` runs.

Best in the home of a demo, where the checks have run: `STREAMFORGE_HOME=.streamforge/demo` for both commands.
Needs Chromium (Debian's package `chromium`). It launches one dry run of the replay to have a run to show.
"""  # noqa: INP001 - a script in a folder of pages

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from streamforge.platform.plan import PlatformFiles, read_plan
from streamforge.settings import load_settings

IMAGES = Path(__file__).resolve().parent / "images"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_TIMEOUT_MS = 240_000
_SIZE = {"width": 1600, "height": 1000}
_LAUNCHPAD = "/locations/lakehouse/jobs/replay/playground"


def find_chromium() -> str | None:
    """Return the path of a Chromium of this machine."""
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def open_page(chromium: str) -> Iterator[Page]:
    """Open a page in a headless browser; every wait ends with an error after two minutes."""
    with sync_playwright() as playwright:
        # A container's root has no user namespace for Chromium's sandbox, and the pages are our own.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport=_SIZE)  # type: ignore[arg-type]
            page.set_default_timeout(_TIMEOUT_MS)
            yield page
        finally:
            browser.close()


def open_asset_graph(page: Page, url: str) -> None:
    """Show the graph of all assets, its groups opened."""
    page.goto(f"{url}/asset-groups")
    page.get_by_text("consumers", exact=True).first.wait_for()


def expand_asset_graph(page: Page) -> None:
    """Show each asset instead of each group."""
    page.keyboard.press("Alt+KeyE")
    page.get_by_text("market_gaps", exact=True).first.wait_for()


def open_launchpad(page: Page, url: str) -> None:
    """Show the launchpad of the job `replay` with the form that it starts from."""
    page.goto(url + _LAUNCHPAD)
    page.get_by_text("replay_ranges").first.wait_for()


def launch_replay(page: Page) -> None:
    """Press `Launch run` and wait until the run has succeeded."""
    page.get_by_role("button", name="Launch run", exact=False).last.click()
    page.wait_for_url("**/runs/**")
    page.get_by_text("Success", exact=True).first.wait_for()


def open_checks(page: Page, url: str) -> None:
    """Show the checks of the table `trades`."""
    page.goto(f"{url}/assets/tables/trades?view=checks")
    page.get_by_text("instruments_are_fresh").first.wait_for()


def main() -> None:
    """Take the four pictures."""
    chromium = find_chromium()
    plan = read_plan(PlatformFiles(load_settings().home_path))
    if chromium is None or plan is None or plan.ui_url is None:
        sys.exit("needs Chromium (`apt-get install chromium`) and a running platform (`streamforge up`)")
    IMAGES.mkdir(exist_ok=True)
    with open_page(chromium) as page:
        open_asset_graph(page, plan.ui_url)
        expand_asset_graph(page)
        page.screenshot(path=IMAGES / "asset-graph.png")
        open_launchpad(page, plan.ui_url)
        page.screenshot(path=IMAGES / "launchpad.png")
        launch_replay(page)
        page.screenshot(path=IMAGES / "run.png")
        open_checks(page, plan.ui_url)
        page.screenshot(path=IMAGES / "checks.png")


if __name__ == "__main__":
    main()
