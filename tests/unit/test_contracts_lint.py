"""Lint names file, line and place of everything that is wrong, and never fails with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.app import app
from streamforge.contract_lint import Finding, lint_folder
from streamforge.errors import ConfigurationError
from tests.contract_files import FOLDER, edit

Spoil = Callable[[Path], object]


@pytest.fixture
def small_folder(contract_folder: Path) -> Path:
    """Return a folder with trades, its provenance and its dead letters only."""
    for path in contract_folder.iterdir():
        if path.stem not in ("trades", "provenance", "dlq"):
            path.unlink()
    edit(
        contract_folder / "dlq.yaml",
        "[letter-decisions, raw-candles-backfill, venue-bars, predictions, raw-trades, raw-depth, trades, bars, "
        "market-gaps]",
        "[trades]",
    )
    edit(contract_folder / "trades.yaml", "  - {property: topic.inputs, value: [raw-trades]}\n", "")
    return contract_folder


def test_our_contracts_have_no_finding() -> None:
    assert lint_folder(FOLDER).findings == ()


EVENT_NS = "derivedFrom, value: ts_event_ns"
DERIVED = f"          - {{property: from, value: derived}}\n          - {{property: {EVENT_NS}}}\n"
KEY_TEXT = "        description: Instrument as BASE-QUOTE.VENUE; the record's key.\n"
SECOND = "  - {name: b, properties: [{name: a, logicalType: string}]}\n"
MUST_BE = "        mustBe: 0\n"
BROKEN: list[tuple[str, str, Spoil]] = [
    ("yaml", "$", lambda p: p.write_text("id: [\n")),
    ("yaml", "$", lambda p: p.write_text("- 1\n")),
    ("yaml", "$", lambda p: p.write_text("")),
    ("yaml", "$", lambda p: p.write_bytes(b"id: \xff\n")),
    ("yaml", "$", lambda p: p.write_text("id: !!python/object:os.system x\n")),
    ("standard", "$", lambda p: edit(p, "status: active", "status: active\ncolour: red")),
    ("standard", "$", lambda p: edit(p, "version: 1.0.0\n", "")),
    ("standard", "$.schema[0].properties[0].required", lambda p: edit(p, "required: true", "required: perhaps")),
    ("standard", "$.schema[0].properties[0]", lambda p: edit(p, "required: true", "needed: true")),
    ("repeated-key", "$.status", lambda p: edit(p, "status: active", "status: active\nstatus: draft")),
    ("one-schema", "$", lambda p: edit(p, "slaProperties:", SECOND + "slaProperties:")),
    ("id-is-file-name", "$.id", lambda p: edit(p, "id: trades\n", "id: deals\n")),
    ("logical-type", "$.schema[0].properties[7]", lambda p: edit(p, "logicalType: integer", "logicalType: number")),
    ("profile", "$.schema[0].properties[7]", lambda p: edit(p, "physicalType: long", "physicalType: int128")),
    ("profile", "$", lambda p: edit(p, "topic.partitions, value: 64", "topic.partitions, value: 0")),
    ("profile", "$", lambda p: edit(p, "topic.partitions", "topic.parts")),
    ("profile", "$", lambda p: edit(p, "compatibility, value: backward", "compatibility, value: sideways")),
    ("profile", "$.schema[0].properties[8]", lambda p: edit(p, "value: derived}", "value: guessed}")),
    ("profile", "$", lambda p: edit(p, "value: 7, unit: d", "value: 7, unit: y")),
    ("field-id-unique", "$.schema[0].properties[3]", lambda p: edit(p, "fieldId, value: 4}", "fieldId, value: 3}")),
    ("field-id-unique", "$", lambda p: edit(p, "fieldId, value: 4}", "fieldId, value: 901}")),
    ("field-id", "$.schema[0].properties[3]", lambda p: edit(p, "fieldId, value: 4}", "fieldId, value: 1000}")),
    ("field-id", "$.schema[0].properties[3]", lambda p: edit(p, "fieldId, value: 4}", "from, value: value}")),
    ("field-name-unique", "$.schema[0].properties[1]", lambda p: edit(p, "- name: symbol", "- name: venue")),
    ("field-exists", "$", lambda p: edit(p, "value: [instrument]", "value: [ticker]")),
    ("field-exists", "$", lambda p: edit(p, "day(ts_event)", "day(ts_elsewhere)")),
    ("partition-type", "$.schema[0].properties[7]", lambda p: edit(p, "day(ts_event)", "day(ts_event_ns)")),
    ("derived-from", "$.schema[0].properties[8]", lambda p: edit(p, EVENT_NS, "derivedFrom, value: x")),
    ("derived-from", "$.schema[0].properties[8]", lambda p: edit(p, EVENT_NS, "derivedFrom, value: price")),
    ("derived-from", "$.schema[0].properties[8]", lambda p: edit(p, "value: derived}", "value: writer}")),
    ("wire-type", "$.schema[0].properties[8]", lambda p: edit(p, DERIVED, "")),
    ("description", "$.schema[0].properties[0]", lambda p: edit(p, KEY_TEXT, "")),
    ("description", "$.schema[0].properties[6]", lambda p: edit(p, "Side of the taker.", "Side of the taker")),
    ("owner", "$", lambda p: edit(p, "team:\n  name: market-data\n", "")),
    ("purpose", "$", lambda p: edit(p, "  purpose: Every", "  usage: Every")),
    ("version", "$", lambda p: edit(p, "version: 1.0.0", 'version: "1"')),
    ("topic-key", "$", lambda p: edit(p, "  - {property: topic.key, value: [instrument]}\n", "")),
    ("retention", "$", lambda p: edit(p, "  - {property: retention, value: 7, unit: d}\n", "")),
    ("bytes-topic", "$.schema[0].properties[0]", lambda p: edit(p, "value: json}", "value: bytes}")),
    ("quality-id", "$", lambda p: edit(p, "id: one_row_per_raw_event", "id: one_row_per_trade")),
    ("quality-field", "$", lambda p: edit(p, "[venue, symbol, trade_id]", "[venue, symbol, deal_id]")),
    ("quality-query", "$", lambda p: edit(p, "FROM {table} WHERE", "FROM trades WHERE")),
    ("standard", "$.schema[0].quality[0]", lambda p: edit(p, MUST_BE, MUST_BE + "        mustNotBe: 1\n")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "place", "spoil"), BROKEN)
def test_finding_names_rule_file_line_and_place(small_folder: Path, rule: str, place: str, spoil: Spoil) -> None:
    path = small_folder / "trades.yaml"
    spoil(path)
    findings = [finding for finding in lint_folder(small_folder).findings if finding.file == str(path)]
    assert (rule, place) in {(finding.rule, finding.place) for finding in findings}, findings
    lines = len(path.read_bytes().splitlines())
    assert all(1 <= finding.line <= lines + 1 for finding in findings)


def test_line_is_that_of_the_place(small_folder: Path) -> None:
    path = small_folder / "trades.yaml"
    edit(path, "fieldId, value: 4}", "fieldId, value: 3}")
    [finding] = lint_folder(small_folder).findings
    assert path.read_text().splitlines()[finding.line - 1].strip() == "- name: trade_id"


def test_every_finding_is_named_and_not_only_the_first(contract_folder: Path) -> None:
    edit(contract_folder / "trades.yaml", "Side of the taker.", "Side of the taker")
    edit(contract_folder / "bars.yaml", "team:\n  name: market-data\n", "")
    edit(contract_folder / "dlq.yaml", "topic.partitions, value: 4", "topic.partitions, value: four")
    rules = {(Path(finding.file).name, finding.rule) for finding in lint_folder(contract_folder).findings}
    assert rules == {("trades.yaml", "description"), ("bars.yaml", "owner"), ("dlq.yaml", "profile")}


def test_product_without_dead_letters_is_found(contract_folder: Path) -> None:
    edit(contract_folder / "dlq.yaml", "trades, bars, market-gaps]", "bars, market-gaps]")
    [finding] = [f for f in lint_folder(contract_folder).findings if f.file.endswith("trades.yaml")]
    assert finding.rule == "dlq-complete"
    edit(contract_folder / "dlq.yaml", "bars, market-gaps]", "trades, bars, market-gaps, deals]")
    [finding] = lint_folder(contract_folder).findings
    assert (finding.rule, Path(finding.file).name) == ("dlq-of-nothing", "dlq.yaml")


def test_two_files_with_one_id_are_found(contract_folder: Path) -> None:
    text = (contract_folder / "dlq.yaml").read_text()
    (contract_folder / "dlq2.yaml").write_text(text.replace("id: dlq", "id: dlq2", 1))
    assert any("ids must be unique" in finding.message for finding in lint_folder(contract_folder).findings)


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 4_000), junk=st.text(max_size=20))
def test_no_spoilt_text_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: str) -> None:
    folder = tmp_path_factory.mktemp("spoilt")
    text = (FOLDER / "trades.yaml").read_text()
    (folder / "trades.yaml").write_text(text[:cut] + junk + text[cut + len(junk) :], encoding="utf-8", errors="replace")
    assert all(isinstance(finding, Finding) for finding in lint_folder(folder).findings)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no \*\.yaml"):
        lint_folder(tmp_path)


def test_command_exits_with_1_and_lists_findings_as_json(contract_folder: Path) -> None:
    edit(contract_folder / "trades.yaml", "fieldId, value: 4}", "fieldId, value: 3}")
    done = CliRunner().invoke(app, ["contracts", "lint", "--folder", str(contract_folder), "--output", "json"])
    assert done.exit_code == 1
    [finding] = json.loads(done.stdout)["findings"]
    assert (finding["rule"], finding["place"]) == ("field-id-unique", "$.schema[0].properties[3]")


def test_command_exits_with_0_and_says_so_without_findings() -> None:
    done = CliRunner().invoke(app, ["contracts", "lint"])
    assert (done.exit_code, "nothing found" in done.stdout) == (0, True)


def test_command_exits_with_2_for_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["contracts", "lint", "--folder", str(tmp_path / "absent")])
    assert done.exit_code == 2
    assert "absent" in done.stderr


def test_product_made_from_nothing_is_found(contract_folder: Path) -> None:
    edit(contract_folder / "bars.yaml", "topic.inputs, value: [trades]", "topic.inputs, value: [deals]")
    [finding] = lint_folder(contract_folder).findings
    assert (finding.rule, Path(finding.file).name) == ("input-exists", "bars.yaml")
