"""Resources and the executor of jobs: thin, they return plain clients and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import dagster as dg
from pydantic import Field

from streamforge.contracts import Contracts, load_contracts
from streamforge.settings import Settings, build_settings, load_settings


class OrchestrationSettings(Settings):
    """Settings of the code locations and of the runs that they describe."""

    orchestration_executor: Literal["local", "kubernetes"] = Field(
        "local",
        description="Where the steps of a Dagster run execute: in processes beside it, or each in a Kubernetes Job; "
        "code locations and runs must have the same.",
    )


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


def job_executor(local: dg.ExecutorDefinition = dg.multi_or_in_process_executor) -> dg.ExecutorDefinition:
    """Return the executor of a code location's jobs: `local`, or a Kubernetes Job a step where the environment says so.

    Raises:
        ConfigurationError: the setting is wrong.
    """
    if build_settings(OrchestrationSettings).orchestration_executor == "local":
        return local
    # Kubernetes' client takes a second to import: only where it is used.
    from dagster_k8s import k8s_job_executor  # noqa: PLC0415

    return k8s_job_executor
