"""The data contract as values, and every schema that follows from one: Arrow, Iceberg, JSON, topic settings.

Read contracts with `streamforge.contracts.load_contracts`; this module knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.transforms import parse_transform
from pyiceberg.types import IcebergType, NestedField

from streamforge.errors import ConfigurationError

FIRST_PARTITION_FIELD_ID = 1000
_ICEBERG_PRIMITIVES = {"string", "int", "long", "boolean", "double", "binary", "timestamptz"}
_JSON_RANGES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_JSON_TYPES: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "int": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    "long": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "boolean": {"type": "boolean"},
    "double": {"type": "number"},
    "list<string>": {"type": "array", "items": {"type": "string"}},
    "map<string,string>": {"type": "object", "additionalProperties": {"type": "string"}},
    "map<string,long>": {"type": "object", "additionalProperties": {"type": "integer"}},
    "map<string,double>": {"type": "object", "additionalProperties": {"type": "number"}},
}


class Compatibility(StrEnum):
    """What a contract promises to those who read it.

    `backward`: what is written now and was written before can be read by readers of either version.
    `none`: fields may change freely; topic, table and field ids are guarded all the same.
    """

    BACKWARD = "backward"
    NONE = "none"


class FieldSource(StrEnum):
    """Where a field's value comes from when a Kafka record becomes a row."""

    VALUE = "value"
    KEY = "key"
    HEADER = "header"
    PAYLOAD = "payload"
    DERIVED = "derived"
    WRITER = "writer"


class Encoding(StrEnum):
    """How a topic's record values are written."""

    JSON = "json"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class QualityRule:
    """One rule about the rows of a table, as the standard writes it.

    Args:
        field: field that the rule stands at, None where it is about whole rows.
        metric: predefined metric (`duplicateValues`, ...), None where `query` is given.
        query: SQL with `{table}` that counts the rows that break the rule, None where `metric` is given.
        operator: how the measured number is compared, for instance `mustBe`.
        expected: what it is compared with.
    """

    id: str
    field: str | None
    metric: str | None
    query: str | None
    arguments: Mapping[str, Any]
    operator: str
    expected: Any
    severity: str
    description: str


@dataclass(frozen=True, slots=True)
class ContractField:
    """One field of a contract; `type_name` is the physical type in Iceberg's spelling.

    Args:
        options: the standard's ranges and formats, for instance `exclusiveMinimum`.
        provenance: whether the field comes from the provenance fragment, not from the contract's own file.
    """

    name: str
    type_name: str
    required: bool
    description: str
    source: FieldSource
    field_id: int | None
    derived_from: str | None
    enum: tuple[str, ...]
    options: Mapping[str, Any]
    provenance: bool = False

    @property
    def on_wire(self) -> bool:
        """Return whether the field is a member of the JSON value."""
        return self.source is FieldSource.VALUE


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """Settings of a Kafka topic that come from its contract."""

    name: str
    partitions: int
    key: tuple[str, ...]
    cleanup_policy: str
    retention_ms: int
    encoding: Encoding
    transactional: bool
    max_message_bytes: int
    min_compaction_lag_ms: int = 0

    @property
    def config(self) -> dict[str, str]:
        """Return the topic-level configuration as Kafka spells it."""
        return {
            "cleanup.policy": self.cleanup_policy,
            "retention.ms": str(self.retention_ms),
            "max.message.bytes": str(self.max_message_bytes),
            "min.compaction.lag.ms": str(self.min_compaction_lag_ms),
            "message.timestamp.type": "CreateTime",
        }


@dataclass(frozen=True, slots=True)
class TableSettings:
    """Settings of an Iceberg table that come from its contract."""

    name: str
    partition_by: tuple[tuple[str, str], ...]
    latest_by: tuple[str, ...]


