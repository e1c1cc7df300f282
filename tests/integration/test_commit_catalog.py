"""The catalog: tables as their contracts say, the proof that it compares and sets, and what we use of PyIceberg."""

from __future__ import annotations

import inspect
import socket
import threading
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.io.pyarrow import _dataframe_to_data_files
from pyiceberg.types import LongType

from streamforge.contracts import load_contracts
from streamforge.diagnosis import Level, diagnose
from streamforge.errors import CommitError, ConfigurationError, RetryableSourceError, SchemaMismatchError
from streamforge.lakehouse import catalog as catalogs
from streamforge.lakehouse.catalog import ensure_tables, open_catalog, probe_compare_and_set
from streamforge.lakehouse.manifests import write_data_files
from streamforge.settings import Settings
from tests.lax_catalog import let_the_last_write_win
from tests.table_rig import Rig


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, home=tmp_path)  # type: ignore[call-arg]


def test_ensure_tables_have_field_ids_spec_and_format_of_their_contracts(settings: Settings) -> None:
    contracts = load_contracts(settings.contracts_dir)
    tables = ensure_tables(open_catalog(settings), settings, contracts)
    assert tables.keys() == {item.id for item in contracts.with_table}
    for name, table in tables.items():
        contract = contracts[name]
        found = {field.name: field.field_id for field in table.schema().fields}
        assert found == {item.name: item.field_id for item in contract.fields}
        assert table.spec().fields == contract.partition_spec.fields
        assert table.format_version == 2
    again = ensure_tables(open_catalog(settings), settings, contracts)
    assert {name: table.metadata.table_uuid for name, table in again.items()} == {
        name: table.metadata.table_uuid for name, table in tables.items()
    }


def test_data_files_carry_the_contracts_field_ids_and_zstd(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    files = write_data_files(rig.fresh(), rig.rows([(0, 1), (0, 2)]))
    parquet = pq.ParquetFile(files[0].file_path.removeprefix("file://"))
    ids = {field.name: int(field.metadata[b"PARQUET:field_id"]) for field in parquet.schema_arrow}
    assert ids == {item.name: item.field_id for item in rig.contract.fields}
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"


def test_table_that_lacks_a_contract_field_is_refused_and_names_it(settings: Settings) -> None:
    contracts = load_contracts(settings.contracts_dir)
    catalog = open_catalog(settings)
    table = ensure_tables(catalog, settings, contracts)["trades"]
    with table.update_schema(allow_incompatible_changes=True) as change:
        change.delete_column("aggressor_side")
    with pytest.raises(SchemaMismatchError, match=r"'aggressor_side'.*streamforge contracts apply"):
        catalogs.load_table(catalog, settings, contracts["trades"])


def test_table_with_an_optional_field_of_a_newer_contract_still_takes_rows(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    with rig.fresh().update_schema() as change:
        change.add_column("newer", LongType())
    writer = rig.writer()
    catalogs.check_schema(writer.table, rig.contract)
    writer.claim()
    writer.land(5)
    rig.assert_exact(5)


def test_table_absent_is_a_clear_error(settings: Settings) -> None:
    catalog = open_catalog(settings)
    with pytest.raises(ConfigurationError, match="streamforge contracts apply"):
        catalogs.load_table(catalog, settings, load_contracts(settings.contracts_dir)["trades"])


def test_catalog_that_cannot_be_opened_hides_the_password(tmp_path: Path) -> None:
    wrong = Settings(_env_file=None, home=tmp_path, catalog_uri="nosuch://me:secret@host/db")  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="STREAMFORGE_CATALOG_URI") as error:
        open_catalog(wrong)
    assert "secret" not in str(error.value)


def test_catalog_opened_for_the_first_time_by_many_at_once_opens_for_all(settings: Settings) -> None:
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            open_catalog(settings)
        except ConfigurationError as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_probe_of_the_embedded_catalog_passes_and_leaves_nothing(settings: Settings) -> None:
    assert "exactly one passed" in probe_compare_and_set(settings)
    assert open_catalog(settings).list_tables(settings.namespace) == []


def test_probe_of_a_catalog_where_the_last_write_wins_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_last_write_win(monkeypatch)
    with pytest.raises(CommitError, match="does not compare and set"):
        probe_compare_and_set(settings)
    (finding,) = (each for each in diagnose(settings) if each.check == "catalog")
    assert finding.level is Level.PROBLEM
    assert "does not compare and set" in finding.found


def test_rest_catalog_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogs, "REQUEST_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        silent = Settings(_env_file=None, home=tmp_path, catalog_type="rest", catalog_uri=uri)  # type: ignore[call-arg]
        with pytest.raises(RetryableSourceError, match=r"(?i)timed? ?out"):
            open_catalog(silent)


def test_internals_of_pyiceberg_that_we_rely_on_are_those_of_the_pinned_version() -> None:
    assert version("pyiceberg") == "0.12.0"
    for kind in (SqlCatalog, RestCatalog):
        assert list(inspect.signature(kind.commit_table).parameters) == ["self", "table", "requirements", "updates"]
        source = inspect.getsource(kind.commit_table)
        assert "delete" not in source, "a commit must not delete files"
        assert "sleep" not in source, "a commit is sent once"
    # One compare-and-set on the pointer, after the requirements were checked on the metadata it is built from.
    assert "metadata_location == current_table.metadata_location" in inspect.getsource(SqlCatalog.commit_table)
    assert "requirement.validate(current_table.metadata" in inspect.getsource(SqlCatalog._update_and_stage_table)
    assert list(inspect.signature(RestCatalog._create_session).parameters) == ["self"]
    assert {"table_metadata", "df", "io", "write_uuid"} <= inspect.signature(_dataframe_to_data_files).parameters.keys()
