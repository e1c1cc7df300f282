"""`streamforge contracts`: lint, compare, show and apply the contracts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from cli.common import DryRunOption, Output, OutputOption, command, emit
from streamforge.contract_changes import (
    Change,
    compare_contracts,
    compare_with_topics,
    require_compatible,
)
from streamforge.contract_forms import Form, contract_form
from streamforge.contract_lint import lint_folder
from streamforge.contract_revisions import contracts_at
from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.catalog import open_catalog
from streamforge.lakehouse.evolution import apply_tables, plan_tables
from streamforge.settings import Settings, load_settings
from streamforge.topics import create_topics, plan_topics, require_applicable

app = typer.Typer(help="Lint, compare, show and apply data contracts.", no_args_is_help=True)

FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="Folder with the contract files. Default: the setting contracts_dir.")
]
IdArgument = Annotated[str, typer.Argument(help="Contract id, for instance trades or trades.dlq.")]


@app.command()
@command
def lint(*, folder: FolderOption = None, output: OutputOption = Output.TEXT) -> int:
    """Check the contract files against the standard and our rules; exit code 1 with findings.

    Example: streamforge contracts lint --output json
    """
    settings = _settings(folder)
    report = lint_folder(settings.contracts_dir)
    result = {
        "files": report.files,
        "findings": [
            {"file": f.file, "line": f.line, "place": f.place, "rule": f.rule, "message": f.message}
            for f in report.findings
        ],
    }

    def render() -> Any:
        if not report.findings:
            return f"[green]{report.files} contract files, nothing found[/green]"
        table = Table("where", "place", "rule", "finding", title=f"{len(report.findings)} findings")
        for finding in report.findings:
            where = f"{Path(finding.file).name}:{finding.line}"
            table.add_row(*map(Text, (where, finding.place, finding.rule, finding.message)))
        return table

    emit(result, output, render)
    return 1 if report.findings else 0


@app.command()
@command
def diff(
    *,
    folder: FolderOption = None,
    revision: Annotated[
        str, typer.Option("--revision", help="Git revision to compare the working files with.")
    ] = "HEAD",
    live: Annotated[bool, typer.Option("--live", help="Compare with the live topics and tables instead.")] = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """List what the working files change; exit code 1 and the names of breaking changes, if there are any.

    Examples: streamforge contracts diff --revision main; streamforge contracts diff --live
    """
    settings = _settings(folder)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    if live:
        changes = _live_changes(settings, contracts)
    else:
        before = contracts_at(settings.contracts_dir, revision, topic_prefix=settings.topic_prefix)
        changes = compare_contracts(before, contracts)
    against = "live topics and tables" if live else revision
    breaking = [change for change in changes if change.breaking]
    result = {"against": against, "breaking": len(breaking), "changes": [change.as_dict() for change in changes]}
    emit(result, output, lambda: _changes_table(changes, f"against {against}"))
    if output is Output.TEXT:
        require_compatible(changes)
    return 1 if breaking else 0


@app.command()
@command
def apply(*, folder: FolderOption = None, dry_run: DryRunOption = False, output: OutputOption = Output.TEXT) -> None:
    """Create missing topics and tables and evolve those that differ; refuse everything when one change is breaking.

    Example: streamforge contracts apply --dry-run
    """
    settings = _settings(folder)
    report = lint_folder(settings.contracts_dir)
    if report.findings:
        msg = f"the contracts have {len(report.findings)} findings, first: {report.findings[0]}. Mend them first"
        raise ConfigurationError(msg)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    catalog = open_catalog(settings)
    topics, tables = plan_topics(settings, contracts), plan_tables(catalog, settings, contracts)
    require_applicable(topics)
    require_compatible(change for plan in tables for change in plan.changes)
    if not dry_run:
        create_topics(settings, contracts)
        apply_tables(catalog, settings, tables)
    result = {"dry_run": dry_run, **topics.as_dict(), "tables": [plan.as_dict() for plan in tables]}

    def render() -> Any:
        table = Table("kind", "name", "action", "detail", title="would be done" if dry_run else "done")
        for item in result["topics"]:
            detail = ", ".join(item["config"]) if item["action"] == "alter" else f"{item['partitions']} partitions"
            table.add_row(*map(Text, ("topic", item["topic"], item["action"], detail)))
        for item in result["tables"]:
            detail = "; ".join(f"{change['where']}: {change['kind']}" for change in item["changes"])
            table.add_row(*map(Text, ("table", item["table"], item["action"], detail)))
        return table

    emit(result, output, render)


@app.command()
@command
def show(
    contract_id: IdArgument,
    *,
    form: Annotated[Form, typer.Option("--format", help="What to show of the contract.")] = Form.ODCS,
    folder: FolderOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show a contract, or one of the schemas that follow from it.

    Example: streamforge contracts show trades --format json-schema
    """
    settings = _settings(folder)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    value = contract_form(contracts[contract_id], form)
    as_yaml = form is Form.ODCS
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True) if as_yaml else json.dumps(value, indent=2)
    emit(value, output, lambda: Syntax(text, "yaml" if as_yaml else "json", background_color="default"))


@app.command()
@command
def export(
    target: Annotated[Path, typer.Argument(help="Folder that gets one file a contract; made when absent.")],
    *,
    form: Annotated[Form, typer.Option("--format", help="What to export.")] = Form.JSON_SCHEMA,
    folder: FolderOption = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Write one form of every contract that has it to a folder.

    Example: streamforge contracts export schemas --format json-schema --dry-run
    """
    settings = _settings(folder)
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    files = {}
    for contract in contracts.values():
        if form.exists_for(contract):
            path = target / f"{contract.id}.{form}.json"
            files[path] = json.dumps(contract_form(contract, form), indent=2) + "\n"
    try:
        if not dry_run:
            target.mkdir(parents=True, exist_ok=True)
            for path, text in files.items():
                path.write_text(text, encoding="utf-8")
    except OSError as error:
        msg = f"cannot write to {target}: {error.strerror}. Choose another folder"
        raise ConfigurationError(msg) from error
    paths = [str(path) for path in files]
    emit({"dry_run": dry_run, "files": paths}, output, lambda: Text("\n".join(paths)))


def _settings(folder: Path | None) -> Settings:
    return load_settings() if folder is None else load_settings(contracts_dir=folder)


def _live_changes(settings: Settings, contracts: Contracts) -> list[Change]:
    changes = compare_with_topics(plan_topics(settings, contracts))
    for plan in plan_tables(open_catalog(settings), settings, contracts):
        changes += plan.changes
        if not plan.exists:
            changes.append(Change(plan.contract.id, "table", "table_added", plan.table, breaking=False))
    return sorted(changes, key=lambda change: not change.breaking)


def _changes_table(changes: list[Change], title: str) -> Any:
    if not changes:
        return f"[green]no changes {title}[/green]"
    table = Table("contract", "where", "change", "detail", title=f"{len(changes)} changes {title}")
    for change in changes:
        kind = Text(change.kind, style="red" if change.breaking else "green")
        table.add_row(Text(change.contract_id), Text(change.where), kind, Text(change.detail))
    return table
