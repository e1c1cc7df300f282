"""Data contracts: the only place where a schema is written. This module reads the files.

A contract is one Open Data Contract Standard file in `contracts/`. From it come the topic's settings,
the JSON, Arrow and Iceberg schemas and the table's partition spec (`streamforge.contract_model`). Three things
are ours on top of the standard, as custom properties:

- of a field: `fieldId` (Iceberg field id, never reused), `from` (where its value comes from, see
  `FieldSource`) and `derivedFrom` (see `FieldProperties`);
- of the contract: `topic.*` and `table.*` settings (see `ContractProperties`);
- `provenance.yaml` is a fragment: its fields are added to every table that is fed from a topic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import yaml
from open_data_contract_standard.model import (
    CustomProperty,
    DataQuality,
    OpenDataContractStandard,
    SchemaObject,
    SchemaProperty,
)
from pydantic import ValidationError

from streamforge.contract_model import (
    Compatibility,
    Contract,
    ContractField,
    Contracts,
    Encoding,
    FieldSource,
    QualityRule,
    TableSettings,
    TopicSettings,
    iceberg_type,
    json_type,
    known_types,
)
from streamforge.contract_rules import structural_problems
from streamforge.errors import ConfigurationError

_DAY_MS = 86_400_000
_PARTITION_BY = re.compile(r"(?P<transform>identity|year|month|day|hour)\((?P<field>\w+)\)")
_CLEANUP_POLICY = "^(delete|compact|compact,delete)$"
_SLA_UNITS = {"retention": "d", "freshness": "s"}

_Name = Annotated[str, msgspec.Meta(min_length=1)]
_Positive = Annotated[int, msgspec.Meta(gt=0)]
_P = TypeVar("_P", bound=msgspec.Struct)


class ContractProperties(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Custom properties of a contract; the names in the file are the `name=` ones."""

    compatibility: Compatibility = Compatibility.BACKWARD
    fragment: bool = False
    partitions: _Positive | None = msgspec.field(name="topic.partitions", default=None)
    key: list[_Name] = msgspec.field(name="topic.key", default_factory=list)
    encoding: Encoding = msgspec.field(name="topic.encoding", default=Encoding.JSON)
    cleanup_policy: Annotated[str, msgspec.Meta(pattern=_CLEANUP_POLICY)] = msgspec.field(
        name="topic.cleanupPolicy", default="delete"
    )
    min_compaction_lag_ms: Annotated[int, msgspec.Meta(ge=0)] = msgspec.field(
        name="topic.minCompactionLagMs", default=0
    )
    transactional: bool = msgspec.field(name="topic.transactional", default=False)
    max_message_bytes: _Positive = msgspec.field(name="topic.maxMessageBytes", default=1_048_588)
    applies_to: list[_Name] = msgspec.field(name="topic.appliesTo", default_factory=list)
    inputs: list[_Name] = msgspec.field(name="topic.inputs", default_factory=list)
    table_name: Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_]*$")] | None = msgspec.field(
        name="table.name", default=None
    )
    partition_by: list[_Name] = msgspec.field(name="table.partitionBy", default_factory=list)
    latest_by: list[_Name] = msgspec.field(name="table.latestBy", default_factory=list)


