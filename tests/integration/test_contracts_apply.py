"""Contracts reach real tables: every field by its id, and a new optional field by an edit of one file."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from typer.testing import CliRunner

from cli.app import app
from streamforge.contracts import Contract, Contracts, load_contracts
from streamforge.errors import BreakingChangeError
from streamforge.lakehouse.catalog import ensure_table, ensure_tables, open_catalog
from streamforge.lakehouse.evolution import apply_tables, evolve_table, plan_tables
from streamforge.settings import Settings
from tests.contract_files import ADDED_FIELD, FOLDER, edit

CONTRACTS = load_contracts(FOLDER)
RAW_INDEX = "- name: raw_index\n        logicalType: integer\n        physicalType: "


@pytest.fixture
def local(tmp_path: Path, contract_folder: Path) -> Settings:
    """Return settings with a catalog of its own and a copy of the contracts; no broker."""
    return Settings(_env_file=None, home=tmp_path / "home", contracts_dir=contract_folder)  # type: ignore[call-arg]


@pytest.fixture
def catalog(local: Settings) -> Catalog:
    return open_catalog(local)


def _load(local: Settings) -> Contracts:
    return load_contracts(local.contracts_dir)


def _add_field(local: Settings) -> Contract:
    edit(local.contracts_dir / "trades.yaml", "slaProperties:", ADDED_FIELD)
    edit(local.contracts_dir / "trades.yaml", "version: 1.0.0", "version: 1.1.0")
    return _load(local)["trades"]


def _row(contract: Contract, **values: Any) -> pa.Table:
    zero: dict[str, Any] = {
        "string": "x", "int": 1, "long": 1, "timestamptz": 1_700_000_000_000_000, "binary": b"", "decimal(38,18)": 1,
    }  # fmt: skip
    row = {item.name: zero[item.type_name] for item in contract.fields if item.required} | values
    return pa.Table.from_pylist([row], schema=contract.arrow_schema)


def _apply(local: Settings, catalog: Catalog) -> None:
    apply_tables(catalog, local, plan_tables(catalog, local, _load(local)))


@pytest.mark.parametrize("contract", CONTRACTS.with_table, ids=lambda contract: contract.id)
def test_every_field_reaches_the_created_table(local: Settings, catalog: Catalog, contract: Contract) -> None:
    table = ensure_table(catalog, local, contract)
    found = {field.name: field for field in catalog.load_table(table.name()).schema().fields}
    assert list(found) == [item.name for item in contract.fields]
    for item in contract.fields:
        field = found[item.name]
        assert (field.field_id, str(field.field_type).replace(" ", "")) == (item.field_id, item.type_name)
        assert (field.required, field.doc) == (item.required, item.description)
    spec = [(str(field.transform), table.schema().find_column_name(field.source_id)) for field in table.spec().fields]
    assert contract.table is not None
    assert spec == list(contract.table.partition_by)


def test_an_added_optional_field_is_one_edit_and_old_rows_read_null(local: Settings, catalog: Catalog) -> None:
    before = _load(local)["trades"]
    table = ensure_table(catalog, local, before)
    table.append(_row(before, trade_id="old"))
    changed = _add_field(local)
    _apply(local, catalog)
    table = catalog.load_table(table.name())
    assert table.schema().find_field("venue_flag").field_id == 26
    table.append(_row(changed, trade_id="new", venue_flag="block"))
    # A writer that still has the old contract goes on.
    catalog.load_table(table.name()).append(_row(before, trade_id="late"))
    rows = {row["trade_id"]: row["venue_flag"] for row in _rows(catalog, table)}
    assert rows == {"old": None, "new": "block", "late": None}


def test_apply_touches_neither_properties_nor_snapshots_and_is_one_commit(local: Settings, catalog: Catalog) -> None:
    before = _load(local)["trades"]
    table = ensure_table(catalog, local, before)
    with table.transaction() as transaction:
        transaction.set_properties({"streamforge.position.1.0": "mine"})
    table.append(_row(before))
    old = catalog.load_table(table.name())
    _add_field(local)
    _apply(local, catalog)
    new = catalog.load_table(table.name())
    assert new.properties == old.properties
    assert new.metadata.snapshots == old.metadata.snapshots
    assert new.metadata.current_snapshot_id == old.metadata.current_snapshot_id
    assert len(new.metadata.metadata_log) == len(old.metadata.metadata_log) + 1
    assert len(new.schemas()) == len(old.schemas()) + 1
    _apply(local, catalog)
    assert catalog.load_table(table.name()).metadata_location == new.metadata_location


def test_apply_lands_beside_a_writer_that_commits_all_the_time(local: Settings, catalog: Catalog) -> None:
    before = _load(local)["trades"]
    name = ensure_table(catalog, local, before).name()
    done = threading.Event()
    failures: list[Exception] = []
    landed: list[int] = []

    def write() -> None:
        own = open_catalog(local)
        while not done.is_set():
            try:
                own.load_table(name).append(_row(before, trade_id=str(len(landed))))
                landed.append(1)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                failures.append(error)
                return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        changed = _add_field(local)
        assert evolve_table(catalog, (name[0], name[1]), changed)
    finally:
        done.set()
        thread.join(30)
    assert not failures
    table = catalog.load_table(name)
    assert len(_rows(catalog, table)) == len(landed)
    assert table.schema().find_field(26).name == "venue_flag"


def test_a_type_is_widened_and_old_values_stay(local: Settings, catalog: Catalog) -> None:
    before = _load(local)["trades"]
    table = ensure_table(catalog, local, before)
    table.append(_row(before, raw_index=2**31 - 1))
    edit(local.contracts_dir / "trades.yaml", RAW_INDEX + "int\n", RAW_INDEX + "long\n")
    _apply(local, catalog)
    table = catalog.load_table(table.name())
    assert str(table.schema().find_field("raw_index").field_type) == "long"
    table.append(_row(_load(local)["trades"], raw_index=2**40))
    assert sorted(row["raw_index"] for row in _rows(catalog, table)) == [2**31 - 1, 2**40]


def test_descriptions_are_applied(local: Settings, catalog: Catalog) -> None:
    ensure_tables(catalog, local, _load(local))
    edit(local.contracts_dir / "bars.yaml", "Highest price.", "The highest price.")
    plans = [plan for plan in plan_tables(catalog, local, _load(local)) if not plan.is_empty]
    assert [(plan.contract.id, [change.kind for change in plan.changes]) for plan in plans] == [
        ("bars", ["description_changed"])
    ]
    _apply(local, catalog)
    assert catalog.load_table((local.namespace, "bars")).schema().find_field("high").doc == "The highest price."


EPOCH = "required: false\n        description: One per Kafka"
BREAKING = {
    "type_changed": (RAW_INDEX + "int\n", RAW_INDEX + "string\n"),
    "field_renamed": ("- name: parser_version", "- name: made_by"),
    "became_required": (EPOCH, EPOCH.replace("false", "true")),
    "partition_spec_changed": ("day(ts_event)", "hour(ts_event)"),
}


@pytest.mark.parametrize("kind", BREAKING)
def test_a_breaking_change_of_a_live_table_is_refused_and_nothing_is_done(
    local: Settings, catalog: Catalog, kind: str
) -> None:
    before = ensure_tables(catalog, local, _load(local))
    old, new = BREAKING[kind]
    edit(local.contracts_dir / ("provenance.yaml" if kind == "became_required" else "trades.yaml"), old, new)
    edit(local.contracts_dir / "bars.yaml", "Highest price.", "The highest price.")
    with pytest.raises(BreakingChangeError, match=rf"trades, \w+: {kind}"):
        _apply(local, catalog)
    for table in before.values():
        assert catalog.load_table(table.name()).metadata_location == table.metadata_location


def test_an_older_contract_does_not_take_a_column_away(local: Settings, catalog: Catalog) -> None:
    older = _load(local)
    ensure_table(catalog, local, _add_field(local))
    with pytest.raises(BreakingChangeError, match="trades, venue_flag: field_removed"):
        apply_tables(catalog, local, plan_tables(catalog, local, older))


def test_the_id_of_a_dropped_column_is_never_taken_again(local: Settings, catalog: Catalog) -> None:
    table = ensure_table(catalog, local, _add_field(local))
    with table.update_schema(allow_incompatible_changes=True) as update:
        update.delete_column("venue_flag")
    edit(local.contracts_dir / "trades.yaml", "- name: venue_flag", "- name: other_flag")
    with pytest.raises(BreakingChangeError, match="trades, other_flag: field_id_reused: fieldId 26 was that of 'venue"):
        _apply(local, catalog)


@pytest.mark.integration
def test_command_applies_to_topics_and_tables_after_a_dry_run(
    platform: Settings, contract_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in contract_folder.glob("*.yaml"):
        path.write_text(path.read_text().replace("topic.partitions, value: 64", "topic.partitions, value: 2"))
    for name in ("home", "bootstrap_servers", "topic_prefix"):
        monkeypatch.setenv(f"STREAMFORGE_{name.upper()}", str(getattr(platform, name)))
    monkeypatch.setenv("STREAMFORGE_CONTRACTS_DIR", str(contract_folder))
    dry = _invoke("contracts", "apply", "--dry-run")
    assert {item["action"] for item in dry["topics"] + dry["tables"]} == {"create"}
    assert _invoke("contracts", "diff", "--live")["breaking"] == 0
    assert _invoke("contracts", "apply", "--dry-run") == dry, "a dry run changes nothing"
    _invoke("contracts", "apply")
    assert {item["action"] for kind in ("topics", "tables") for item in _invoke("contracts", "apply")[kind]} == {"keep"}
    assert _invoke("contracts", "diff", "--live")["changes"] == []
    edit(contract_folder / "trades.yaml", "slaProperties:", ADDED_FIELD)
    applied = _invoke("contracts", "apply")["tables"]
    assert [item["contract"] for item in applied if item["action"] == "evolve"] == ["trades"]
    edit(contract_folder / "trades.yaml", "topic.partitions, value: 2", "topic.partitions, value: 3")
    assert _invoke("contracts", "diff", "--live", code=1)["breaking"] == 1
    assert "SchemaMismatchError" in _invoke("contracts", "apply", code=1)["error"]


def _invoke(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--output", "json"])
    assert done.exit_code == code, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _rows(catalog: Catalog, table: Table) -> list[dict[str, Any]]:
    data: pa.Table = catalog.load_table(table.name()).scan().to_arrow()
    return data.to_pylist()
