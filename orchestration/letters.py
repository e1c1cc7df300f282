"""Dead letters: counted and checked every hour, and redriven from the UI after a fix.

The job `redrive` replays the original ranges of refused records, beside the live writer: each record lands once, and a
second run changes nothing. It starts as a dry run over every open letter.
"""

from typing import Any

import dagster as dg
from pydantic import Field

from assets.catalogue import PLATFORM_RESOURCE, platform_of
from assets.failures import clear_failures
from assets.letters import LETTERS_KEY, none_open, observable_letters
from streamforge.contracts import Contracts
from streamforge.lakehouse.redrive import RedriveReport, redrive
from streamforge.lakehouse.replay import WAIT_S
from streamforge.letters import LetterFilter, chosen, read_letters, topic_names


class AskedLetters(dg.Config):
    """Which letters; where nothing is given, every open one."""

    ids: list[str] = Field(default=[], description="Ids of letters as `streamforge dlq list` shows them, in any state.")
    topic: str = Field(default="", description="Only records of this topic, for instance raw-trades.")
    reason: str = Field(default="", description="Only what was refused for this reason.")
    processor: str = Field(default="", description="Only what this kind of process refused, for instance parser.")
    dry_run: bool = Field(default=True, description="Only say what would change.")
    wait_s: float = Field(
        default=WAIT_S,
        ge=0,
        description="Longest wait until the live path has landed the ranges, seconds; not in a dry run.",
    )


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return the dead letters of `contracts`, observed and checked every hour, and the job that redrives them."""
    observe = dg.define_asset_job(
        "observe_dead_letters",
        selection=dg.AssetSelection.assets(LETTERS_KEY).without_checks(),
        description="Count dead letters by topic, reason and state.",
        executor_def=dg.in_process_executor,
    )
    # A job of its own: Dagster does not observe in a job that has checks.
    check = dg.define_asset_job(
        "check_dead_letters",
        selection=dg.AssetSelection.checks(none_open),
        description="Warn while a dead letter is open.",
        executor_def=dg.in_process_executor,
    )
    running = dg.DefaultScheduleStatus.RUNNING
    return dg.Definitions(
        assets=[observable_letters(contracts)],
        asset_checks=[none_open],
        jobs=[observe, check, redrive_job],
        schedules=[
            dg.ScheduleDefinition(job=observe, cron_schedule="10 * * * *", default_status=running),
            dg.ScheduleDefinition(job=check, cron_schedule="11 * * * *", default_status=running),
        ],
    )


@dg.op(name="redrive_letters", required_resource_keys={PLATFORM_RESOURCE})
def redrive_letters(context: dg.OpExecutionContext, config: AskedLetters) -> None:
    """Replay the original ranges of refused records and record which letters that solved."""
    settings, contracts = platform_of(context)
    with clear_failures():
        wanted = LetterFilter(
            topics=topic_names(contracts, [config.topic] if config.topic else []),
            reason=config.reason or None,
            processor=config.processor or None,
        )
        letters = chosen(read_letters(settings, contracts, wanted).letters, config.ids)
        report = redrive(
            settings,
            contracts,
            letters,
            who=f"dagster run {context.run.run_id}",
            dry_run=config.dry_run,
            wait_s=config.wait_s,
        )
    for each in report.letters:
        if not each.is_solved:
            context.log.warning("%s: %s, %s", each.letter.place, each.outcome, each.detail)
    context.add_output_metadata(_metadata(report))


@dg.job(
    name="redrive",
    executor_def=dg.in_process_executor,
    config=dg.RunConfig(ops={redrive_letters.name: AskedLetters()}),
    description=__doc__,
)
def redrive_job() -> None:
    """Redrive what the launchpad asks for."""
    redrive_letters()


def _metadata(report: RedriveReport) -> dict[str, Any]:
    """Return figures that the UI can draw one by one, and the whole report."""
    return {
        "dry_run": report.dry_run,
        "letters": len(report.letters),
        **report.outcomes,
        "recorded": len(report.decisions),
        "committed": any(each.get("committed", False) for each in report.replays),
        "report": dg.MetadataValue.json(report.as_dict()),
    }
