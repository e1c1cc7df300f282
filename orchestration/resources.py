"""Resources: thin, they return plain clients and values."""

from __future__ import annotations

from dataclasses import dataclass

import dagster as dg

from streamforge.contracts import Contracts, load_contracts
from streamforge.settings import Settings, load_settings


@dataclass(frozen=True, slots=True)
class Platform:
    """Where broker, catalog and contracts are."""

    settings: Settings
    contracts: Contracts


@dg.resource(description="Settings and contracts of the platform, from the environment of the run.")
def platform_resource(_context: dg.InitResourceContext) -> Platform:
    """Build the platform's values when a run starts, not when definitions load."""
    settings = load_settings()
    return Platform(settings, load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix))
