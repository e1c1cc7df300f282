"""`streamforge topics`: Kafka topics as their contracts say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli.common import DryRunOption, Output, OutputOption, command, emit

if TYPE_CHECKING:
    from streamforge.contracts import Contract
    from streamforge.topics import TopicPlan

app = typer.Typer(help="List, describe and create the topics that the contracts ask for.", no_args_is_help=True)

_DAY_MS = 86_400_000


@app.command("list")
@command
def list_topics(*, output: OutputOption = Output.TEXT) -> int:
    """List every topic that has a contract, and whether the cluster has it as the contract says.

    Example: streamforge topics list
    """
    from streamforge.contracts import load_contracts
    from streamforge.settings import load_settings
    from streamforge.topics import plan_topics

    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    _show(plan_topics(settings, contracts), output, columns=_LIST_WORDS)
    return 0


@app.command()
@command
def describe(
    contract_id: Annotated[str, typer.Argument(help="Id of the contract, for instance trades.")],
    *,
    output: OutputOption = Output.TEXT,
) -> int:
    """Describe one topic: what its contract says of it, and how the live topic differs.

    Example: streamforge topics describe trades
    """
    from streamforge.contracts import load_contracts
    from streamforge.settings import load_settings
    from streamforge.topics import plan_topics

    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    contract = contracts[contract_id]
    change = plan_topics(settings, contracts, [contract_id]).changes[0]
    result = {**_contract_dict(contract), "live": change.as_dict()}
    emit(result, output, lambda: _render_one(result))
    return 0


@app.command()
@command
def create(
    contract_ids: Annotated[
        list[str] | None, typer.Argument(help="Ids of contracts; none given means all.", show_default=False)
    ] = None,
    *,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Create missing topics and alter settings that differ; nothing is done if one topic must be refused.

    Examples: streamforge topics create --dry-run, streamforge topics create trades bars
    """
    from streamforge.contracts import load_contracts
    from streamforge.settings import load_settings
    from streamforge.topics import create_topics, plan_topics, require_applicable

    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    if dry_run:
        plan = plan_topics(settings, contracts, contract_ids or None)
        _show(plan, output, columns=_PLAN_WORDS)
        require_applicable(plan)
    else:
        _show(create_topics(settings, contracts, contract_ids or None), output, columns=_DONE_WORDS)
    return 0


_LIST_WORDS = {"create": "missing", "alter": "differs", "keep": "as its contract says", "refuse": "CONFLICT"}
_PLAN_WORDS = {"create": "would create", "alter": "would alter", "keep": "nothing to do", "refuse": "REFUSED"}
_DONE_WORDS = {"create": "created", "alter": "altered", "keep": "nothing to do", "refuse": "REFUSED"}


def _show(plan: TopicPlan, output: Output, *, columns: dict[str, str]) -> None:
    emit(plan.as_dict(), output, lambda: _render(plan, columns))


def _render(plan: TopicPlan, words: dict[str, str]) -> Group:
    table = Table("contract", "topic", "partitions", "state")
    for change in plan.changes:
        differing = ", ".join(f"{name}: {found} -> {wanted}" for name, (found, wanted) in change.config.items())
        state = words[str(change.action)] + (f" ({differing})" if differing and str(change.action) == "alter" else "")
        table.add_row(change.contract_id, change.topic, str(change.add_partitions_to or change.partitions), state)
    return Group(table, *(Text(change.refusal, style="red") for change in plan.changes if change.refusal))


def _contract_dict(contract: Contract) -> dict[str, Any]:
    topic = contract.topic
    return {
        "contract": contract.id,
        "version": contract.version,
        "owner": contract.owner,
        "purpose": contract.purpose,
        "compatibility": contract.compatibility,
        "freshness_s": contract.freshness_s,
        "topic": None if topic is None else topic.name,
        "key": [] if topic is None else list(topic.key),
        "partitions": None if topic is None else topic.partitions,
        "cleanup_policy": None if topic is None else topic.cleanup_policy,
        "retention_days": None if topic is None or topic.retention_ms < 0 else topic.retention_ms / _DAY_MS,
        "encoding": None if topic is None else str(topic.encoding),
        "fields": [
            {"name": field.name, "type": field.type_name, "required": field.required, "description": field.description}
            for field in contract.fields
        ],
    }


def _render_one(result: dict[str, Any]) -> Group:
    head = Table(show_header=False, box=None)
    for name, value in result.items():
        if name not in ("fields", "live") and value is not None:
            head.add_row(name, Text(", ".join(value) if isinstance(value, list) else str(value)))
    live = result["live"]
    head.add_row("cluster", _LIST_WORDS[live["action"]])
    for name, values in live["config"].items():
        head.add_row("", f"{name}: found {values['found']}, contract says {values['expected']}")
    fields = Table("field", "type", "required", "description")
    for field in result["fields"]:
        fields.add_row(field["name"], field["type"], "yes" if field["required"] else "", Text(field["description"]))
    return Group(head, fields, Text(live["refusal"], style="red"))
