"""Each field of each contract is walked to every schema that follows from it."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from hatchling.builders.wheel import WheelBuilder
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from streamforge.contract_model import Contract, ContractField, iceberg_type, json_type
from streamforge.contracts import FieldSource, load_contracts
from streamforge.errors import ConfigurationError
from tests.contract_files import ADDED_FIELD, FOLDER, REPOSITORY, edit

CONTRACTS = load_contracts(FOLDER)
FIELDS = [(contract, item) for contract in CONTRACTS.values() for item in contract.fields]
TABLE_FIELDS = [(contract, item) for contract, item in FIELDS if contract.table is not None]
ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.large_string(),
    "int": pa.int32(),
    "long": pa.int64(),
    "boolean": pa.bool_(),
    "double": pa.float64(),
    "binary": pa.large_binary(),
    "timestamptz": pa.timestamp("us", tz="UTC"),
    "decimal(38,18)": pa.decimal128(38, 18),
}
SCHEMA_MODULES = {"streamforge/contract_model.py", "streamforge/ledger.py"}


def _name(value: object) -> str | None:
    return getattr(value, "id", None) or getattr(value, "name", None)


def test_contracts_of_the_issue_are_there() -> None:
    topics = {"raw-trades", "raw-depth", "trades", "bars", "market-gaps", "queue-events", "queue-control"}
    assert topics <= {contract.id for contract in CONTRACTS.with_topic}
    for contract in CONTRACTS.with_topic:
        if contract.table is not None:
            assert CONTRACTS[f"{contract.id}.dlq"].topic is not None


@pytest.mark.parametrize(("contract", "item"), TABLE_FIELDS, ids=_name)
def test_field_reaches_the_iceberg_schema(contract: Contract, item: ContractField) -> None:
    found = contract.iceberg_schema.find_field(item.name)
    assert found.field_id == item.field_id
    assert str(found.field_type).replace(" ", "") == item.type_name
    assert (found.required, found.doc) == (item.required, item.description)


@pytest.mark.parametrize(("contract", "item"), TABLE_FIELDS, ids=_name)
def test_field_reaches_the_arrow_schema(contract: Contract, item: ContractField) -> None:
    found = contract.arrow_schema.field(item.name)
    assert found.type == ARROW_TYPES[item.type_name]
    assert found.nullable is not item.required


@pytest.mark.parametrize(("contract", "item"), FIELDS, ids=_name)
def test_field_reaches_the_json_schema(contract: Contract, item: ContractField) -> None:
    schema = contract.json_schema
    Draft202012Validator.check_schema(schema)
    assert (item.name in schema["properties"]) is (item.source is FieldSource.VALUE)
    assert (item.name in schema["required"]) is (item.source is FieldSource.VALUE and item.required)
    if item.on_wire:
        assert schema["properties"][item.name]["description"] == item.description


def test_json_schema_keeps_decimals_as_text_and_integers_in_range() -> None:
    validator = Draft202012Validator(CONTRACTS["trades"].json_schema["properties"]["price"])
    assert validator.is_valid("0.000000000000000001")
    assert not validator.is_valid(0.1)
    assert not validator.is_valid("1e3")
    sequence = Draft202012Validator(CONTRACTS["trades"].json_schema["properties"]["raw_offset"])
    assert sequence.is_valid(2**63 - 1)
    assert not sequence.is_valid(-1)
    assert not sequence.is_valid(2**63)


def test_json_schema_of_an_optional_enum_allows_null(contract_folder: Path) -> None:
    edit(contract_folder / "trades.yaml", "required: true\n        description: Side", "description: Side")
    schema = load_contracts(contract_folder)["trades"].json_schema["properties"]["aggressor_side"]
    assert Draft202012Validator(schema).is_valid(None)
    assert not Draft202012Validator(schema).is_valid("HOLD")


@given(st.integers(1, 38).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, p))))
def test_every_decimal_type_that_iceberg_has_is_known(shape: tuple[int, int]) -> None:
    name = f"decimal({shape[0]},{shape[1]})"
    assert str(iceberg_type(name)) == f"decimal({shape[0]}, {shape[1]})"
    assert json_type(name) is not None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=18, min_value=-(10**19), max_value=10**19))
def test_decimal_pattern_accepts_every_plain_decimal(value: Decimal) -> None:
    assert Draft202012Validator(json_type("decimal(38,18)") or {}).is_valid(f"{value:f}")


def test_topic_settings_follow_the_contract() -> None:
    topic = CONTRACTS["trades"].topic
    assert topic is not None
    assert topic.config["retention.ms"] == str(7 * 86_400_000)
    control = CONTRACTS["queue-control"].topic
    assert control is not None
    assert (control.config["cleanup.policy"], control.retention_ms) == ("compact", -1)
    assert int(control.config["min.compaction.lag.ms"]) >= 60_000, "a command is compacted before it is heard"


def test_topic_prefix_goes_before_topics_and_not_before_ids() -> None:
    contracts = load_contracts(FOLDER, topic_prefix="x.")
    topic = contracts["trades.dlq"].topic
    assert topic is not None
    assert topic.name == "x.trades.dlq"


def test_table_is_found_by_table_name_and_by_id() -> None:
    assert CONTRACTS.of_table("raw_trades") is CONTRACTS.of_table("raw-trades")
    with pytest.raises(ConfigurationError, match="tables are: bars, commits"):
        CONTRACTS.of_table("nothing")


def test_unknown_contract_names_those_that_exist() -> None:
    with pytest.raises(ConfigurationError, match="no contract 'nothing'; there are: bars"):
        CONTRACTS["nothing"]


def test_added_field_is_one_edit_of_one_file(contract_folder: Path) -> None:
    """The field reaches JSON, Arrow and Iceberg schema by an edit of trades.yaml alone."""
    edit(contract_folder / "trades.yaml", "slaProperties:", ADDED_FIELD)
    trades = load_contracts(contract_folder)["trades"]
    assert trades.iceberg_schema.find_field(26).name == "venue_flag"
    assert trades.arrow_schema.field("venue_flag").nullable
    assert "venue_flag" in trades.json_schema["properties"]
    assert "venue_flag" not in trades.json_schema["required"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200] + b"\xff\xfe")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_text("id: [\n"), "not valid YAML"),
        (lambda path: path.write_text("- 1\n"), "not an Open Data Contract Standard"),
        (lambda path: path.write_text(""), "not an Open Data Contract Standard"),
        (_truncate, "cannot be read"),
        (lambda path: edit(path, "value: 64", "value: many"), "topic.partitions"),
        (lambda path: edit(path, "topic.partitions", "topic.partition"), "topic.partition"),
        (lambda path: edit(path, "fieldId, value: 4}", "fieldId, value: 5}"), "fieldId 5 is already that of"),
        (lambda path: edit(path, "fieldId, value: 4}", "fieldId, value: four}"), "fieldId"),
        (lambda path: edit(path, "- name: symbol", "- name: venue"), "2 fields are called 'venue'"),
        (lambda path: edit(path, "physicalType: long", "physicalType: bigint"), "'bigint' is unknown"),
        (lambda path: edit(path, "value: derived}", "value: magic}"), "from"),
        (lambda path: edit(path, "day(ts_event)", "day(ts_evnt)"), "'ts_evnt', which is not a field"),
        (lambda path: edit(path, "day(ts_event)", "weekly(ts_event)"), "must look like day"),
        (lambda path: edit(path, "value: [instrument]", "value: [ticker]"), "'ticker', which is not a field"),
        (lambda path: edit(path, "derivedFrom, value: ts_event_ns", "derivedFrom, value: nope"), "'nope'"),
        (lambda path: edit(path, "value: 7, unit: d", "value: soon, unit: d"), "retention must be a number"),
        (lambda path: edit(path, "value: 7, unit: d", "value: 7, unit: h"), "unit d"),
        (lambda path: edit(path, "        mustBe: 0\n", ""), "mustBe"),
        (lambda path: edit(path, "id: trades\n", "id: bars\n"), "ids must be unique"),
        (lambda path: path.write_text(path.read_text().split("schema:")[0]), "exactly one schema object"),
    ],
)
def test_broken_contract_is_refused_with_its_file(
    contract_folder: Path, spoil: Callable[[Path], object], said: str
) -> None:
    path = contract_folder / "trades.yaml"
    spoil(path)
    with pytest.raises(ConfigurationError) as caught:
        load_contracts(contract_folder)
    assert said in str(caught.value)
    assert "trades.yaml" in str(caught.value)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_contracts(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match=r"no \*\.yaml"):
        load_contracts(tmp_path)


def test_no_schema_is_written_elsewhere() -> None:
    """Source that builds an Arrow or Iceberg schema field by field is a second place for a contract."""
    found = []
    for root in ("streamforge", "streaming", "assets", "orchestration", "cli"):
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            name = path.relative_to(REPOSITORY).as_posix()
            if name not in SCHEMA_MODULES:
                found += [f"{name}:{line}" for line in schema_lines(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "pa.schema([('a', t)])",
        "pyarrow.field('a', t)",
        "NestedField(1, 'a', t)",
        "Schema(NestedField(1, name='a'))",
        "pa.struct({'a': t})",
    ],
)
def test_guard_sees_a_written_schema(source: str) -> None:
    assert schema_lines(source)


@pytest.mark.parametrize("source", ["pa.schema([f for f in other])", "Schema()", "Schema(*fields)"])
def test_guard_lets_a_projection_pass(source: str) -> None:
    assert schema_lines(source) == []


def schema_lines(source: str) -> list[int]:
    """Return the lines that name the fields of an Arrow or Iceberg schema."""
    builders = {f"{module}.{name}" for module in ("pa", "pyarrow") for name in ("schema", "field", "struct")}
    builders |= {"NestedField", "Schema"}
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in builders and _has_text(node)
    ]


def _has_text(call: ast.Call) -> bool:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(isinstance(n, ast.Constant) and isinstance(n.value, str) for v in values for n in ast.walk(v))


def test_wheel_carries_the_contracts(tmp_path: Path) -> None:
    """A wheel is built from the tree, and its contracts are those of the folder, where settings look for them."""
    target = tmp_path / "out"
    [wheel] = WheelBuilder(str(REPOSITORY)).build(directory=str(target), versions=["standard"])
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(wheel, unpacked, format="zip")
    carried = unpacked / "streamforge" / "_contracts"
    assert load_contracts(carried).keys() == CONTRACTS.keys()
    assert json.dumps(load_contracts(carried)["bars"].json_schema) == json.dumps(CONTRACTS["bars"].json_schema)
