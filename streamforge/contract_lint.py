"""Lint of contract files: the standard's own schema, then our rules; every finding names file, line and place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft201909Validator
from open_data_contract_standard.model import OpenDataContractStandard

from streamforge.contract_rules import dlq_problems, input_problems, structural_problems, style_problems
from streamforge.contracts import Contract, parse_contracts, parse_document
from streamforge.errors import ConfigurationError

_LOGICAL_TYPES = {
    "string": "string",
    "binary": "string",
    "int": "integer",
    "long": "integer",
    "boolean": "boolean",
    "double": "number",
    "timestamptz": "timestamp",
}
_Place = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing that is wrong in one file.

    Args:
        place: path in the document, `$.schema[0].properties[3].name`.
        rule: short name; those of the standard's own schema are `standard`.
    """

    file: str
    line: int
    place: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.place}: {self.rule}: {self.message}"


@dataclass(frozen=True, slots=True)
class LintReport:
    """What was looked at and what was found."""

    files: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class _File:
    """A contract file that is YAML: its data and the nodes that know their lines."""

    path: Path
    data: Any
    root: yaml.Node

    def finding(self, place: Sequence[str | int], rule: str, message: str) -> Finding:
        text = "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
        return Finding(str(self.path), _line(self.root, place), text, rule, message)

    def of_contract(self, field_name: str | None, rule: str, message: str) -> Finding:
        return self.finding(self._field_place(field_name), rule, message)

    def _field_place(self, field_name: str | None) -> _Place:
        for index, item in enumerate(self.data["schema"][0]["properties"]):
            if item.get("name") == field_name:
                return ("schema", 0, "properties", index)
        return ()


def lint_folder(folder: Path) -> LintReport:
    """Check every `*.yaml` of `folder`; broken files become findings, never exceptions.

    Raises:
        ConfigurationError: the folder does not exist or has no contract.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        msg = f"no *.yaml in contracts folder {folder}; set STREAMFORGE_CONTRACTS_DIR or --folder to the right one"
        raise ConfigurationError(msg)
    findings: list[Finding] = []
    sound: dict[Path, tuple[_File, OpenDataContractStandard]] = {}
    for path in paths:
        loaded = _read(path)
        own = [loaded] if isinstance(loaded, Finding) else list(_file_findings(loaded))
        findings += own
        if not own and isinstance(loaded, _File):
            sound[path] = (loaded, parse_document(path.read_text(encoding="utf-8"), path))
    findings += _contract_findings(sound, complete=len(sound) == len(paths))
    return LintReport(len(paths), tuple(sorted(set(findings))))


def _read(path: Path) -> _File | Finding:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return Finding(str(path), line, "$", "yaml", f"not YAML: {error.problem}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        return Finding(str(path), 1, "$", "yaml", f"cannot be read: {error}")
    if root is None or not isinstance(data, dict):
        return Finding(str(path), 1, "$", "yaml", f"a contract is a mapping, found {type(data).__name__}")
    return _File(path, data, root)


def _file_findings(file: _File) -> Iterator[Finding]:
    yield from _repeated_keys(file, file.root, ())
    standard = list(_validator().iter_errors(file.data))
    for error in standard:
        yield file.finding(list(error.absolute_path), "standard", error.message[:300])
    if standard:
        return
    schema = file.data.get("schema") or []
    if len(schema) != 1 or not schema[0].get("properties"):
        yield file.finding((), "one-schema", "must have exactly one schema object with properties")
        return
    if file.data["id"] != file.path.stem:
        message = f"id {file.data['id']!r} must be the file's name, {file.path.stem!r}"
        yield file.finding(("id",), "id-is-file-name", message)
    for index, item in enumerate(schema[0]["properties"]):
        expected = _logical_type(str(item.get("physicalType")))
        if expected is not None and item.get("logicalType") != expected:
            message = f"logicalType of {item.get('physicalType')} is {expected}, found {item.get('logicalType')}"
            yield file.finding(("schema", 0, "properties", index), "logical-type", message)
    yield from _reading_findings(file)


def _reading_findings(file: _File) -> Iterator[Finding]:
    """Yield what our reader refuses in this file alone: custom properties, types, SLA units, quality rules."""
    try:
        document = OpenDataContractStandard(**file.data)
        parse_contracts({file.path: document})
    except (ConfigurationError, ValueError) as error:
        message = str(error).removeprefix(str(file.path)).lstrip(",: ")
        named = message.removeprefix("field '").split("'", 1)[0] if message.startswith("field '") else None
        yield file.of_contract(named, "profile", message)


def _contract_findings(
    sound: dict[Path, tuple[_File, OpenDataContractStandard]], *, complete: bool
) -> Iterator[Finding]:
    try:
        contracts = parse_contracts({path: document for path, (_, document) in sound.items()})
    except ConfigurationError as error:
        path = next((path for path in sound if str(path) in str(error)), next(iter(sound)))
        yield Finding(str(path), 1, "$", "profile", str(error))
        return
    every: list[Contract] = [*contracts.values(), *contracts.fragments.values()]
    for contract in every:
        file = sound[contract.path][0]
        for problem in (*structural_problems(contract), *style_problems(contract)):
            yield file.of_contract(problem.field, problem.rule, problem.message)
    if complete:
        for contract, problem in (*dlq_problems(contracts), *input_problems(contracts)):
            yield sound[contract.path][0].of_contract(problem.field, problem.rule, problem.message)


def _logical_type(physical_type: str) -> str | None:
    if physical_type.startswith("decimal("):
        return "number"
    if physical_type.startswith("list<"):
        return "array"
    if physical_type.startswith("map<"):
        return "map"
    return _LOGICAL_TYPES.get(physical_type)


def _repeated_keys(file: _File, node: yaml.Node, place: _Place) -> Iterator[Finding]:
    """Yield keys that stand twice in a mapping: YAML readers keep the last one without a word."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(file, item, (*place, index))
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                yield file.finding((*place, name), "repeated-key", f"key {name!r} stands twice; only the last counts")
            seen.add(name)
            yield from _repeated_keys(file, value, (*place, name))


def _line(node: yaml.Node, place: Sequence[str | int]) -> int:
    for step in place:
        child = None
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            child = node.value[step] if step < len(node.value) else None
        elif isinstance(node, yaml.MappingNode):
            child = next((value for key, value in node.value if key.value == step), None)
        if child is None:
            break
        node = child
    return int(node.start_mark.line) + 1


@cache
def _validator() -> Draft201909Validator:
    # The package's own reader of this file uses a deprecated call.
    schema = files("open_data_contract_standard").joinpath("schema.json").read_text(encoding="utf-8")
    return Draft201909Validator(json.loads(schema))