class FieldProperties(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Custom properties of a field; the names in the file are the `name=` ones."""

    field_id: _Positive | None = msgspec.field(name="fieldId", default=None)
    source: FieldSource = msgspec.field(name="from", default=FieldSource.VALUE)
    derived_from: _Name | None = msgspec.field(name="derivedFrom", default=None)


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
    contracts = parse_contracts(documents, topic_prefix=topic_prefix)
    for contract in contracts.values():
        for problem in structural_problems(contract):
            where = f"{contract.path}, field {problem.field!r}" if problem.field else str(contract.path)
            msg = f"{where}: {problem.message}. `streamforge contracts lint` shows every finding"
            raise ConfigurationError(msg)
    return contracts


def parse_contracts(documents: Mapping[Path, OpenDataContractStandard], *, topic_prefix: str = "") -> Contracts:
    """Turn parsed ODCS documents into contracts, adding provenance and expanding DLQs.

    Raises:
        ConfigurationError: a document says something that this project does not know; names file and place.
    """
    properties = {path: contract_properties(path, document) for path, document in documents.items()}
    fragments = {
        str(documents[path].id): _contract(path, documents[path], custom, str(documents[path].id), topic_prefix)
        for path, custom in properties.items()
        if custom.fragment
    }
    by_id: dict[str, Contract] = {}
    for path, custom in properties.items():
        if custom.fragment:
            continue
        for name in [f"{topic}.dlq" for topic in custom.applies_to] or [str(documents[path].id)]:
            if name in by_id:
                msg = f"{path} and {by_id[name].path} are both called {name!r}; ids must be unique"
                raise ConfigurationError(msg)
            by_id[name] = _with_provenance(_contract(path, documents[path], custom, name, topic_prefix), fragments)
    return Contracts(by_id, fragments)


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


def contract_properties(path: Path, document: OpenDataContractStandard) -> ContractProperties:
    """Return the custom properties of a contract.

    Raises:
        ConfigurationError: one is unknown or has a wrong value.
    """
    return _custom(ContractProperties, document.customProperties, str(path))


def _read_document(path: Path) -> OpenDataContractStandard:
    try:
        return parse_document(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        msg = f"contract {path} cannot be read: {error}"
        raise ConfigurationError(msg) from error


def _contract(
    path: Path, document: OpenDataContractStandard, custom: ContractProperties, name: str, topic_prefix: str
) -> Contract:
    schema, properties = _schema(path, document)
    keys = sorted((item.primaryKeyPosition or 0, str(item.name)) for item in properties if item.primaryKey)
    team = document.team
    return Contract(
        id=name,
        version=str(document.version),
        purpose=(document.description.purpose if document.description else None) or "",
        limitations=(document.description.limitations if document.description else None) or "",
        owner=(team.name if team is not None and not isinstance(team, list) else None) or "",
        compatibility=custom.compatibility,
        fields=tuple(_field(path, item) for item in properties),
        primary_key=tuple(key for _, key in keys),
        topic=_topic(path, document, topic_prefix + name, custom),
        table=_table(path, custom),
        freshness_s=_sla(path, document, "freshness"),
        path=path,
        inputs=tuple(custom.inputs),
        quality=tuple(_quality(path, schema, properties)),
    )


def _with_provenance(contract: Contract, fragments: Mapping[str, Contract]) -> Contract:
    if contract.topic is None or contract.table is None:
        return contract
    added = [replace(item, provenance=True) for part in fragments.values() for item in part.fields]
    rules = [rule for part in fragments.values() for rule in part.quality]
    return replace(contract, fields=(*contract.fields, *added), quality=(*contract.quality, *rules))


def _schema(path: Path, document: OpenDataContractStandard) -> tuple[SchemaObject, list[SchemaProperty]]:
    if not document.id or not document.schema_ or len(document.schema_) != 1 or not document.schema_[0].properties:
        msg = f"{path} must have an id and exactly one schema object with properties"
        raise ConfigurationError(msg)
    return document.schema_[0], document.schema_[0].properties


def _field(path: Path, item: SchemaProperty) -> ContractField:
    where = f"{path}, field {item.name!r}"
    if not item.name or not item.physicalType:
        msg = f"{where}: name and physicalType are needed"
        raise ConfigurationError(msg)
    if json_type(item.physicalType) is None and iceberg_type(item.physicalType) is None:
        msg = f"{where}: physicalType {item.physicalType!r} is unknown; known are {', '.join(known_types())}"
        raise ConfigurationError(msg)
    custom = _custom(FieldProperties, item.customProperties, where)
    return ContractField(
        name=item.name,
        type_name=item.physicalType,
        required=bool(item.required),
        description=item.description or "",
        source=custom.source,
        field_id=custom.field_id,
        derived_from=custom.derived_from,
        enum=tuple(str(e.value) for e in item.enum or ()),
        options=item.logicalTypeOptions or {},
    )


def _quality(path: Path, schema: SchemaObject, properties: list[SchemaProperty]) -> Iterator[QualityRule]:
    rules: list[tuple[str | None, DataQuality]] = [(None, rule) for rule in schema.quality or ()]
    rules += [(item.name, rule) for item in properties for rule in item.quality or ()]
    for field_name, rule in rules:
        operators = {k: v for k, v in rule.model_dump(exclude_none=True).items() if k.startswith("must")}
        if len(operators) != 1 or not rule.id:
            msg = (
                f"{path}: quality rule {rule.id!r} of {field_name or schema.name} needs an id and one of mustBe, ... ; "
                f"found {', '.join(operators) or 'none'}"
            )
            raise ConfigurationError(msg)
        [(operator, expected)] = operators.items()
        yield QualityRule(
            id=rule.id,
            field=field_name,
            metric=rule.metric,
            query=rule.query,
            arguments=rule.arguments or {},
            operator=operator,
            expected=expected,
            severity=rule.severity or "error",
            description=rule.description or "",
        )


def _topic(
    path: Path, document: OpenDataContractStandard, name: str, custom: ContractProperties
) -> TopicSettings | None:
    if custom.partitions is None:
        return None
    retention_days = _sla(path, document, "retention")
    return TopicSettings(
        name=name,
        partitions=custom.partitions,
        key=tuple(custom.key),
        cleanup_policy=custom.cleanup_policy,
        retention_ms=-1 if retention_days is None else int(retention_days * _DAY_MS),
        encoding=custom.encoding,
        transactional=custom.transactional,
        max_message_bytes=custom.max_message_bytes,
        min_compaction_lag_ms=custom.min_compaction_lag_ms,
    )


def _table(path: Path, custom: ContractProperties) -> TableSettings | None:
    if custom.table_name is None:
        return None
    partition_by = []
    for text in custom.partition_by:
        match = _PARTITION_BY.fullmatch(text)
        if match is None:
            msg = (
                f"{path}: table.partitionBy must look like day(ts_event), with identity, year, month, day or hour; "
                f"found {text!r}"
            )
            raise ConfigurationError(msg)
        partition_by.append((match["transform"], match["field"]))
    return TableSettings(custom.table_name, tuple(partition_by), tuple(custom.latest_by))


def _custom(kind: type[_P], properties: list[CustomProperty] | None, where: str) -> _P:
    try:
        return msgspec.convert({str(item.property): item.value for item in properties or ()}, kind)
    except msgspec.ValidationError as error:
        msg = f"{where}: customProperties: {error}"
        raise ConfigurationError(msg) from error


def _sla(path: Path, document: OpenDataContractStandard, name: str) -> float | None:
    for item in document.slaProperties or ():
        if item.property == name:
            if isinstance(item.value, bool) or not isinstance(item.value, int | float) or item.unit != _SLA_UNITS[name]:
                msg = (
                    f"{path}: slaProperties {name} must be a number with unit {_SLA_UNITS[name]}, "
                    f"found {item.value!r} {item.unit!r}"
                )
                raise ConfigurationError(msg)
            return float(item.value)
    return None


__all__ = [
    "Compatibility",
    "Contract",
    "ContractField",
    "ContractProperties",
    "Contracts",
    "Encoding",
    "FieldProperties",
    "FieldSource",
    "QualityRule",
    "TableSettings",
    "TopicSettings",
    "contract_properties",
    "load_contracts",
    "parse_contracts",
    "parse_document",
]
