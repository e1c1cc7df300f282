"""Code location `lakehouse`: it only puts together what each module defines from the contracts."""

from __future__ import annotations

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE
from orchestration import control, follow, letters, maintenance, marts, replay, tables
from orchestration.resources import job_executor, platform_resource
from streamforge.contracts import load_contracts
from streamforge.settings import load_settings

_contracts = load_contracts(load_settings().contracts_dir)

defs = dg.Definitions.merge(
    dg.Definitions(resources={PLATFORM_RESOURCE: platform_resource}, executor=job_executor()),
    control.definitions(_contracts),
    follow.definitions(_contracts),
    letters.definitions(_contracts),
    maintenance.definitions(_contracts),
    marts.definitions(_contracts),
    replay.definitions(_contracts),
    tables.definitions(_contracts),
)
