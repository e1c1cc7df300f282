"""What several files of integration tests set up alike."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamforge.contracts import Contracts
from streamforge.settings import Settings
from tests.conftest import MakeTopics
from tests.loader_support import LOADER_CONTRACTS, SmallVenue
from tests.pipeline_support import Pipeline, make_pipeline
from tests.table_rig import Rig


@pytest.fixture
def pipeline(broker_settings: Settings, tmp_path: Path, store: dict[str, Any]) -> Pipeline:
    """Return a platform of its own on the session's broker, its topics made."""
    return make_pipeline(broker_settings, tmp_path, f"t{uuid.uuid4().hex[:8]}.", store=store)


@pytest.fixture
def loader_contracts(make_topics: MakeTopics) -> Contracts:
    """Return the contracts of a loader, their topics made."""
    return make_topics(*LOADER_CONTRACTS)


@pytest.fixture
def venue() -> Iterator[SmallVenue]:
    """Serve a small venue that speaks Binance's protocol."""
    with SmallVenue() as running:
        yield running


@pytest.fixture
def rig(tmp_path: Path, store: dict[str, Any]) -> Rig:
    """Return a table of its own, with writers that need no broker."""
    return Rig(tmp_path, **store)
