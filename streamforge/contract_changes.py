"""What changed between two versions of the contracts, and which of it readers or data would not survive.

A change is breaking when something written before cannot be read by the new version, or something written
from now on cannot be read by the old one, or when records already lie where the old setting put them:

| what | class |
|---|---|
| new optional field, new contract, description, owner, retention, quality | compatible |
| wider type (int to long, decimal of more digits and the same scale), new enum value | compatible, readers first |
| field removed, renamed, its id changed or given to another field | breaking |
| type narrowed or changed, optional to required or back, new required field, enum value removed | breaking |
| source of a field (`from`, derivedFrom), primary key | breaking |
| topic removed, key, encoding, partition count of a keyed topic, compaction, transactional off | breaking |
| table removed, renamed, its partition spec, latestBy | breaking |
| anything changed and the version not raised; compatibility lowered | breaking |

A changed partition spec counts as breaking although Iceberg can evolve one: replays, maintenance and partition
keys plan by the spec, and old files keep the old one, so it is a migration and not an edit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyiceberg.schema import Schema
from pyiceberg.table import Table

from streamforge.contract_model import (
    Compatibility,
    Contract,
    ContractField,
    Contracts,
    TableSettings,
    TopicSettings,
)
from streamforge.errors import BreakingChangeError
from streamforge.topics import TopicAction, TopicPlan

_DECIMAL = re.compile(r"decimal\((\d+),\s*(\d+)\)")


@dataclass(frozen=True, slots=True)
class Change:
    """One difference.

    Args:
        where: what it is about: a field's name, `topic`, `table` or `contract`.
        kind: short name, for instance `field_removed`.
    """

    contract_id: str
    where: str
    kind: str
    detail: str
    breaking: bool

    def __str__(self) -> str:
        return f"{self.contract_id}, {self.where}: {self.kind}: {self.detail}"

    def as_dict(self) -> dict[str, Any]:
        """Return the change as plain values for a JSON report."""
        return {
            "contract": self.contract_id,
            "where": self.where,
            "kind": self.kind,
            "detail": self.detail,
            "breaking": self.breaking,
        }


@dataclass(frozen=True, slots=True)
class FieldShape:
    """What a comparison looks at in one field; None where that side cannot know it."""

    name: str
    field_id: int | None
    type_name: str
    required: bool
    description: str
    enum: frozenset[str] | None = None
    source: tuple[str, str | None] | None = None


def require_compatible(changes: Iterable[Change]) -> None:
    """Refuse breaking changes.

    Raises:
        BreakingChangeError: names each of them.
    """
    breaking = [str(change) for change in changes if change.breaking]
    if breaking:
        msg = (
            f"{len(breaking)} breaking change{'s' if len(breaking) > 1 else ''}: {'; '.join(breaking)}. "
            "Keep the old form beside the new one, or make a new contract and move readers over"
        )
        raise BreakingChangeError(msg)


def compare_contracts(old: Contracts, new: Contracts) -> list[Change]:
    """Return what changed between two versions of all contracts."""
    before, after = {**old, **old.fragments}, {**new, **new.fragments}
    changes = [
        Change(contract_id, "contract", "contract_removed", "readers lose it", breaking=True)
        for contract_id in before.keys() - after.keys()
    ]
    changes += [
        Change(contract_id, "contract", "contract_added", f"version {after[contract_id].version}", breaking=False)
        for contract_id in after.keys() - before.keys()
    ]
    for contract_id in before.keys() & after.keys():
        changes += compare_contract(before[contract_id], after[contract_id])
    return sorted(changes, key=lambda change: (not change.breaking, change.contract_id, change.where, change.kind))


def compare_contract(old: Contract, new: Contract) -> list[Change]:
    """Return what changed between two versions of one contract, provenance fields left out."""
    changes = [
        *_about(old.id, compare_fields([_shape(f) for f in old.own_fields], [_shape(f) for f in new.own_fields])),
        *_about(old.id, _compare_topic(old.topic, new.topic)),
        *_about(old.id, _compare_table(old.table, new.table)),
        *_about(old.id, _compare_terms(old, new)),
    ]
    if old.compatibility is Compatibility.NONE:
        changes = [_forgiven(change) for change in changes]
    if changes and _version(new.version) <= _version(old.version):
        detail = f"version is {new.version} and was {old.version} before; raise it"
        changes.append(Change(old.id, "contract", "version_not_raised", detail, breaking=True))
    return changes


def compare_with_table(contract: Contract, table: Table) -> list[Change]:
    """Return what the contract changes in its live table; ids of dropped columns are never taken again."""
    live = table.schema()
    old = _schema_shapes(live)
    new = [_schema_shape(item) for item in contract.fields]
    changes = list(_about(contract.id, compare_fields(old, new)))
    present = {item.field_id for item in live.fields}
    earlier = {item.field_id: item.name for schema in table.schemas().values() for item in schema.fields}
    for item in contract.fields:
        if item.field_id in earlier and item.field_id not in present:
            detail = f"fieldId {item.field_id} was that of {earlier[item.field_id]!r}; ids are never taken again"
            changes.append(Change(contract.id, item.name, "field_id_reused", detail, breaking=True))
    spec = [(str(field.transform), field.source_id) for field in table.spec().fields]
    wanted = [(str(field.transform), field.source_id) for field in contract.partition_spec.fields]
    if spec != wanted:
        detail = f"from {_spec_text(spec, live)} to {_spec_text(wanted, contract.iceberg_schema)}"
        changes.append(Change(contract.id, "table", "partition_spec_changed", detail, breaking=True))
    return changes


def compare_with_topics(plan: TopicPlan) -> list[Change]:
    """Return what the contracts change in the live topics."""
    changes = []
    for item in plan.changes:
        if item.action is TopicAction.CREATE:
            detail = f"{item.topic} with {item.partitions} topic-partitions"
            changes.append(Change(item.contract_id, "topic", "topic_added", detail, breaking=False))
        elif item.action is TopicAction.REFUSE:
            changes.append(Change(item.contract_id, "topic", "topic_changed", item.refusal, breaking=True))
        elif item.action is TopicAction.ALTER:
            parts = [f"{name} from {found} to {expected}" for name, (found, expected) in item.config.items()]
            if item.add_partitions_to:
                parts.append(f"partitions from {item.partitions} to {item.add_partitions_to}")
            changes.append(Change(item.contract_id, "topic", "topic_changed", ", ".join(parts), breaking=False))
    return changes


def compare_fields(old: Sequence[FieldShape], new: Sequence[FieldShape]) -> Iterator[Change]:
    """Yield what changed in the fields; those with ids are matched by id, the others by name."""
    new_by_id = {item.field_id: item for item in new if item.field_id is not None}
    new_by_name = {item.name: item for item in new}
    old_names = {item.name for item in old}
    met: set[str] = set()
    for before in old:
        after = new_by_name.get(before.name)
        same_id = new_by_id.get(before.field_id) if before.field_id is not None else None
        if after is not None:
            met.add(after.name)
            if before.field_id is not None and before.field_id != after.field_id:
                detail = f"fieldId from {before.field_id} to {after.field_id}; an id stays with its field"
                yield _field(before, "field_id_changed", detail, breaking=True)
            yield from _compare_field(before, after)
        elif same_id is None:
            yield _field(before, "field_removed", "readers and old rows still have it", breaking=True)
        elif same_id.type_name == before.type_name and same_id.name not in old_names:
            met.add(same_id.name)
            yield _field(before, "field_renamed", f"to {same_id.name!r} (fieldId {before.field_id})", breaking=True)
        else:
            met.add(same_id.name)
            detail = f"fieldId {before.field_id} is now {same_id.name!r}; an id is never given to another field"
            yield _field(before, "field_id_reused", detail, breaking=True)
    for added in new:
        if added.name not in met and added.name not in old_names:
            kind = "required_field_added" if added.required else "field_added"
            detail = f"{'required' if added.required else 'optional'} {added.type_name}"
            if added.required:
                detail += "; old rows and records do not have it"
            yield _field(added, kind, detail, breaking=added.required)


def is_promotion(old: str, new: str) -> bool:
    """Return whether Iceberg lets a column of type `old` become `new`: every old value stays what it is."""
    if (old, new) == ("int", "long"):
        return True
    before, after = _DECIMAL.fullmatch(old), _DECIMAL.fullmatch(new)
    return bool(before and after and before[2] == after[2] and int(after[1]) > int(before[1]))


def _compare_field(old: FieldShape, new: FieldShape) -> Iterator[Change]:
    if _normal(old.type_name) != _normal(new.type_name):
        detail = f"from {old.type_name} to {new.type_name}"
        if is_promotion(old.type_name, new.type_name):
            yield _field(old, "type_widened", f"{detail}; update readers before writers", breaking=False)
        else:
            yield _field(old, "type_changed", detail, breaking=True)
    if new.required and not old.required:
        yield _field(old, "became_required", "old rows and records may lack it", breaking=True)
    if old.required and not new.required:
        yield _field(old, "became_optional", "readers count on a value", breaking=True)
    if old.source is not None and new.source is not None and old.source != new.source:
        yield _field(old, "source_changed", f"from {_source_text(old)} to {_source_text(new)}", breaking=True)
    if old.enum is not None and new.enum is not None and old.enum != new.enum:
        yield from _compare_enum(old, old.enum, new.enum)
    if old.description != new.description:
        yield _field(old, "description_changed", f"to {new.description!r}", breaking=False)


def _compare_enum(shape: FieldShape, old: frozenset[str], new: frozenset[str]) -> Iterator[Change]:
    if not old:
        yield _field(shape, "enum_added", f"only {', '.join(sorted(new))} are left", breaking=True)
    elif not new:
        yield _field(shape, "enum_dropped", "any value is allowed; update readers before writers", breaking=False)
    else:
        if old - new:
            yield _field(shape, "enum_value_removed", ", ".join(sorted(old - new)), breaking=True)
        if new - old:
            detail = f"{', '.join(sorted(new - old))}; update readers before writers"
            yield _field(shape, "enum_value_added", detail, breaking=False)


def _compare_topic(old: TopicSettings | None, new: TopicSettings | None) -> Iterator[Change]:
    if old is None or new is None:
        yield from _appeared("topic", old.name if old else None, new.name if new else None)
        return
    if old.key != new.key:
        detail = f"from {', '.join(old.key) or 'none'} to {', '.join(new.key) or 'none'}"
        yield _change("topic", "topic_key_changed", detail, breaking=True)
    if old.partitions != new.partitions:
        keyed = bool(old.key or new.key) or new.partitions < old.partitions
        detail = f"from {old.partitions} to {new.partitions}" + ("; a key's records would lose their order" * keyed)
        yield _change("topic", "partition_count_changed", detail, breaking=keyed)
    terms = (
        "encoding",
        "cleanup_policy",
        "transactional",
        "retention_ms",
        "max_message_bytes",
        "min_compaction_lag_ms",
    )
    for name in terms:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            breaking = name == "encoding" or (name == "transactional" and before)
            breaking |= name == "cleanup_policy" and "compact" in f"{before}{after}"
            yield _change("topic", f"{name}_changed", f"from {before} to {after}", breaking=breaking)


def _appeared(what: str, old: str | None, new: str | None) -> Iterator[Change]:
    if old is not None:
        yield _change(what, f"{what}_removed", old, breaking=True)
    if new is not None:
        yield _change(what, f"{what}_added", new, breaking=False)


def _compare_table(old: TableSettings | None, new: TableSettings | None) -> Iterator[Change]:
    if old is None or new is None:
        yield from _appeared("table", old.name if old else None, new.name if new else None)
        return
    if old.name != new.name:
        yield _change("table", "table_renamed", f"from {old.name} to {new.name}", breaking=True)
    if old.partition_by != new.partition_by:
        before, after = ([f"{t}({f})" for t, f in side.partition_by] for side in (old, new))
        detail = f"from {', '.join(before) or 'none'} to {', '.join(after) or 'none'}"
        yield _change("table", "partition_spec_changed", detail, breaking=True)
    if old.latest_by != new.latest_by:
        detail = f"from {', '.join(old.latest_by) or 'none'} to {', '.join(new.latest_by) or 'none'}"
        yield _change("table", "latest_by_changed", detail, breaking=True)


def _compare_terms(old: Contract, new: Contract) -> Iterator[Change]:
    if old.primary_key != new.primary_key:
        detail = f"from {', '.join(old.primary_key) or 'none'} to {', '.join(new.primary_key) or 'none'}"
        yield _change("contract", "primary_key_changed", detail, breaking=True)
    if old.compatibility != new.compatibility:
        lowered = new.compatibility is Compatibility.NONE
        detail = f"from {old.compatibility} to {new.compatibility}"
        yield _change("contract", "compatibility_changed", detail, breaking=lowered)
    for name in ("owner", "purpose", "limitations", "freshness_s", "inputs"):
        if getattr(old, name) != getattr(new, name):
            detail = f"from {getattr(old, name)!r} to {getattr(new, name)!r}"
            yield _change("contract", f"{name}_changed", detail, breaking=False)
    before, after = {rule.id: rule for rule in old.quality}, {rule.id: rule for rule in new.quality}
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        yield _change("contract", "quality_changed", ", ".join(changed), breaking=False)
    ranges = sorted(item.name for item in new.own_fields if item.options != _options(old, item.name))
    if ranges:
        yield _change("contract", "ranges_changed", ", ".join(ranges), breaking=False)


def _options(contract: Contract, name: str) -> Mapping[str, Any]:
    return next((item.options for item in contract.own_fields if item.name == name), {})


_FORGIVABLE = {"field_removed", "type_changed", "became_required", "became_optional", "required_field_added"}
_FORGIVABLE |= {"enum_added", "enum_value_removed", "source_changed", "field_renamed"}


def _forgiven(change: Change) -> Change:
    """Return the change as a contract with compatibility `none` sees it: its fields may change, no more."""
    breaking = change.breaking and change.kind not in _FORGIVABLE
    return Change(change.contract_id, change.where, change.kind, change.detail, breaking)


def _about(contract_id: str, changes: Iterable[Change]) -> Iterator[Change]:
    for change in changes:
        yield Change(contract_id, change.where, change.kind, change.detail, change.breaking)


def _change(where: str, kind: str, detail: str, *, breaking: bool) -> Change:
    return Change("", where, kind, detail, breaking)


def _field(shape: FieldShape, kind: str, detail: str, *, breaking: bool) -> Change:
    return Change("", shape.name, kind, detail, breaking)


def _shape(item: ContractField) -> FieldShape:
    return FieldShape(
        name=item.name,
        field_id=item.field_id,
        type_name=item.type_name,
        required=item.required,
        description=item.description,
        enum=frozenset(item.enum),
        source=(str(item.source), item.derived_from),
    )


def _schema_shape(item: ContractField) -> FieldShape:
    return FieldShape(item.name, item.field_id, item.type_name, item.required, item.description)


def _schema_shapes(schema: Schema) -> list[FieldShape]:
    return [FieldShape(f.name, f.field_id, str(f.field_type), f.required, f.doc or "") for f in schema.fields]


def _normal(type_name: str) -> str:
    return type_name.replace(" ", "")


def _source_text(shape: FieldShape) -> str:
    source, derived_from = shape.source or ("", None)
    return f"{source} of {derived_from}" if derived_from else source


def _spec_text(spec: list[tuple[str, int]], schema: Schema) -> str:
    return ", ".join(f"{transform}({schema.find_column_name(source)})" for transform, source in spec) or "none"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
