"""What the tests of Dagster's rooms share: a job run for real in this process, and what it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE
from orchestration.resources import Platform
from streamforge.contracts import Contracts
from streamforge.settings import Settings


@dataclass(frozen=True)
class Ran:
    """A run that has ended."""

    run_id: str
    success: bool
    metadata: Mapping[str, Any]
    failure: str
    error: str


@dataclass(frozen=True)
class Jobs:
    """Jobs of some definitions on one platform and an instance of their own."""

    definitions: dg.Definitions
    instance: dg.DagsterInstance

    def run(self, name: str, config: Mapping[str, Any] | None = None, **options: Any) -> Ran:
        """Run a job; `config` is that of its only op, None: as the launchpad starts with."""
        job = self.definitions.resolve_job_def(name)
        [op] = [node.name for node in job.nodes]
        run_config = None if config is None else {"ops": {op: {"config": dict(config)}}}
        result = job.execute_in_process(run_config=run_config, instance=self.instance, raise_on_error=False, **options)
        outputs = [event.step_output_data for event in result.all_events if event.is_successful_output]
        metadata = {key: value.value for output in outputs for key, value in output.metadata.items()}
        failures = [event.step_failure_data for event in result.all_events if event.is_step_failure]
        said = [each.user_failure_data.description or "" for each in failures if each.user_failure_data]
        errors = [each.user_failure_data.metadata["error"].text for each in failures if each.user_failure_data]
        return Ran(result.run_id, result.success, metadata, "; ".join(said), "; ".join(errors))


def with_platform(definitions: dg.Definitions, settings: Settings, contracts: Contracts) -> dg.Definitions:
    """Return `definitions` on the platform of a test."""
    platform = dg.ResourceDefinition.hardcoded_resource(Platform(settings, contracts))
    return dg.Definitions.merge(definitions, dg.Definitions(resources={PLATFORM_RESOURCE: platform}))


def failures(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """Return what each failed step says."""
    found = {}
    for event in result.filter_events(lambda event: event.is_step_failure):
        data = event.step_failure_data.user_failure_data
        assert data is not None, f"{event.step_key}: {event.step_failure_data.error}"
        found[event.step_key or ""] = data.description or ""
    return found
