"""Dead letters: records that were refused, each counted once, with what was decided about them.

An observation counts them by topic, reason and state. The check `none_open` warns while a letter waits for a decision:
the job `redrive` replays the original ranges after a fix, `streamforge dlq discard` records why nothing is needed.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE, observable, platform_of, stream_key
from assets.failures import clear_failures
from streamforge.contracts import Contracts
from streamforge.letters import (
    DLQ_SUFFIX,
    Letters,
    LetterState,
    count_letters,
    count_states,
    read_letters,
)
from streamforge.times import from_ns, iso_text

LETTERS = "dead_letters"
LETTERS_KEY = dg.AssetKey(LETTERS)
NONE_OPEN = "none_open"


def observable_letters(contracts: Contracts) -> dg.AssetsDefinition:
    """Return the dead letters of all topics as one asset, with an observation that counts them."""
    spec = dg.AssetSpec(
        key=LETTERS_KEY,
        deps=[stream_key(item) for item in contracts.with_topic if item.id.endswith(DLQ_SUFFIX)],
        description=__doc__,
        group_name=LETTERS,
        kinds={"kafka"},
    )

    def look_at_letters(context: dg.OpExecutionContext) -> Iterator[dg.ObserveResult]:
        with clear_failures():
            found = read_letters(*platform_of(context))
        yield dg.ObserveResult(asset_key=LETTERS_KEY, metadata=letters_metadata(found))

    return observable("look_at_letters", [spec], look_at_letters)


@dg.asset_check(
    asset=LETTERS_KEY,
    name=NONE_OPEN,
    required_resource_keys={PLATFORM_RESOURCE},
    description="Every dead letter was redriven or discarded.",
)
def none_open(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    """Warn while a dead letter is open."""
    with clear_failures():
        found = read_letters(*platform_of(context.op_execution_context))
    open_counts = [each for each in count_letters(found.letters) if each.state is LetterState.OPEN]
    said = "; ".join(f"{each.letters} of {each.topic}: {each.reason} by {each.processor}" for each in open_counts)
    advice = "After a fix run the job `redrive`; where nothing is needed, `streamforge dlq discard`"
    return dg.AssetCheckResult(
        passed=not open_counts,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{said}. {advice}" if open_counts else "no letter is open",
        metadata=letters_metadata(found),
    )


def letters_metadata(found: Letters) -> dict[str, Any]:
    """Return figures that the UI can draw, and a table with a line for each kind of letter."""
    counts = count_letters(found.letters)
    records = [
        dg.TableRecord(
            {
                "topic": each.topic,
                "reason": each.reason,
                "processor": each.processor,
                "state": str(each.state),
                "letters": each.letters,
                "first": iso_text(each.first_ns),
                "last": iso_text(each.last_ns),
            }
        )
        for each in counts
    ]
    metadata: dict[str, Any] = {
        "letters": len(found.letters),
        **count_states(found.letters),
        "unreadable": found.unreadable,
    }
    if records:
        metadata["by_reason"] = dg.MetadataValue.table(records)
        metadata["newest"] = dg.MetadataValue.timestamp(from_ns(max(each.last_ns for each in counts)))
    return metadata
