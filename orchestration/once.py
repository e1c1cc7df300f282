"""Run jobs of the code location `lakehouse` in this process, one after the other, as standard input asks for them.

    python -m orchestration.once

A line in is a JSON object `{"job": ..., "config": {...}, "partition_key": ...}`, a line out says how the run ended. The
runs are real ones of the instance that DAGSTER_HOME names, and a UI that is started there later shows them. For a
caller that waits for results and has no daemon, such as the demo: code and instance are loaded once.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import dagster as dg
import msgspec


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job to run; `config` is that of its only op."""

    job: str
    config: dict[str, Any] | None = None
    partition_key: str | None = None


class Check(msgspec.Struct, frozen=True):
    """How an asset check came out."""

    asset: str
    name: str
    passed: bool
    severity: str


class Answer(msgspec.Struct, frozen=True):
    """How a run ended: its outputs' metadata, its checks, and why it failed."""

    job: str
    run_id: str
    status: str
    wall_s: float
    assets: list[str]
    checks: list[Check]
    metadata: dict[str, Any]
    failure: str


def run(definitions: dg.Definitions, instance: dg.DagsterInstance, request: Request) -> Answer:
    """Run one job to its end and say how that was."""
    job = definitions.resolve_job_def(request.job)
    run_config = None
    if request.config is not None:
        [op] = [node.name for node in job.nodes]
        run_config = {"ops": {op: {"config": request.config}}}
    started_s = time.monotonic()
    result = job.execute_in_process(
        run_config=run_config, partition_key=request.partition_key, instance=instance, raise_on_error=False
    )
    failures = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    return Answer(
        job=request.job,
        run_id=result.run_id,
        status="SUCCESS" if result.success else "FAILURE",
        wall_s=round(time.monotonic() - started_s, 3),
        assets=_assets(result),
        checks=[
            Check(each.asset_key.to_user_string(), each.check_name, each.passed, each.severity.value)
            for each in result.get_asset_check_evaluations()
        ],
        metadata=_metadata(result),
        failure="; ".join(_text(each) for each in failures),
    )


def _assets(result: dg.ExecuteInProcessResult) -> list[str]:
    """Return the keys of what was observed or materialized."""
    kinds = (dg.DagsterEventType.ASSET_OBSERVATION, dg.DagsterEventType.ASSET_MATERIALIZATION)
    keys = {event.asset_key for event in result.all_events if event.event_type in kinds}
    return sorted(key.to_user_string() for key in keys if key is not None)


def _metadata(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    outputs = [event.step_output_data for event in result.all_events if event.is_successful_output]
    return {key: value.value for output in outputs for key, value in output.metadata.items()}


def _text(failure: Any) -> str:
    """Return what a failed step says of itself."""
    said = failure.user_failure_data
    return str(said.description if said is not None else failure.error.message).strip()


def main() -> None:
    """Answer requests until standard input ends."""
    # What a job prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from orchestration.lakehouse import defs  # noqa: PLC0415 - it prints warnings where they belong

    with dg.DagsterInstance.get() as instance:
        for line in sys.stdin:
            answer = run(defs, instance, msgspec.json.decode(line, type=Request))
            answers.write(msgspec.json.encode(answer, enc_hook=str).decode() + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
