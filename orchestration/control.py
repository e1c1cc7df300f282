"""Control of the always-on processes: observed consumers, jobs that tell them what to do, a sensor that warns.

Everything goes through `queue-events` and `queue-control`; no process waits for Dagster.
"""

import time

import dagster as dg
import msgspec
from pydantic import Field

from assets.catalogue import PLATFORM_RESOURCE, platform_of
from assets.consumers import (
    ALIVE,
    KINDS,
    WITHIN_S,
    alive,
    consumer_checks,
    judgements,
    observable_consumers,
)
from assets.failures import clear_failures
from streamforge.contracts import Contracts
from streamforge.errors import StreamForgeError
from streamforge.events import CommandKind, ProcessEvent
from streamforge.supervision import send_command, wait_for_answers

ISSUED_BY = "dagster"
ORDERS = {
    CommandKind.PAUSE: "Let processes stand still where they are; kept: who is started later is paused too.",
    CommandKind.RESUME: "Let paused processes go on.",
    CommandKind.STOP: "End processes in good order with exit code 0; `streamforge up` does not start them again.",
}
_SENSOR_INTERVAL_S = 30
_FIRST_LOOK_S = 86_400.0
"""How far back a sensor without memory looks: a tick has a minute, so it is less than what the check by hand reads."""


class _Memory(msgspec.Struct, frozen=True):
    """The sensor's cursor: when it looked, its verdicts, and the last words of those that are silent for long."""

    looked_ns: int = 0
    verdicts: dict[str, bool] = {}
    last_words: tuple[ProcessEvent, ...] = ()


class Tell(dg.Config):
    """Whom to tell, and how long to wait for the answer."""

    target: str = Field(
        description="A kind (writer), a slot (writer/0), a process id as consumers/<kind> shows it, or * for all."
    )
    wait_s: float = Field(
        default=15.0,
        gt=0,
        description="Seconds to wait for the answer of every live process that is meant; without one of them the run "
        "fails.",
    )


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return the consumers, observed every five minutes, the jobs that tell them, and the sensor that warns."""
    observe = dg.define_asset_job(
        "observe_consumers",
        # By key: a selection by group leaves out what is only observed.
        selection=dg.AssetSelection.assets(*(each.key for each in KINDS)).without_checks(),
        description="Record state and lag of every consumer.",
        executor_def=dg.in_process_executor,
    )
    # A job of its own: Dagster does not observe in a job that has checks.
    check = dg.define_asset_job(
        "check_consumers",
        selection=dg.AssetSelection.checks_for_assets(*(each.key for each in KINDS)),
        description="Check now that no consumer is silent, stuck or has failed; the sensor does it every half minute.",
        executor_def=dg.in_process_executor,
    )
    return dg.Definitions(
        assets=[observable_consumers(contracts)],
        asset_checks=[consumer_checks()],
        jobs=[observe, check, *(_job(order, text) for order, text in ORDERS.items())],
        schedules=[
            dg.ScheduleDefinition(
                job=observe, cron_schedule="*/5 * * * *", default_status=dg.DefaultScheduleStatus.RUNNING
            )
        ],
        sensors=[stuck_consumers],
    )


@dg.sensor(
    minimum_interval_seconds=_SENSOR_INTERVAL_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    required_resource_keys={PLATFORM_RESOURCE},
)
def stuck_consumers(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Fail the check `alive` of a consumer that is silent, stuck or has failed; pass it once it is well again.

    No run is started for it. Each tick says in its skip reason who is ill; a check is written when it changes. Without
    a broker nothing is known and nothing is written.
    """
    platform = context.resources.platform
    memory = msgspec.json.decode(context.cursor, type=_Memory) if context.cursor else _Memory()
    looked_ns = time.time_ns()
    unseen_s = (looked_ns - memory.looked_ns) / 1e9
    try:
        found = judgements(
            platform.settings,
            platform.contracts,
            look_back_s=min(unseen_s + WITHIN_S, _FIRST_LOOK_S),
            known=memory.last_words,
        )
    except StreamForgeError as error:
        return dg.SkipReason(f"nothing is known of the consumers: {error}")
    results = {each: alive(each, found[each.kind]) for each in KINDS if each.kind in found}
    ill = [str(result.description) for result in results.values() if not result.passed]
    remembered = _Memory(
        looked_ns,
        memory.verdicts | {each.kind: result.passed for each, result in results.items()},
        tuple(each.last for replicas in found.values() for each in replicas if each.silent_s > WITHIN_S / 2),
    )
    return dg.SensorResult(
        skip_reason="; ".join(ill) or f"{len(results)} kinds of consumers speak and get on",
        cursor=msgspec.json.encode(remembered).decode(),
        asset_events=[
            _evaluation(each.key, result)
            for each, result in results.items()
            if memory.verdicts.get(each.kind) != result.passed
        ],
    )


def _job(order: CommandKind, text: str) -> dg.JobDefinition:
    @dg.op(name=f"tell_to_{order}", description=text, required_resource_keys={PLATFORM_RESOURCE})
    def tell(context: dg.OpExecutionContext, config: Tell) -> None:
        _tell(context, order, config)

    @dg.job(name=str(order), description=text, executor_def=dg.in_process_executor)
    def job() -> None:
        tell()

    return job


def _tell(context: dg.OpExecutionContext, order: CommandKind, config: Tell) -> None:
    """Send the command and wait until every live process that is meant answers; what they say becomes metadata."""
    settings, contracts = platform_of(context)
    with clear_failures():
        sent = send_command(settings, contracts, target=config.target, command=order, issued_by=ISSUED_BY)
        context.log.info("told %s: %s (command %s)", config.target, order, sent.command_id)
        answers = wait_for_answers(settings, contracts, sent, timeout_s=config.wait_s)
    for event in answers:
        context.log.info("%s answered: %s %s", event.process_id, event.state, event.detail)
    context.add_output_metadata(
        {
            "process": ", ".join(event.process_id for event in answers),
            "state": ", ".join(str(event.state) for event in answers),
            "detail": "; ".join(event.detail for event in answers if event.detail),
            "command_id": sent.command_id,
        }
    )


def _evaluation(key: dg.AssetKey, result: dg.AssetCheckResult) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=key,
        check_name=ALIVE,
        passed=result.passed,
        metadata=result.metadata,
        description=result.description,
    )
