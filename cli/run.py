"""`streamforge run KIND`: run one always-on consumer until it is told to stop."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from cli.common import DryRunOption, Output, OutputOption, command, emit
from streamforge import faults
from streamforge.collector import calm_collector, plain_arrow_memory
from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import ConfigurationError
from streamforge.metrics import MetricsServer, ProcessMetrics
from streamforge.settings import build_settings, load_settings
from streaming.runner import Worker, run_worker

_SLOT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HISTORY_NICENESS = 10


@command
def run(
    kind: Annotated[str, typer.Argument(help="What to run: parser, bars, history-parser, inference or writer.")],
    *,
    slot: Annotated[str, typer.Option(help="Replica name, stable over restarts; each replica has its own.")] = "0",
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of metrics and readiness; 0: a free one.")
    ] = 0,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Run a consumer until SIGTERM, Ctrl-C or a `stop` command; it then commits what it took in.

    Exit codes: 0 stopped, 1 failed, 2 wrong usage or settings, 3 another process has taken the slot over.

    Example: streamforge run writer --slot 1
    """
    make = WORKERS.get(kind)
    if make is None:
        msg = f"unknown kind {kind!r}; there are: {', '.join(WORKERS)}"
        raise ConfigurationError(msg)
    if _SLOT.fullmatch(slot) is None:
        msg = f"--slot must be 1 to 64 letters, digits, - or _; found {slot!r}"
        raise ConfigurationError(msg)
    settings = load_settings()
    faults.arm(settings.kill_at)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    metrics = ProcessMetrics(kind, slot)
    worker = make(contracts, slot, metrics)
    result: dict[str, Any] = {"kind": kind, "slot": slot, "topics": list(worker.topics), "dry_run": dry_run}
    if dry_run:
        worker.close()
        emit(result, output, lambda: _table("Would run", result))
        return 0
    server = MetricsServer(metrics, port=metrics_port, host=settings.metrics_host)
    calm_collector()
    plain_arrow_memory()
    try:
        code = run_worker(worker, settings, contracts, slot=slot, metrics=metrics, metrics_port=server.port)
    finally:
        server.close()
    result |= {"exit_code": code, "positions": {str(item): offset for item, offset in worker.positions().items()}}
    emit(result, output, lambda: _table("Ran", result))
    return code


# Each kind loads only what it needs.


def _parser(contracts: Contracts, slot: str, metrics: ProcessMetrics) -> Worker:
    from streaming.processors.base import TransactionalWorker
    from streaming.processors.parser import Parser

    settings = load_settings()
    return TransactionalWorker(Parser(settings), settings, contracts, slot=slot, metrics=metrics)


def _bars(contracts: Contracts, slot: str, metrics: ProcessMetrics) -> Worker:
    from streaming.processors.bars import Bars
    from streaming.processors.base import TransactionalWorker

    settings = load_settings()
    return TransactionalWorker(Bars(settings), settings, contracts, slot=slot, metrics=metrics)


def _history_parser(contracts: Contracts, slot: str, metrics: ProcessMetrics) -> Worker:
    from streaming.processors.base import TransactionalWorker
    from streaming.processors.history import HistoryParser

    os.nice(_HISTORY_NICENESS)  # live data never waits behind history
    settings = load_settings()
    return TransactionalWorker(HistoryParser(settings), settings, contracts, slot=slot, metrics=metrics)


def _inference(contracts: Contracts, slot: str, metrics: ProcessMetrics) -> Worker:
    from streamforge.gnn.libraries import require_libraries
    from streaming.processors.inference import InferenceSettings, InferenceWorker

    require_libraries()
    return InferenceWorker(build_settings(InferenceSettings), contracts, slot=slot, metrics=metrics)


def _writer(contracts: Contracts, slot: str, metrics: ProcessMetrics) -> Worker:
    from streaming.writer import WriterSettings, WriterWorker

    return WriterWorker(build_settings(WriterSettings), contracts, slot=slot, metrics=metrics)


WORKERS: Mapping[str, Callable[[Contracts, str, ProcessMetrics], Worker]] = {
    "parser": _parser,
    "bars": _bars,
    "history-parser": _history_parser,
    "inference": _inference,
    "writer": _writer,
}
"""What can be run, by kind; a further processor is a further line."""


def _table(title: str, values: Mapping[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        if isinstance(value, Mapping):
            text = "\n".join(f"{key}: {item}" for key, item in value.items())
        else:
            text = ", ".join(value) if isinstance(value, list) else str(value)
        table.add_row(name.replace("_", " "), text)
    return table
