"""What must hold inside one contract, beyond what the standard's own schema says. Pure.

`structural_problems` are those that would make a schema, topic or table impossible: `load_contracts` refuses
them. `style_problems` are the rest of what `streamforge contracts lint` asks for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from streamforge.contract_model import (
    FIRST_PARTITION_FIELD_ID,
    Contract,
    ContractField,
    Contracts,
    Encoding,
    FieldSource,
    iceberg_type,
    json_type,
)

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_DERIVABLE = {("timestamptz", "long"), ("int", "string")}


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule.

    Args:
        field: the field it stands at, None where it is about the contract.
        rule: short name, for instance `field-id-unique`.
    """

    field: str | None
    rule: str
    message: str


def structural_problems(contract: Contract) -> Iterator[Problem]:
    """Yield what makes the contract's schemas, topic or table impossible."""
    yield from _duplicates(contract)
    for item in contract.fields:
        yield from _field_structure(contract, item)
    yield from _references(contract)


def style_problems(contract: Contract) -> Iterator[Problem]:
    """Yield what readers of the contract would miss."""
    if not contract.owner:
        yield Problem(None, "owner", "team.name must name the owner")
    if not contract.purpose:
        yield Problem(None, "purpose", "description.purpose must say what the product is for")
    if not _VERSION.fullmatch(contract.version):
        yield Problem(None, "version", f"version must look like 1.2.3, found {contract.version!r}")
    for item in contract.own_fields:
        if not item.description.strip():
            yield Problem(item.name, "description", "needs a description")
        elif not item.description.strip().endswith("."):
            yield Problem(item.name, "description", "description must end with a full stop")
    if contract.topic is not None:
        yield from _topic_style(contract)
    yield from _quality_style(contract)


def input_problems(contracts: Contracts) -> Iterator[tuple[Contract, Problem]]:
    """Yield each topic.inputs that names no product with a topic."""
    for contract in contracts.values():
        for name in contract.inputs:
            if name not in contracts or contracts[name].topic is None:
                yield contract, Problem(None, "input-exists", f"topic.inputs names {name!r}, which has no topic")


def dlq_problems(contracts: Contracts) -> Iterator[tuple[Contract, Problem]]:
    """Yield each product that has no dead-letter topic, and each dead-letter topic of nothing."""
    for contract in contracts.values():
        origin = contract.id.removesuffix(".dlq")
        if origin == contract.id:
            if contract.topic and contract.table and f"{contract.id}.dlq" not in contracts:
                message = f"topic.appliesTo of the dead-letter contract must name {contract.id}: its table is fed by it"
                yield contract, Problem(None, "dlq-complete", message)
        elif origin not in contracts or contracts[origin].topic is None:
            yield contract, Problem(None, "dlq-of-nothing", f"topic.appliesTo names {origin!r}, which has no topic")


def _duplicates(contract: Contract) -> Iterator[Problem]:
    for name, count in Counter(item.name for item in contract.fields).items():
        if count > 1:
            yield Problem(name, "field-name-unique", f"{count} fields are called {name!r}")
    by_id: dict[int, str] = {}
    for item in contract.fields:
        if item.field_id is None:
            continue
        if item.field_id in by_id:
            message = f"fieldId {item.field_id} is already that of {by_id[item.field_id]!r}; take a new one"
            yield Problem(item.name, "field-id-unique", message)
        by_id.setdefault(item.field_id, item.name)


def _field_structure(contract: Contract, item: ContractField) -> Iterator[Problem]:
    if contract.table is not None and item.field_id is None:
        yield Problem(item.name, "field-id", "a field of a table needs a fieldId")
    if item.field_id is not None and item.field_id >= FIRST_PARTITION_FIELD_ID:
        message = (
            f"fieldId {item.field_id} must be below {FIRST_PARTITION_FIELD_ID}, where Iceberg's partition ids begin"
        )
        yield Problem(item.name, "field-id", message)
    if contract.table is not None and iceberg_type(item.type_name) is None:
        yield Problem(item.name, "table-type", f"a table cannot hold physicalType {item.type_name!r}")
    if contract.topic is not None and item.on_wire and json_type(item.type_name) is None:
        message = f"physicalType {item.type_name!r} cannot stand in a JSON value; give the field another `from`"
        yield Problem(item.name, "wire-type", message)
    if (item.source is FieldSource.DERIVED) != (item.derived_from is not None):
        yield Problem(item.name, "derived-from", "`from: derived` and derivedFrom need each other")
    if item.derived_from is not None:
        origin = next((other for other in contract.fields if other.name == item.derived_from), None)
        if origin is None:
            yield Problem(item.name, "derived-from", f"derivedFrom names {item.derived_from!r}, which does not exist")
        elif (item.type_name, origin.type_name) not in _DERIVABLE:
            message = (
                f"{item.type_name} cannot be derived from {origin.type_name}: timestamptz from long, int from string"
            )
            yield Problem(item.name, "derived-from", message)


def _references(contract: Contract) -> Iterator[Problem]:
    names = {item.name for item in contract.fields}
    topic, table = contract.topic, contract.table
    asked = [("topic.key", name) for name in (topic.key if topic else ())]
    asked += [("table.latestBy", name) for name in (table.latest_by if table else ())]
    asked += [("table.partitionBy", name) for _, name in (table.partition_by if table else ())]
    for where, name in asked:
        if name not in names:
            yield Problem(None, "field-exists", f"{where} names {name!r}, which is not a field")
    types = {item.name: item.type_name for item in contract.fields}
    for transform, name in table.partition_by if table else ():
        if transform != "identity" and types.get(name, "timestamptz") != "timestamptz":
            message = f"table.partitionBy {transform}({name}) needs a timestamptz, found {types[name]}"
            yield Problem(name, "partition-type", message)


def _topic_style(contract: Contract) -> Iterator[Problem]:
    topic = contract.topic
    if topic is None:
        return
    if not topic.key:
        yield Problem(None, "topic-key", "topic.key must name the fields of the record key: order is kept within a key")
    if topic.cleanup_policy == "delete" and topic.retention_ms < 0:
        yield Problem(None, "retention", "a topic that deletes needs slaProperties retention, in days")
    if topic.encoding is Encoding.BYTES:
        for item in contract.own_fields:
            if item.on_wire:
                message = "the value is bytes: say `from: key`, header, payload or derived"
                yield Problem(item.name, "bytes-topic", message)


def _quality_style(contract: Contract) -> Iterator[Problem]:
    names = {item.name for item in contract.fields}
    for rule_id, count in Counter(rule.id for rule in contract.quality).items():
        if count > 1:
            yield Problem(None, "quality-id", f"{count} quality rules have the id {rule_id!r}")
    for rule in contract.quality:
        if (rule.metric is None) == (rule.query is None):
            yield Problem(rule.field, "quality-kind", f"quality rule {rule.id!r} needs either metric or query")
        if rule.query is not None and "{table}" not in rule.query:
            yield Problem(rule.field, "quality-query", f"query of quality rule {rule.id!r} must read from {{table}}")
        for name in rule.arguments.get("properties", ()):
            if name not in names:
                message = f"quality rule {rule.id!r} names {name!r}, which is not a field"
                yield Problem(rule.field, "quality-field", message)
