"""`streamforge dlq`: look at dead letters, redrive them after a fix, or discard them with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.common import DryRunOption, Output, OutputOption, command, emit, progress_bar
from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.redrive import RedriveReport, redrive
from streamforge.lakehouse.replay import WAIT_S
from streamforge.letters import (
    Letter,
    LetterCount,
    LetterFilter,
    Letters,
    LetterState,
    chosen,
    count_letters,
    count_states,
    discard,
    letter_of,
    payload_of,
    read_dead_letter,
    read_letters,
    topic_names,
)
from streamforge.market.records import DeadLetter
from streamforge.processes import user_at_host
from streamforge.settings import Settings, load_settings
from streamforge.times import iso_text

app = typer.Typer(no_args_is_help=True, help="Dead letters: list, show, redrive, discard.")

_LISTED = 20
_COLOURS = {LetterState.OPEN: "yellow", LetterState.REDRIVEN: "green", LetterState.DISCARDED: "dim"}

IdsArgument = Annotated[list[str] | None, typer.Argument(help="Ids of letters, or their first digits.")]
TopicOption = Annotated[
    list[str] | None, typer.Option("--topic", help="Topic of the refused records, for instance raw-trades; repeatable.")
]
PartitionOption = Annotated[int | None, typer.Option(min=0, help="Topic-partition number of the refused record.")]
OffsetOption = Annotated[int | None, typer.Option(min=0, help="Offset of the refused record.")]
CodeOption = Annotated[str | None, typer.Option("--code", help="Reason code, for instance malformed_json.")]
ProcessorOption = Annotated[str | None, typer.Option(help="Kind of process that refused, for instance parser.")]
WhoOption = Annotated[str | None, typer.Option(help="Who decides.  [default: user@host]", show_default=False)]


@app.command("list")
@command
def list_(
    *,
    topic: TopicOption = None,
    code: CodeOption = None,
    processor: ProcessorOption = None,
    state: Annotated[list[LetterState] | None, typer.Option(help="Only letters in this state; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Most letters to name one by one, newest first.")] = _LISTED,
    output: OutputOption = Output.TEXT,
) -> int:
    """Count dead letters by topic, reason, processor and state, and name the newest.

    A letter is counted once, however often its record was refused by the same kind of process.

    Example: streamforge dlq list --topic raw-trades --state open
    """
    settings, contracts = _platform()
    wanted = LetterFilter(
        topics=topic_names(contracts, topic or ()),
        reason=code,
        processor=processor,
        states=frozenset(state or LetterState),
    )
    found = _read(settings, contracts, wanted, output)
    counts = count_letters(found.letters)
    newest = sorted(found.letters, key=lambda each: each.last_ns, reverse=True)[:limit]
    result = {
        "letters": len(found.letters),
        **count_states(found.letters),
        "unreadable": found.unreadable,
        "counts": [_count_as_dict(each) for each in counts],
        "newest": [_as_dict(each) for each in newest],
    }
    emit(result, output, lambda: _render_list(found, counts, newest))
    return 0


@app.command()
@command
def show(
    letter_id: Annotated[str | None, typer.Argument(help="Id of a letter, or its first digits.")] = None,
    *,
    topic: TopicOption = None,
    partition: PartitionOption = None,
    offset: OffsetOption = None,
    output: OutputOption = Output.TEXT,
) -> int:
    """Show one letter with its bytes; by place it shows every letter about that record.

    Examples: streamforge dlq show 5f3a, streamforge dlq show --topic raw-trades --partition 3 --offset 1041
    """
    settings, contracts = _platform()
    if (letter_id is None) == (offset is None) or (offset is not None and (partition is None or not topic)):
        msg = "say which letter: its id, or all of --topic, --partition and --offset"
        raise ConfigurationError(msg)
    wanted = LetterFilter(topics=topic_names(contracts, topic or ()), partition=partition, offset=offset)
    letters = _read(settings, contracts, wanted, output).letters
    found = letters if letter_id is None else [letter_of(letters, letter_id)]
    if not found:
        msg = f"no dead letter about {', '.join(topic or ())}-{partition} offset {offset}"
        raise ConfigurationError(msg)
    whole = [(each, read_dead_letter(settings, each)) for each in found]
    result = {"letters": [_as_dict(letter) | _content(record) for letter, record in whole]}
    emit(result, output, lambda: Group(*(_render_letter(letter, record) for letter, record in whole)))
    return 0


@app.command("redrive")
@command
def redrive_command(
    ids: IdsArgument = None,
    *,
    topic: TopicOption = None,
    partition: PartitionOption = None,
    offset: OffsetOption = None,
    code: CodeOption = None,
    processor: ProcessorOption = None,
    who: WhoOption = None,
    wait_s: Annotated[
        float, typer.Option(min=0, help="Longest wait until the live path has landed the ranges, seconds.")
    ] = WAIT_S,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Replay the original ranges of refused records after a fix; without a filter those of every open letter.

    Each record lands once, beside the live writer; a second redrive changes nothing. A letter whose record is no
    longer refused counts as redriven. Exit code 1 where a letter is still refused or cannot be redriven.

    Example: streamforge dlq redrive --topic raw-trades --code malformed_json --dry-run
    """
    settings, contracts = _platform()
    place = LetterFilter(
        topics=topic_names(contracts, topic or ()), partition=partition, offset=offset, reason=code, processor=processor
    )
    letters = _meant(settings, contracts, place, ids or (), output)
    with progress_bar(output) as hear:
        report = redrive(
            settings,
            contracts,
            letters,
            who=who or user_at_host(),
            dry_run=dry_run,
            wait_s=wait_s,
            progress=hear,
        )
    emit(report.as_dict(), output, lambda: _render_redrive(report))
    return 0 if all(each.is_solved for each in report.letters) else 1


