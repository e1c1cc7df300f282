"""Consumers: the always-on processes, one asset a kind, observed from what they say in `queue-events`.

They run beside Dagster and need nothing of it. An observation tells state, positions and lag of each replica; the
check `alive` fails when one is silent, stuck or has failed, and keeps failing until it speaks again or has stopped in
good order. A consumer that somebody stopped or paused is well.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import dagster as dg

from assets.catalogue import PLATFORM_RESOURCE, observable, platform_of, stream_key
from assets.failures import clear_failures
from streamforge.contracts import Contracts
from streamforge.events import ProcessEvent
from streamforge.liveness import Judgement, judge, words_that_count
from streamforge.settings import Settings
from streamforge.supervision import read_events

CONSUMERS = "consumers"
ALIVE = "alive"
WITHIN_S = 3_600.0
"""How far back every word counts: enough to see what stands still."""
LOOK_BACK_S = 7 * 86_400.0
"""How far back a last word counts: as long as `queue-events` keeps it. Who died within that time is not forgotten."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """One kind of process.

    Args:
        kind: as `queue-events` and `queue-control` call it.
        does: a sentence for people.
        lands: it lands topics in their tables.
    """

    kind: str
    does: str
    lands: bool = False

    @property
    def key(self) -> dg.AssetKey:
        """Return its asset key."""
        return dg.AssetKey([CONSUMERS, self.kind.replace("-", "_")])

    def inputs(self, contracts: Contracts) -> tuple[str, ...]:
        """Return the contracts of the topics that it reads: a processor's are those of its changelog."""
        if self.lands:
            return tuple(each.id for each in contracts.with_table if each.topic is not None)
        changelog = f"{self.kind}-changelog"
        return contracts[changelog].inputs if changelog in contracts else ()


KINDS = (
    Consumer("simulator", "Serves a simulated market over a venue's own protocol; only where no real venue is read."),
    Consumer("loader", "Captures what the venue sends, byte for byte, into the raw topics."),
    Consumer("parser", "Turns raw trades into typed trades, each venue id once."),
    Consumer("bars", "Sums trades up to bars and closes them by event time."),
    Consumer("history-parser", "Turns loaded candle files into venue bars."),
    Consumer("inference", "Forecasts each instrument's volatility from its bars with the champion model."),
    Consumer("writer", "Lands every topic that has an Iceberg table in it, exactly once.", lands=True),
)


def consumer_specs(contracts: Contracts) -> list[dg.AssetSpec]:
    """Return one external asset for each kind; it depends on the streams that it reads."""
    return [
        dg.AssetSpec(
            key=each.key,
            deps=[stream_key(contracts[name]) for name in each.inputs(contracts)],
            description=f"{each.does}\n\nTold by the jobs pause, resume and stop, with the target `{each.kind}`.",
            group_name=CONSUMERS,
            kinds={"kafka"},
        )
        for each in KINDS
    ]


def observable_consumers(contracts: Contracts) -> dg.AssetsDefinition:
    """Return the consumers with an observation that tells state, age of the last word and lag of each.

    Of those that spoke in the last hour; the check `alive` remembers the others.
    """

    def look_at_consumers(context: dg.OpExecutionContext) -> Iterator[dg.ObserveResult]:
        # Every five minutes: who was silent for longer than that has no state to record.
        with clear_failures():
            found = judgements(*platform_of(context), look_back_s=WITHIN_S)
        for each in KINDS:
            if each.key not in context.selected_asset_keys:
                continue
            mine = found.get(each.kind, ())
            yield dg.ObserveResult(asset_key=each.key, metadata=_metadata(mine))

    return observable("look_at_consumers", consumer_specs(contracts), look_at_consumers)


def consumer_checks() -> dg.AssetChecksDefinition:
    """Return the check `alive` of every consumer."""

    @dg.multi_asset_check(
        name="consumers_alive",
        specs=[
            dg.AssetCheckSpec(ALIVE, asset=each.key, description="Nobody is silent, stuck or has failed.")
            for each in KINDS
        ],
        can_subset=True,
        required_resource_keys={PLATFORM_RESOURCE},
    )
    def consumers_alive(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        with clear_failures():
            found = judgements(*platform_of(context.op_execution_context))
        for each in KINDS:
            if dg.AssetCheckKey(each.key, ALIVE) in context.selected_asset_check_keys:
                yield alive(each, found.get(each.kind, ()))

    return consumers_alive


def judgements(
    settings: Settings,
    contracts: Contracts,
    *,
    look_back_s: float = LOOK_BACK_S,
    known: Iterable[ProcessEvent] = (),
) -> Mapping[str, Sequence[Judgement]]:
    """Return how each replica is now, by kind; kinds that did not speak are absent.

    Args:
        settings: where the broker is.
        contracts: has `queue-events`.
        look_back_s: how far back words are read.
        known: words that are known from before.

    Raises:
        RetryableSourceError: the broker does not answer.
    """
    now_ns = time.time_ns()
    said = chain(known, read_events(settings, contracts, within_s=look_back_s, now_ns=now_ns))
    found: dict[str, list[Judgement]] = {}
    for each in judge(words_that_count(said, now_ns - int(WITHIN_S * 1e9)), now_ns):
        if each.silent_s <= LOOK_BACK_S:
            found.setdefault(each.last.kind, []).append(each)
    return found


def alive(consumer: Consumer, found: Sequence[Judgement]) -> dg.AssetCheckResult:
    """Return the check's result for one kind."""
    ill = [each for each in found if each.health.needs_a_person]
    if ill:
        text = "; ".join(each.text for each in ill) + ". See `streamforge status` and its log"
    elif found:
        text = "; ".join(each.text for each in found)
    else:
        text = f"no {consumer.kind} spoke in the last {LOOK_BACK_S / 86_400:.0f} days: nobody runs it here"
    return dg.AssetCheckResult(
        asset_key=consumer.key, check_name=ALIVE, passed=not ill, description=text, metadata=_metadata(found)
    )


def _metadata(found: Sequence[Judgement]) -> dict[str, dg.MetadataValue]:
    """Return numbers that the UI can draw, and a table with a line for each replica."""
    rows = [
        dg.TableRecord(
            {
                "process": each.last.process_id,
                "health": str(each.health),
                "state": str(each.last.state),
                "silent_s": round(each.silent_s, 1),
                "next_offsets": sum(each.last.positions.values()),
                "lag_records": each.lag_records,
                "detail": each.last.detail,
            }
        )
        for each in found
    ]
    metadata: dict[str, dg.MetadataValue] = {"replicas": dg.MetadataValue.int(len(found))}
    if found:
        metadata |= {
            "health": dg.MetadataValue.text(", ".join(str(each.health) for each in found)),
            "lag_records": dg.MetadataValue.int(sum(each.lag_records for each in found)),
            "silent_s": dg.MetadataValue.float(round(max(each.silent_s for each in found), 1)),
            "processes": dg.MetadataValue.table(rows),
        }
    return metadata