@dataclass(frozen=True)
class Contract:
    """One data product: its fields, topic and table; `inputs` are the contracts that a processor makes it from."""

    id: str
    version: str
    purpose: str
    limitations: str
    owner: str
    compatibility: Compatibility
    fields: tuple[ContractField, ...]
    primary_key: tuple[str, ...]
    topic: TopicSettings | None
    table: TableSettings | None
    freshness_s: float | None
    path: Path
    inputs: tuple[str, ...] = ()
    quality: tuple[QualityRule, ...] = ()

    def field(self, name: str) -> ContractField:
        """Return the field called `name`.

        Raises:
            ConfigurationError: the contract has no such field.
        """
        for item in self.fields:
            if item.name == name:
                return item
        msg = f"contract {self.id} ({self.path}) has no field {name!r}"
        raise ConfigurationError(msg)

    @property
    def own_fields(self) -> tuple[ContractField, ...]:
        """Return the fields of the contract's own file, without those of the provenance fragment."""
        return tuple(item for item in self.fields if not item.provenance)

    @property
    def wire_fields(self) -> tuple[ContractField, ...]:
        """Return the members of the JSON value, in order."""
        return tuple(item for item in self.fields if item.on_wire)

    @cached_property
    def iceberg_schema(self) -> Schema:
        """Return the Iceberg schema of the table, field ids as the contract says."""
        return Schema(*(_nested_field(self, item) for item in self.fields))

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """Return the Arrow schema that rows of the table are written with."""
        return schema_to_pyarrow(self.iceberg_schema, include_field_ids=False)

    @cached_property
    def partition_spec(self) -> PartitionSpec:
        """Return the Iceberg partition spec of the table."""
        if self.table is None:
            return PartitionSpec()
        return PartitionSpec(
            *(
                PartitionField(
                    source_id=self.iceberg_schema.find_field(field).field_id,
                    field_id=FIRST_PARTITION_FIELD_ID + index,
                    transform=parse_transform(transform),
                    name=f"{field}_{transform}",
                )
                for index, (transform, field) in enumerate(self.table.partition_by)
            )
        )

    @cached_property
    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema (2020-12) of the record value; decimals are strings on the wire."""
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": self.id,
            "description": self.purpose,
            "type": "object",
            "properties": {item.name: _json_property(item) for item in self.wire_fields},
            "required": [item.name for item in self.wire_fields if item.required],
            "additionalProperties": True,
        }


@dataclass(frozen=True)
class Contracts(Mapping[str, Contract]):
    """All contracts of a folder by id; `<topic>.dlq` ids are expanded from the one DLQ contract.

    Fragments (provenance) are no products and are kept apart: their fields are already in the tables.
    """

    by_id: Mapping[str, Contract]
    fragments: Mapping[str, Contract] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Contract:
        try:
            return self.by_id[key]
        except KeyError:
            msg = f"no contract {key!r}; there are: {', '.join(sorted(self.by_id))}"
            raise ConfigurationError(msg) from None

    def __contains__(self, key: object) -> bool:
        return key in self.by_id

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_id)

    def __len__(self) -> int:
        return len(self.by_id)

    @property
    def with_topic(self) -> tuple[Contract, ...]:
        """Return the contracts that have a topic."""
        return tuple(item for item in self.by_id.values() if item.topic is not None)

    @property
    def with_table(self) -> tuple[Contract, ...]:
        """Return the contracts that have a table."""
        return tuple(item for item in self.by_id.values() if item.table is not None)

    def of_table(self, table_name: str) -> Contract:
        """Return the contract whose table is called `table_name` (its contract id is accepted too).

        Raises:
            ConfigurationError: there is no such table; the message names those that are.
        """
        for item in self.with_table:
            if item.table is not None and table_name in (item.table.name, item.id):
                return item
        names = ", ".join(sorted(item.table.name for item in self.with_table if item.table is not None))
        msg = f"no contract has a table {table_name!r}; tables are: {names}"
        raise ConfigurationError(msg)


def iceberg_type(type_name: str) -> IcebergType | None:
    """Return the Iceberg type of a physicalType, None where a table cannot hold it."""
    if type_name in _ICEBERG_PRIMITIVES or type_name.startswith("decimal("):
        try:
            return NestedField(field_id=1, name="probe", field_type=type_name, required=False).field_type
        except (ValidationError, ValueError):
            return None
    return None


def json_type(type_name: str) -> dict[str, Any] | None:
    """Return the JSON schema of a type on the wire, None where the type cannot stand in a JSON value."""
    if type_name.startswith("decimal("):
        return {"type": "string", "pattern": r"^-?\d+(\.\d+)?$"}
    schema = _JSON_TYPES.get(type_name)
    return None if schema is None else dict(schema)


def known_types() -> tuple[str, ...]:
    """Return the spellings that a physicalType may have."""
    return (*sorted({*_JSON_TYPES, *_ICEBERG_PRIMITIVES}), "decimal(P,S)")


def _nested_field(contract: Contract, item: ContractField) -> NestedField:
    field_type = iceberg_type(item.type_name)
    if field_type is None or item.field_id is None:
        msg = (
            f"contract {contract.id} ({contract.path}), field {item.name!r}: a table field needs a fieldId "
            f"and an Iceberg type, found fieldId={item.field_id} physicalType={item.type_name!r}"
        )
        raise ConfigurationError(msg)
    return NestedField(item.field_id, item.name, field_type, required=item.required, doc=item.description)


def _json_property(item: ContractField) -> dict[str, Any]:
    schema = json_type(item.type_name)
    if schema is None:
        msg = f"field {item.name!r}: physicalType {item.type_name} cannot stand in a JSON value; give it another `from`"
        raise ConfigurationError(msg)
    if schema["type"] == "integer":
        schema |= {name: item.options[name] for name in _JSON_RANGES if name in item.options}
    if item.enum:
        schema["enum"] = [*item.enum] if item.required else [*item.enum, None]
    if not item.required:
        schema["type"] = [schema["type"], "null"]
    schema["description"] = item.description
    return schema
