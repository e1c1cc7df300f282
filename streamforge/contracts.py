"""Data contracts: the only place where a schema is written, and everything that follows from one.

A contract is one Open Data Contract Standard file in `contracts/`. From it come the topic's settings,
the JSON, Arrow and Iceberg schemas and the table's partition spec. Three things are ours on top of the
standard, as custom properties:

- of a field: `fieldId` (Iceberg field id, never reused), `from` (where its value comes from, see
  `FieldSource`) and `derivedFrom`;
- of the contract: `topic.*` and `table.*` settings;
- `provenance.yaml` is a fragment: its fields are added to every table that is fed from a topic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from open_data_contract_standard.model import CustomProperty, OpenDataContractStandard, SchemaProperty
from pydantic import ValidationError
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.transforms import parse_transform
from pyiceberg.types import IcebergType, NestedField

from streamforge.errors import ConfigurationError

_DAY_MS = 86_400_000
_FIRST_PARTITION_FIELD_ID = 1000
_PARTITION_BY = re.compile(r"(?P<transform>\w+)\((?P<field>\w+)\)")
_ICEBERG_PRIMITIVES = {"string", "int", "long", "boolean", "double", "binary", "timestamptz"}
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
class ContractField:
    """One field of a contract; `type_name` is the physical type in Iceberg's spelling."""

    name: str
    type_name: str
    required: bool
    description: str
    source: FieldSource
    field_id: int | None
    derived_from: str | None
    enum: tuple[str, ...]
    options: Mapping[str, Any]

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

    @property
    def config(self) -> dict[str, str]:
        """Return the topic-level configuration as Kafka spells it."""
        return {
            "cleanup.policy": self.cleanup_policy,
            "retention.ms": str(self.retention_ms),
            "max.message.bytes": str(self.max_message_bytes),
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
    """One data product: its fields, topic and table."""

    id: str
    version: str
    purpose: str
    limitations: str
    owner: str
    compatibility: str
    fields: tuple[ContractField, ...]
    primary_key: tuple[str, ...]
    topic: TopicSettings | None
    table: TableSettings | None
    freshness_s: float | None
    path: Path

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
                    field_id=_FIRST_PARTITION_FIELD_ID + index,
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
    """All contracts of a folder by id; `<topic>.dlq` ids are expanded from the one DLQ contract."""

    by_id: Mapping[str, Contract]

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


def load_contracts(folder: Path, *, topic_prefix: str = "") -> Contracts:
    """Read every contract file of `folder`; `topic_prefix` goes before each topic's name, not before ids.

    Raises:
        ConfigurationError: the folder is missing, or a file is not a valid contract; names file and place.
    """
    if not folder.is_dir():
        msg = (
            f"contracts folder {folder} does not exist; set STREAMFORGE_CONTRACTS_DIR to the folder with the YAML files"
        )
        raise ConfigurationError(msg)
    documents = {path: _read_document(path) for path in sorted(folder.glob("*.yaml"))}
    if not documents:
        msg = f"contracts folder {folder} has no *.yaml file; set STREAMFORGE_CONTRACTS_DIR to the right folder"
        raise ConfigurationError(msg)
    return parse_contracts(documents, topic_prefix=topic_prefix)


def parse_contracts(documents: Mapping[Path, OpenDataContractStandard], *, topic_prefix: str = "") -> Contracts:
    """Turn parsed ODCS documents into contracts, adding provenance and expanding DLQs."""
    fragments = [d for d in documents.items() if _custom(d[1].customProperties).get("fragment")]
    provenance = tuple(f for path, document in fragments for f in _fields(path, document))
    by_id: dict[str, Contract] = {}
    for path, document in documents.items():
        custom = _custom(document.customProperties)
        if custom.get("fragment"):
            continue
        applies_to = custom.get("topic.appliesTo")
        names = [f"{topic}.dlq" for topic in applies_to] if applies_to else [str(document.id)]
        for name in names:
            by_id[name] = _contract(path, document, name, provenance, topic_prefix)
    return Contracts(by_id)


def parse_document(text: str, path: Path) -> OpenDataContractStandard:
    """Parse one ODCS document.

    Raises:
        ConfigurationError: not YAML, or not an ODCS v3 document; names the file and the place in it.
    """
    try:
        return OpenDataContractStandard.from_string(text)
    except yaml.YAMLError as error:
        msg = f"{path} is not valid YAML: {error}"
        raise ConfigurationError(msg) from error
    except (ValidationError, TypeError) as error:
        msg = f"{path} is not an Open Data Contract Standard v3 document: {error}"
        raise ConfigurationError(msg) from error


def _read_document(path: Path) -> OpenDataContractStandard:
    try:
        return parse_document(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        msg = f"contract {path} cannot be read: {error}"
        raise ConfigurationError(msg) from error


def _contract(
    path: Path, document: OpenDataContractStandard, name: str, provenance: tuple[ContractField, ...], topic_prefix: str
) -> Contract:
    custom = _custom(document.customProperties)
    own_fields = _fields(path, document)
    topic = _topic(path, document, topic_prefix + name, custom) if "topic.partitions" in custom else None
    table = _table(path, custom) if "table.name" in custom else None
    fields = (*own_fields, *provenance) if topic is not None and table is not None else own_fields
    keys = sorted((p.primaryKeyPosition or 0, str(p.name)) for p in _properties(path, document) if p.primaryKey)
    team = document.team
    return Contract(
        id=name,
        version=str(document.version),
        purpose=(document.description.purpose if document.description else None) or "",
        limitations=(document.description.limitations if document.description else None) or "",
        owner=(team.name if team is not None and not isinstance(team, list) else None) or "",
        compatibility=str(custom.get("compatibility", "backward")),
        fields=fields,
        primary_key=tuple(key for _, key in keys),
        topic=topic,
        table=table,
        freshness_s=_sla(document, "freshness"),
        path=path,
    )


def _properties(path: Path, document: OpenDataContractStandard) -> list[SchemaProperty]:
    if not document.id or not document.schema_ or len(document.schema_) != 1 or not document.schema_[0].properties:
        msg = f"{path} must have an id and exactly one schema object with properties"
        raise ConfigurationError(msg)
    return document.schema_[0].properties


def _fields(path: Path, document: OpenDataContractStandard) -> tuple[ContractField, ...]:
    return tuple(_field(path, item) for item in _properties(path, document))


def _field(path: Path, item: SchemaProperty) -> ContractField:
    custom = _custom(item.customProperties)
    where = f"{path}, field {item.name!r}"
    if not item.name or not item.physicalType:
        msg = f"{where}: name and physicalType are needed"
        raise ConfigurationError(msg)
    if item.physicalType not in _JSON_TYPES and _iceberg_type(item.physicalType) is None:
        known = sorted({*_JSON_TYPES, *_ICEBERG_PRIMITIVES, "decimal(P,S)"})
        msg = f"{where}: physicalType {item.physicalType!r} is unknown; known are {', '.join(known)}"
        raise ConfigurationError(msg)
    source = str(custom.get("from", FieldSource.VALUE))
    if source not in set(FieldSource):
        msg = f"{where}: from must be one of {', '.join(FieldSource)}, found {source!r}"
        raise ConfigurationError(msg)
    return ContractField(
        name=item.name,
        type_name=item.physicalType,
        required=bool(item.required),
        description=item.description or "",
        source=FieldSource(source),
        field_id=custom.get("fieldId"),
        derived_from=custom.get("derivedFrom"),
        enum=tuple(str(e.value) for e in item.enum or ()),
        options=item.logicalTypeOptions or {},
    )


def _topic(path: Path, document: OpenDataContractStandard, name: str, custom: Mapping[str, Any]) -> TopicSettings:
    retention_days = _sla(document, "retention")
    encoding = str(custom.get("topic.encoding", Encoding.JSON))
    if encoding not in set(Encoding):
        msg = f"{path}: topic.encoding must be one of {', '.join(Encoding)}, found {encoding!r}"
        raise ConfigurationError(msg)
    return TopicSettings(
        name=name,
        partitions=int(custom["topic.partitions"]),
        key=tuple(custom.get("topic.key", ())),
        cleanup_policy=str(custom.get("topic.cleanupPolicy", "delete")),
        retention_ms=-1 if retention_days is None else int(retention_days * _DAY_MS),
        encoding=Encoding(encoding),
        transactional=bool(custom.get("topic.transactional", False)),
        max_message_bytes=int(custom.get("topic.maxMessageBytes", 1_048_588)),
    )


def _table(path: Path, custom: Mapping[str, Any]) -> TableSettings:
    partition_by = []
    for text in custom.get("table.partitionBy", ()):
        match = _PARTITION_BY.fullmatch(text)
        if match is None:
            msg = f"{path}: table.partitionBy must look like day(ts_event), found {text!r}"
            raise ConfigurationError(msg)
        partition_by.append((match["transform"], match["field"]))
    return TableSettings(
        name=str(custom["table.name"]),
        partition_by=tuple(partition_by),
        latest_by=tuple(custom.get("table.latestBy", ())),
    )


def _custom(properties: list[CustomProperty] | None) -> dict[str, Any]:
    return {str(item.property): item.value for item in properties or ()}


def _sla(document: OpenDataContractStandard, name: str) -> float | None:
    for item in document.slaProperties or ():
        if item.property == name and item.value is not None:
            return float(item.value)
    return None


def _iceberg_type(type_name: str) -> IcebergType | None:
    if type_name in _ICEBERG_PRIMITIVES or type_name.startswith("decimal("):
        try:
            return NestedField(field_id=1, name="probe", field_type=type_name, required=False).field_type
        except (ValidationError, ValueError):
            return None
    return None


def _nested_field(contract: Contract, item: ContractField) -> NestedField:
    field_type = _iceberg_type(item.type_name)
    if field_type is None or item.field_id is None:
        msg = (
            f"contract {contract.id} ({contract.path}), field {item.name!r}: a table field needs a fieldId "
            f"and an Iceberg type, found fieldId={item.field_id} physicalType={item.type_name!r}"
        )
        raise ConfigurationError(msg)
    return NestedField(item.field_id, item.name, field_type, required=item.required, doc=item.description)


def _json_property(item: ContractField) -> dict[str, Any]:
    if item.type_name.startswith("decimal("):
        schema: dict[str, Any] = {"type": "string", "pattern": r"^-?\d+(\.\d+)?$"}
    else:
        schema = dict(_JSON_TYPES[item.type_name])
    if item.enum:
        schema["enum"] = list(item.enum)
    if not item.required:
        schema["type"] = [schema["type"], "null"]
    schema["description"] = item.description
    return schema
