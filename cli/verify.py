"""`streamforge verify`: nothing lost, nothing doubled, or where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.common import Output, OutputOption, command, emit, progress_bar
from streamforge.contracts import load_contracts
from streamforge.lakehouse.verify import Comparison, verify_tables
from streamforge.lakehouse.verify_ledger import LedgerComparison, RawChannel, verify_ledger
from streamforge.settings import load_settings
from streaming.loaders.binance import CHANNELS

_FINDINGS = ("lost", "doubled", "different", "unexpected")


@command
def verify(
    tables: Annotated[
        list[str] | None, typer.Argument(help="Tables or contract ids. Default: all that a topic feeds.")
    ] = None,
    *,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="Folder of a simulator's ledger, to compare raw with as well.")
    ] = None,
    wait_s: Annotated[
        float,
        typer.Option(
            "--wait-s", min=0, help="Seconds to wait until the tables have all that Kafka holds at the start."
        ),
    ] = 0.0,
    output: OutputOption = Output.TEXT,
) -> int:
    """Compare Kafka with the tables row by row; exit code 1 when anything is lost, doubled, different or unexpected.

    Typed topics are compared with their tables, raw records are parsed again and compared with trades, and with
    --ledger every id that the venue sent is looked for in raw and in the published gaps. Runs beside a live
    pipeline: what is not landed yet is counted apart, and fails only with --wait-s.

    Examples: streamforge verify; streamforge verify trades bars --wait-s 60
    """
    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    with progress_bar(output) as report:
        comparisons = verify_tables(settings, contracts, tables or None, wait_s=wait_s, progress=report)
        sent = None
        if ledger is not None:
            report("ids of the ledger", 0, 0)
            sent = verify_ledger(settings, contracts, ledger, raw_channels())
    late = wait_s > 0 and any(item.not_landed for item in comparisons)
    clean = all(item.tally.is_clean for item in comparisons) and not late and not (sent and sent.unexplained)
    result = {
        "ok": clean,
        # A row that is lost is missing in both comparisons of its table: it is counted once.
        **{name: _worst(comparisons, name) for name in _FINDINGS},
        "not_landed": sum(item.not_landed for item in comparisons),
        "unexplained": 0 if sent is None else sent.unexplained,
        "comparisons": [item.as_dict() for item in comparisons],
        "ledger": None if sent is None else sent.as_dict(),
    }
    emit(result, output, lambda: _render(comparisons, sent, clean=clean))
    return 0 if clean else 1


def raw_channels() -> dict[str, RawChannel]:
    """Return the channels whose ids a ledger can be compared by."""
    return {name: RawChannel(item.contract_id, item.ids_of) for name, item in CHANNELS.items() if item.ids_of}


def _worst(comparisons: list[Comparison], name: str) -> int:
    by_table: dict[str, int] = {}
    for item in comparisons:
        by_table[item.table] = max(by_table.get(item.table, 0), getattr(item.tally, name))
    return sum(by_table.values())


def _render(comparisons: list[Comparison], sent: LedgerComparison | None, *, clean: bool) -> Any:
    table = Table("table", "against", "records", "rows", *_FINDINGS, "dead letters", "not landed", "below log start")
    places = []
    for item in comparisons:
        findings = [Text(str(n), style="red" if n else "green") for n in (getattr(item.tally, k) for k in _FINDINGS)]
        counts = [str(n) for n in (item.dead_letters, item.not_landed, item.below_log_start)]
        table.add_row(item.table, item.against, str(item.tally.records), str(item.tally.rows), *findings, *counts)
        for kind, examples in item.tally.examples.items():
            if examples:
                places.append(Text(f"{item.table} against {item.against}, {kind}: {', '.join(examples)}", style="red"))
    parts: list[Any] = [table, *places]
    if places:
        parts.append(Text("places are partition:offset:index of the topic"))
    if sent is not None:
        parts.append(
            Text(
                f"ledger: {sent.sent} ids sent in {sent.streams} streams, {sent.in_raw} in raw, {sent.explained} in "
                f"published gaps, {sent.unexplained} unexplained, {sent.after_last_raw} behind the last raw record"
            )
        )
        parts += [Text(f"unexplained: {example}", style="red") for example in sent.examples]
    parts.append(Text("nothing is lost or doubled" if clean else "NOT clean", style="green" if clean else "bold red"))
    return Group(*parts)
