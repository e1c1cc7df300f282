"""Evolve Iceberg tables to their contracts, beside live writers.

PyIceberg's `update_schema` gives a new column the next free id; the contract says which id a field has. So
the new schema is built here, by field id, and sent as one commit that asserts the schema it was built on.
Such a commit carries no property and no table snapshot: it cannot touch the positions of a live writer, and
the writer's own compare-and-set on `main` is not disturbed. Rows written before read as null in the new column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import stamina
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.update import (
    AddSchemaUpdate,
    AssertCurrentSchemaId,
    AssertLastAssignedFieldId,
    AssertTableUUID,
    SetCurrentSchemaUpdate,
)
from pyiceberg.types import NestedField

from streamforge.contract_changes import Change, compare_with_table, require_compatible
from streamforge.contracts import Contract, Contracts
from streamforge.errors import CommitConflictError
from streamforge.lakehouse.catalog import CATALOG_ERRORS, ensure_table, table_identifier
from streamforge.settings import Settings

_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class TablePlan:
    """What one table needs to have its contract's shape."""

    contract: Contract
    table: str
    exists: bool
    changes: tuple[Change, ...]

    @property
    def is_empty(self) -> bool:
        """Return whether the table already has the contract's shape."""
        return self.exists and not self.changes

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for a JSON report."""
        action = "keep" if self.is_empty else "evolve" if self.exists else "create"
        return {
            "contract": self.contract.id,
            "table": self.table,
            "action": action,
            "changes": [change.as_dict() for change in self.changes],
        }


def plan_tables(
    catalog: Catalog, settings: Settings, contracts: Contracts, ids: Iterable[str] | None = None
) -> list[TablePlan]:
    """Compare the tables of the contracts (all, or those of `ids` that have one) with the catalog; change nothing."""
    chosen = contracts.with_table if ids is None else tuple(c for c in map(contracts.__getitem__, ids) if c.table)
    plans = []
    for contract in chosen:
        identifier = table_identifier(settings, contract)
        table = _load(catalog, identifier)
        changes = () if table is None else tuple(compare_with_table(contract, table))
        plans.append(TablePlan(contract, ".".join(identifier), table is not None, changes))
    return plans


def apply_tables(catalog: Catalog, settings: Settings, plans: Sequence[TablePlan]) -> None:
    """Create the tables that are absent and evolve those that differ; refuse all when one change is breaking.

    Raises:
        BreakingChangeError: names every breaking change; nothing was changed.
        CommitConflictError: other commits won every time; run it again.
    """
    require_compatible(change for plan in plans for change in plan.changes)
    for plan in plans:
        if not plan.exists:
            ensure_table(catalog, settings, plan.contract)
        elif plan.changes:
            evolve_table(catalog, table_identifier(settings, plan.contract), plan.contract)


def evolve_table(catalog: Catalog, identifier: tuple[str, str], contract: Contract) -> bool:
    """Give a live table the contract's fields in one commit; return False where it has them already.

    An attempt of unknown outcome is looked at like a conflict: the table is loaded again, and when the fields
    are there, the commit has landed.

    Raises:
        BreakingChangeError: the live table cannot become the contract.
        CommitConflictError: other commits won every time.
    """
    changed = False
    for attempt in stamina.retry_context(on=CommitConflictError, attempts=_ATTEMPTS, wait_initial=0.05, wait_max=1.0):
        with attempt:
            table = catalog.load_table(identifier)
            changes = compare_with_table(contract, table)
            require_compatible(changes)
            if not changes:
                return changed
            changed = True
            _send(catalog, table, evolved_schema(table, contract))
    return changed


def evolved_schema(table: Table, contract: Contract) -> Schema:
    """Return the live schema with the contract's fields in it, by field id, under the next schema id."""
    live = table.schema()
    wanted = {field.field_id: field for field in contract.iceberg_schema.fields}
    fields: list[NestedField] = [wanted.pop(field.field_id, field) for field in live.fields]
    return Schema(
        *fields,
        *wanted.values(),
        schema_id=max(table.schemas()) + 1,
        identifier_field_ids=live.identifier_field_ids,
    )


def _send(catalog: Catalog, table: Table, schema: Schema) -> None:
    metadata = table.metadata
    requirements = (
        AssertTableUUID(uuid=metadata.table_uuid),
        AssertCurrentSchemaId.model_validate({"current-schema-id": metadata.current_schema_id}),
        AssertLastAssignedFieldId.model_validate({"last-assigned-field-id": metadata.last_column_id}),
    )
    updates = (
        AddSchemaUpdate(schema=schema),
        SetCurrentSchemaUpdate.model_validate({"schema-id": schema.schema_id}),
    )
    try:
        catalog.commit_table(table, requirements, updates)
    except CATALOG_ERRORS as error:
        name = ".".join(table.name())
        msg = f"table {name}: the new schema did not land, or it is not known whether it did: {error}"
        raise CommitConflictError(msg) from error


def _load(catalog: Catalog, identifier: tuple[str, str]) -> Table | None:
    try:
        return catalog.load_table(identifier)
    except NoSuchTableError:
        return None
