"""Every breaking change is refused by its name; compatible ones are listed and pass."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.app import app
from streamforge.contract_changes import (
    FieldShape,
    compare_contracts,
    compare_fields,
    is_promotion,
    require_compatible,
)
from streamforge.contract_revisions import contracts_at
from streamforge.contracts import Contract, Contracts, load_contracts
from streamforge.errors import BreakingChangeError, ConfigurationError
from tests.contract_files import ADDED_FIELD, FOLDER, copy_contracts, edit

BEFORE = load_contracts(FOLDER)
Edit = tuple[str, str]
SIDE = "        description: Side of the taker."
SYMBOL = "        description: Venue's own name of the instrument."
RAISED: Edit = ("version: 1.0.0", "version: 1.1.0")
RAW_OFFSET_TYPE = "- name: raw_offset\n        logicalType: integer\n        physicalType: long"
RAW_INDEX_TYPE = "- name: raw_index\n        logicalType: integer\n        physicalType: int"
PRICE_TYPE = "- name: price\n        logicalType: number\n        physicalType: decimal(38,18)"
EVENT_NS = "derivedFrom, value: ts_event_ns"

INDEX_RANGE = (
    "        logicalTypeOptions: {minimum: 0}\n        customProperties:\n          - {property: fieldId, value: 24}"
)
REUSED: list[Edit] = [
    (RAW_INDEX_TYPE, "- name: extra\n        logicalType: string\n        physicalType: string"),
    (INDEX_RANGE, INDEX_RANGE.split("\n", 1)[1]),
    ("raw_offset, raw_index]", "raw_offset]"),
]
NEEDED_FIELD = ADDED_FIELD.replace("required: false", "required: true")
LATEST_BY = "\n  - {property: table.latestBy, value: [trade_id]}"
LAG = "}\n  - {property: topic.minCompactionLagMs, value: 1"

BREAKING: dict[str, tuple[str, list[Edit]]] = {
    "field_renamed": ("symbol", [("- name: symbol", "- name: ticker"), ("[venue, symbol,", "[venue, ticker,")]),
    "field_id_changed": ("symbol", [("fieldId, value: 3}", "fieldId, value: 26}")]),
    "field_id_reused": ("raw_index", REUSED),
    "type_changed": ("raw_offset", [(RAW_OFFSET_TYPE, RAW_OFFSET_TYPE.replace("long", "int"))]),
    "became_optional": ("aggressor_side", [("required: true\n" + SIDE, "required: false\n" + SIDE)]),
    "required_field_added": ("venue_flag", [("slaProperties:", NEEDED_FIELD)]),
    "enum_value_removed": ("aggressor_side", [("[{value: BUY}, {value: SELL}]", "[{value: BUY}]")]),
    "enum_added": ("symbol", [(SYMBOL, SYMBOL + "\n        enum: [{value: BTCUSDT}]")]),
    "source_changed": ("ts_event", [(EVENT_NS, EVENT_NS.replace("event", "receive"))]),
    "primary_key_changed": ("contract", [("primaryKeyPosition: 1", "primaryKeyPosition: 4")]),
    "partition_count_changed": ("topic", [("topic.partitions, value: 64", "topic.partitions, value: 128")]),
    "topic_key_changed": ("topic", [("topic.key, value: [instrument]", "topic.key, value: [venue]")]),
    "cleanup_policy_changed": ("topic", [("cleanupPolicy, value: delete", "cleanupPolicy, value: compact")]),
    "encoding_changed": ("topic", [("topic.encoding, value: json", "topic.encoding, value: bytes")]),
    "transactional_changed": ("topic", [("topic.transactional, value: true", "topic.transactional, value: false")]),
    "topic_removed": ("topic", [("  - {property: topic.partitions, value: 64}\n", "")]),
    "table_renamed": ("table", [("table.name, value: trades", "table.name, value: deals")]),
    "table_removed": ("table", [("  - {property: table.name, value: trades}\n", "")]),
    "partition_spec_changed": ("table", [("day(ts_event)", "month(ts_event)")]),
    "latest_by_changed": ("table", [('["day(ts_event)"]}', '["day(ts_event)"]}' + LATEST_BY)]),
    "compatibility_changed": ("contract", [("compatibility, value: backward", "compatibility, value: none")]),
}  # fmt: skip

COMPATIBLE: dict[str, list[Edit]] = {
    "field_added": [("slaProperties:", ADDED_FIELD)],
    "type_widened": [(RAW_INDEX_TYPE, RAW_INDEX_TYPE.replace(": int\n", ": long\n").removesuffix("int") + "long")],
    "enum_value_added": [("{value: SELL}]", "{value: SELL}, {value: NONE}]")],
    "enum_dropped": [("        enum: [{value: BUY}, {value: SELL}]\n", "")],
    "description_changed": [("Side of the taker.", "The taker's side.")],
    "owner_changed": [("name: market-data\nschema", "name: surveillance\nschema")],
    "freshness_s_changed": [("freshness, value: 10", "freshness, value: 20")],
    "retention_ms_changed": [("retention, value: 7", "retention, value: 14")],
    "min_compaction_lag_ms_changed": [("cleanupPolicy, value: delete", "cleanupPolicy, value: delete" + LAG)],
    "quality_changed": [("severity: warning", "severity: error")],
    "ranges_changed": [("{exclusiveMinimum: 0}", "{minimum: 0}")],
}


def _edited(folder: Path, edits: list[Edit], file: str = "trades.yaml") -> Path:
    for old, new in edits:
        edit(folder / file, old, new)
    return folder


@pytest.mark.parametrize("kind", BREAKING)
def test_breaking_change_is_refused_by_name(contract_folder: Path, kind: str) -> None:
    where, edits = BREAKING[kind]
    changes = compare_contracts(BEFORE, load_contracts(_edited(contract_folder, [RAISED, *edits])))
    assert (where, kind, True) in {(change.where, change.kind, change.breaking) for change in changes}
    with pytest.raises(BreakingChangeError, match=rf"trades, {where}: {kind}: "):
        require_compatible(changes)


@pytest.mark.parametrize("kind", COMPATIBLE)
def test_compatible_change_is_listed_and_passes(contract_folder: Path, kind: str) -> None:
    changes = compare_contracts(BEFORE, load_contracts(_edited(contract_folder, [RAISED, *COMPATIBLE[kind]])))
    assert [(change.contract_id, change.kind) for change in changes] == [("trades", kind)]
    require_compatible(changes)


@pytest.mark.parametrize("version", ["1.0.0", "0.9.9"])
def test_change_without_a_raised_version_is_refused(contract_folder: Path, version: str) -> None:
    edits = [COMPATIBLE["field_added"][0], ("version: 1.0.0", f"version: {version}")]
    changes = compare_contracts(BEFORE, load_contracts(_edited(contract_folder, edits)))
    with pytest.raises(BreakingChangeError, match="version_not_raised"):
        require_compatible(changes)


def test_versions_are_compared_as_numbers(contract_folder: Path) -> None:
    old = load_contracts(_edited(contract_folder, [("version: 1.0.0", "version: 1.9.0")]))
    new = load_contracts(
        _edited(contract_folder, [("version: 1.9.0", "version: 1.10.0"), COMPATIBLE["field_added"][0]])
    )
    require_compatible(compare_contracts(old, new))


def test_field_removed_is_refused(contract_folder: Path) -> None:
    path = contract_folder / "trades.yaml"
    start, end = (path.read_text().index(f"      - name: {name}\n") for name in ("ts_receive", "raw_topic_id"))
    path.write_text(path.read_text()[:start] + path.read_text()[end:])
    changes = compare_contracts(BEFORE, load_contracts(_edited(contract_folder, [RAISED])))
    with pytest.raises(BreakingChangeError, match="1 breaking change: trades, ts_receive: field_removed"):
        require_compatible(changes)


def test_became_required_is_refused(contract_folder: Path) -> None:
    edits = [RAISED, ("required: false\n        description: Last venue id", "required: true\n        description: Last venue id")]  # fmt: skip  # noqa: E501
    changes = compare_contracts(BEFORE, load_contracts(_edited(contract_folder, edits, "market-gaps.yaml")))
    with pytest.raises(BreakingChangeError, match="market-gaps, id_before: became_required"):
        require_compatible(changes)


def test_provenance_change_is_named_once_and_asks_for_its_own_version(contract_folder: Path) -> None:
    edits = [("fieldId, value: 906}", "fieldId, value: 907}")]
    changes = compare_contracts(BEFORE, load_contracts(_edited(contract_folder, edits, "provenance.yaml")))
    assert [(change.contract_id, change.kind) for change in changes] == [
        ("provenance", "version_not_raised"),
        ("provenance", "field_id_changed"),
    ]


def test_removed_and_added_contracts(contract_folder: Path) -> None:
    (contract_folder / "commits.yaml").unlink()
    after = load_contracts(contract_folder)
    with pytest.raises(BreakingChangeError, match="commits, contract: contract_removed"):
        require_compatible(compare_contracts(BEFORE, after))
    require_compatible(compare_contracts(after, BEFORE))


def test_compatibility_none_forgives_fields_and_nothing_else(contract_folder: Path) -> None:
    none = [("compatibility, value: backward", "compatibility, value: none")]
    old = load_contracts(_edited(contract_folder, none))
    _edited(contract_folder, [RAISED, *BREAKING["enum_value_removed"][1]])
    require_compatible(compare_contracts(old, load_contracts(contract_folder)))
    _edited(contract_folder, BREAKING["partition_count_changed"][1])
    with pytest.raises(BreakingChangeError, match="partition_count_changed"):
        require_compatible(compare_contracts(old, load_contracts(contract_folder)))


def test_table_added_to_a_topic_is_compatible() -> None:
    trades = BEFORE["trades"]
    bare = replace(trades, table=None, fields=tuple(replace(f, field_id=None) for f in trades.own_fields))
    changes = compare_contracts(_only(bare), _only(replace(trades, version="1.1.0")))
    assert [change.kind for change in changes] == ["table_added"]


def test_the_same_contracts_have_no_changes() -> None:
    assert compare_contracts(BEFORE, load_contracts(FOLDER, topic_prefix="other.")) == []


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        ("int", "long", True),
        ("long", "int", False),
        ("decimal(10,2)", "decimal(12,2)", True),
        ("decimal(10, 2)", "decimal(12,2)", True),
        ("decimal(12,2)", "decimal(10,2)", False),
        ("decimal(10,2)", "decimal(12,3)", False),
        ("string", "binary", False),
        ("long", "timestamptz", False),
        ("long", "double", False),
    ],
)
def test_promotions_are_those_of_iceberg(old: str, new: str, allowed: bool) -> None:
    assert is_promotion(old, new) is allowed


SHAPES = st.lists(
    st.builds(
        FieldShape,
        name=st.sampled_from("abcdef"),
        field_id=st.integers(1, 8),
        type_name=st.sampled_from(["int", "long", "string", "decimal(10,2)", "decimal(12,2)"]),
        required=st.booleans(),
        description=st.just(""),
    ),
    max_size=6,
    unique_by=(lambda shape: shape.name, lambda shape: shape.field_id),
)


@given(old=SHAPES, new=SHAPES)
def test_what_passes_can_be_read_by_both_versions(old: list[FieldShape], new: list[FieldShape]) -> None:
    """Whatever two schemas: if no change is breaking, each old field is there under its id, name and a type that holds it."""  # noqa: E501
    changes = list(compare_fields(old, new))
    if any(change.breaking for change in changes):
        return
    after: Mapping[int | None, FieldShape] = {shape.field_id: shape for shape in new}
    for shape in old:
        other = after[shape.field_id]
        assert (other.name, other.required) == (shape.name, shape.required)
        assert other.type_name == shape.type_name or is_promotion(shape.type_name, other.type_name)
    old_names = {shape.name for shape in old}
    assert all(not shape.required for shape in new if shape.name not in old_names)


@given(shapes=SHAPES)
def test_nothing_changed_is_no_change(shapes: list[FieldShape]) -> None:
    assert list(compare_fields(shapes, list(reversed(shapes)))) == []


def _only(contract: Contract) -> Contracts:
    return Contracts({contract.id: contract})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return the contracts folder of a git repository whose HEAD has today's contracts."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    folder = copy_contracts(tmp_path / "repository" / "contracts")
    for arguments in (
        ["init", "-q", "."],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first"],
    ):
        subprocess.run([git, *arguments], cwd=folder.parent, check=True, capture_output=True)
    return folder


def _diff(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["contracts", "diff", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_diff_with_head_passes_without_and_with_compatible_changes(repository: Path) -> None:
    assert _diff("--folder", str(repository))[0] == 0
    _edited(repository, [RAISED, *COMPATIBLE["field_added"]])
    code, stdout, _ = _diff("--folder", str(repository), "--output", "json")
    assert code == 0
    result = json.loads(stdout)
    assert [(change["where"], change["kind"]) for change in result["changes"]] == [("venue_flag", "field_added")]


def test_diff_with_head_refuses_a_breaking_change(repository: Path) -> None:
    _edited(repository, [RAISED, *BREAKING["partition_count_changed"][1]])
    code, _, stderr = _diff("--folder", str(repository))
    assert code == 1
    assert "BreakingChangeError" in stderr
    assert "trades, topic: partition_count_changed: from 64 to 128" in stderr
    code, stdout, _ = _diff("--folder", str(repository), "--output", "json")
    assert (code, json.loads(stdout)["breaking"]) == (1, 1)


@pytest.mark.parametrize("revision", ["nowhere", "--help", "HEAD~5", ""])
def test_diff_with_an_unknown_revision_exits_with_2(repository: Path, revision: str) -> None:
    code, _, stderr = _diff("--folder", str(repository), f"--revision={revision}")
    assert (code, "Traceback" in stderr) == (2, False)


def test_diff_outside_a_repository_exits_with_2(contract_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(contract_folder.parent))
    code, _, stderr = _diff("--folder", str(contract_folder))
    assert code == 2
    assert "not a git repository" in stderr


def test_revision_with_a_broken_contract_names_revision_and_file(repository: Path) -> None:
    (repository / "trades.yaml").write_text("id: [")
    git = shutil.which("git") or "git"
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([git, *identity, "commit", "-qam", "broken"], cwd=repository, check=True, capture_output=True)
    with pytest.raises(ConfigurationError, match=r"HEAD:trades\.yaml is not valid YAML"):
        contracts_at(repository, "HEAD")
    assert set(contracts_at(repository, "HEAD~1")) == set(BEFORE)


Check = Callable[[str], bool]


@pytest.mark.parametrize(
    ("form", "check"),
    [
        ("odcs", lambda text: json.loads(text)["apiVersion"].startswith("v3")),
        ("json-schema", lambda text: "price" in json.loads(text)["properties"]),
        ("arrow", lambda text: json.loads(text)["fields"][4]["type"] == "decimal128(38, 18)"),
        ("iceberg", lambda text: json.loads(text)["schema"]["fields"][-1]["id"] == 906),
        ("topic", lambda text: json.loads(text)["config"]["cleanup.policy"] == "delete"),
    ],
)
def test_show_gives_each_form(form: str, check: Check) -> None:
    done = CliRunner().invoke(app, ["contracts", "show", "trades", "--format", form, "--output", "json"])
    assert done.exit_code == 0
    assert check(done.stdout)
    assert CliRunner().invoke(app, ["contracts", "show", "trades", "--format", form]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing"], 2, "no contract 'nothing'"),
        (["commits", "--format", "topic"], 2, "has no topic"),
        (["dlq", "--format", "arrow"], 2, "no contract 'dlq'"),
        (["queue-events", "--format", "iceberg"], 2, "has no table"),
        (["trades", "--format", "avro"], 2, "avro"),
        ([], 2, "Missing argument"),
    ],
)
def test_show_with_bad_input_exits_with_a_clear_error(arguments: list[str], code: int, said: str) -> None:
    done = CliRunner().invoke(app, ["contracts", "show", *arguments])
    assert (done.exit_code, said in done.stderr, "Traceback" in done.stderr) == (code, True, False)


def test_export_writes_one_file_a_contract(tmp_path: Path) -> None:
    target = tmp_path / "out"
    run = CliRunner()
    assert run.invoke(app, ["contracts", "export", str(target), "--dry-run"]).exit_code == 0
    assert not target.exists()
    assert run.invoke(app, ["contracts", "export", str(target), "--format", "iceberg"]).exit_code == 0
    assert {path.name for path in target.iterdir()} == {f"{item.id}.iceberg.json" for item in BEFORE.with_table}
    (tmp_path / "file").write_text("")
    assert run.invoke(app, ["contracts", "export", str(tmp_path / "file")]).exit_code == 2