@app.command("discard")
@command
def discard_command(
    ids: IdsArgument = None,
    *,
    reason: Annotated[str, typer.Option(help="Why these letters need nothing more.")],
    topic: TopicOption = None,
    partition: PartitionOption = None,
    offset: OffsetOption = None,
    code: CodeOption = None,
    processor: ProcessorOption = None,
    who: WhoOption = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Record that letters need nothing more, by whom and why. Nothing is deleted; they may still be redriven by id.

    Example: streamforge dlq discard --topic raw-trades --code malformed_json --reason "the venue's test stream"
    """
    settings, contracts = _platform()
    place = LetterFilter(
        topics=topic_names(contracts, topic or ()), partition=partition, offset=offset, reason=code, processor=processor
    )
    if not ids and place == LetterFilter():
        msg = "say which letters: ids, or one of --topic, --partition, --offset, --code, --processor"
        raise ConfigurationError(msg)
    letters = _meant(settings, contracts, place, ids or (), output)
    named = who or user_at_host()
    if not dry_run:
        discard(settings, contracts, letters, who=named, why=reason)
    result = {
        "dry_run": dry_run,
        "discarded": len(letters),
        "who": named,
        "why": reason,
        "by_letter": [_as_dict(each) for each in letters],
    }
    did = "would be discarded" if dry_run else "are discarded"
    emit(result, output, lambda: Group(_letters_table(letters), Text(f"{len(letters)} letters {did} by {named}")))
    return 0


def _platform() -> tuple[Settings, Contracts]:
    settings = load_settings()
    return settings, load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)


def _read(settings: Settings, contracts: Contracts, wanted: LetterFilter, output: Output) -> Letters:
    with progress_bar(output) as hear:
        return read_letters(settings, contracts, wanted, progress=hear)


def _meant(
    settings: Settings, contracts: Contracts, place: LetterFilter, ids: Sequence[str], output: Output
) -> list[Letter]:
    return chosen(_read(settings, contracts, place, output).letters, ids)


def _as_dict(letter: Letter) -> dict[str, Any]:
    return {
        "letter_id": letter.letter_id,
        "state": str(letter.state),
        "topic": letter.topic,
        "topic_id": letter.topic_id,
        "partition": letter.partition,
        "offset": letter.offset,
        "index": letter.index,
        "reason": letter.reason,
        "processor": letter.processor,
        "first": iso_text(letter.first_ns),
        "last": iso_text(letter.last_ns),
        "records": letter.records,
        "decision": None if letter.decision is None else msgspec.to_builtins(letter.decision),
    }


def _content(record: DeadLetter) -> dict[str, Any]:
    payload, encoding = payload_of(record)
    return {
        "detail": record.detail,
        "processor_version": record.processor_version,
        "headers": record.headers,
        "payload": payload,
        "payload_encoding": encoding,
    }


def _count_as_dict(count: LetterCount) -> dict[str, Any]:
    return {
        "topic": count.topic,
        "reason": count.reason,
        "processor": count.processor,
        "state": str(count.state),
        "letters": count.letters,
        "first": iso_text(count.first_ns),
        "last": iso_text(count.last_ns),
    }


def _render_list(found: Letters, counts: Sequence[LetterCount], newest: Sequence[Letter]) -> Any:
    notes = [Text(f"{found.unreadable} records of dead-letter topics are no dead letters of ours")]
    notes = notes if found.unreadable else []
    if not counts:
        return Group(Text("there are no dead letters"), *notes)
    table = Table("topic", "reason", "processor", "state", "letters", "first", "last")
    for each in counts:
        state = Text(str(each.state), style=_COLOURS[each.state])
        times = (iso_text(each.first_ns), iso_text(each.last_ns))
        table.add_row(each.topic, each.reason, each.processor, state, f"{each.letters:,}", *times)
    return Group(table, _letters_table(newest), *notes)


def _letters_table(letters: Iterable[Letter]) -> Table:
    table = Table(box=None)
    table.add_column("id", no_wrap=True)
    for name in ("state", "record", "reason", "refused by", "decision"):
        table.add_column(name)
    for each in letters:
        state = Text(str(each.state), style=_COLOURS[each.state])
        table.add_row(each.letter_id, state, Text(each.place), each.reason, each.processor, _decision_text(each))
    return table


def _decision_text(letter: Letter) -> Text:
    made = letter.decision
    return Text("" if made is None else f"{made.who} at {iso_text(made.ts_decided_ns)}: {made.why}")


def _render_letter(letter: Letter, record: DeadLetter) -> Table:
    payload, encoding = payload_of(record)
    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("letter", f"{letter.letter_id}, {letter.state}")
    grid.add_row("record", Text(f"{letter.place} (topic id {letter.topic_id})"))
    grid.add_row("refused", Text(f"{letter.reason} by {letter.processor} {record.processor_version}"))
    grid.add_row("detail", Text(record.detail))
    grid.add_row("first, last", f"{iso_text(letter.first_ns)}, {iso_text(letter.last_ns)}, {letter.records} records")
    grid.add_row("headers", Text(", ".join(f"{name}={value}" for name, value in record.headers.items()) or "none"))
    grid.add_row(f"bytes ({encoding})", Text(payload))
    if letter.decision is not None:
        grid.add_row("decision", _decision_text(letter))
    return grid


def _render_redrive(report: RedriveReport) -> Any:
    if not report.letters:
        return Text("no letter is open: nothing to redrive")
    parts: list[Any] = []
    for each in report.replays:
        changes = ("equal", "changed", "added", "gone")
        parts.append(Text(f"{each['table']}: " + ", ".join(f"{each[f'rows_{name}']:,} {name}" for name in changes)))
        if each["warning"]:
            parts.append(Text(each["warning"], style="yellow"))
    table = Table(box=None)
    table.add_column("id", no_wrap=True)
    for name in ("record", "outcome", "detail"):
        table.add_column(name)
    for item in report.letters[:_LISTED]:
        style = "green" if item.is_solved else "red"
        table.add_row(
            item.letter.letter_id, Text(item.letter.place), Text(str(item.outcome), style=style), Text(item.detail)
        )
    more = len(report.letters) - _LISTED
    notes = [Text(f"and {more} more; --output json has them all")] if more > 0 else []
    counts = ", ".join(f"{count} {name}" for name, count in report.outcomes.items() if count)
    did = "would be" if report.dry_run else "are"
    return Group(*parts, table, *notes, Text(f"of {len(report.letters)} letters {did}: {counts}", style="bold"))
