"""A contract in the forms that other tools read: ODCS, JSON schema, Arrow, Iceberg, topic settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import Any

import yaml

from streamforge.contract_model import Contract
from streamforge.errors import ConfigurationError


class Form(StrEnum):
    """One form of a contract."""

    ODCS = "odcs"
    JSON_SCHEMA = "json-schema"
    ARROW = "arrow"
    ICEBERG = "iceberg"
    TOPIC = "topic"

    def exists_for(self, contract: Contract) -> bool:
        """Return whether the contract has this form."""
        if self in (Form.ARROW, Form.ICEBERG):
            return contract.table is not None
        if self is Form.TOPIC:
            return contract.topic is not None
        return True


def contract_form(contract: Contract, form: Form) -> dict[str, Any]:
    """Return the contract in one form, as plain values.

    Raises:
        ConfigurationError: the contract has no such form.
    """
    if not form.exists_for(contract):
        what = "topic" if form is Form.TOPIC else "table"
        msg = f"contract {contract.id} ({contract.path}) has no {what}; ask for another --format"
        raise ConfigurationError(msg)
    if form is Form.ODCS:
        document: dict[str, Any] = yaml.safe_load(contract.path.read_text(encoding="utf-8"))
        return document
    if form is Form.JSON_SCHEMA:
        return contract.json_schema
    if form is Form.ARROW:
        fields = [{"name": f.name, "type": str(f.type), "nullable": f.nullable} for f in contract.arrow_schema]
        return {"fields": fields}
    if form is Form.ICEBERG:
        schema: dict[str, Any] = json.loads(contract.iceberg_schema.model_dump_json())
        return {"schema": schema, "partition-spec": json.loads(contract.partition_spec.model_dump_json())}
    topic = contract.topic
    return {} if topic is None else asdict(topic) | {"config": topic.config}
