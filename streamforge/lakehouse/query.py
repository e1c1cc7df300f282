"""Ask the tables with SQL: PyIceberg plans, DuckDB reads the planned files. No extension, no network, no writes.

A query sees each table at its current table snapshot, as `<namespace>.<table>` or, for every namespace of the
catalog, by the table's name alone; `<table>_latest` is the view of the latest revisions where a contract has
revisions. Only the tables that the text mentions are planned.

DuckDB reads files of this machine lazily and by Iceberg's field ids. Tables elsewhere (object stores), and tables
with row-level deletes, are read by PyIceberg into memory first, whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.table import FileScanTask, Table
from pyiceberg.types import NestedField

from streamforge.contracts import Contract, Contracts
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.catalog import CATALOG_ERRORS, open_catalog
from streamforge.lakehouse.views import LATEST_SUFFIX, latest_sql
from streamforge.settings import Settings

if TYPE_CHECKING:
    import duckdb

_DUCKDB_TYPES = {
    "boolean": "BOOLEAN",
    "int": "INTEGER",
    "long": "BIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
    "date": "DATE",
    "string": "VARCHAR",
    "binary": "BLOB",
    "timestamp": "TIMESTAMP",
    "timestamptz": "TIMESTAMP WITH TIME ZONE",
}
_FETCH_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class QueryTable:
    """A table that can be asked, and what it is.

    Args:
        name: table with its namespace.
        view: the view of its latest revisions, None where rows have no revisions.
        rows: rows of the current table snapshot; None where the snapshot's summary does not say.
    """

    name: str
    view: str | None
    rows: int | None
    purpose: str
    columns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The first rows of a result; `is_cut` says that there are more."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    is_cut: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """A table of the catalog and, where it has one, its contract."""

    namespace: str
    name: str
    contract: Contract | None

    @property
    def view(self) -> str | None:
        """Return the name of the view of the latest revisions."""
        table = self.contract.table if self.contract is not None else None
        return f"{self.name}{LATEST_SUFFIX}" if table is not None and table.latest_by else None

    def load(self, catalog: Catalog) -> Table:
        """Load the table.

        Raises:
            ConfigurationError: it cannot be loaded; names the table.
        """
        try:
            return catalog.load_table((*self.namespace.split("."), self.name))
        except CATALOG_ERRORS as error:
            msg = f"table {self.namespace}.{self.name} cannot be loaded from the catalog: {error}"
            raise ConfigurationError(msg) from error


def list_tables(settings: Settings, contracts: Contracts) -> list[QueryTable]:
    """Return every table of the catalog that SQL can name.

    Raises:
        ConfigurationError: the catalog or a table cannot be read.
    """
    catalog = open_catalog(settings)
    return [_described(source, source.load(catalog)) for source in _sources(catalog, settings, contracts)]


def ask(settings: Settings, contracts: Contracts, text: str, *, limit_rows: int) -> Answer:
    """Run one SQL statement on the tables and return its first rows.

    Raises:
        ConfigurationError: the statement is wrong, or a table cannot be read; names the tables that there are.
    """
    duckdb = duckdb_module()
    catalog = open_catalog(settings)
    sources = list(_sources(catalog, settings, contracts))
    with connected(settings.home_path / "duckdb") as connection:
        _define(connection, catalog, sources, text)
        try:
            result = connection.execute(text)
            return _first_rows(result.to_arrow_reader(_FETCH_ROWS), limit_rows)
        except duckdb.Error as error:
            names = ", ".join(f"{item.namespace}.{item.name}" for item in sources) or "none yet"
            msg = f"the query cannot be answered: {error}\ntables are: {names}"
            raise ConfigurationError(msg) from error


@contextmanager
def connected(spill_folder: Path, **config: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open DuckDB in memory: no extension is fetched, times are UTC.

    Args:
        spill_folder: where what is larger than memory goes; DuckDB's own choice is the working directory.
        config: further options of DuckDB.
    """
    offline = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    with duckdb_module().connect(config={**offline, "temp_directory": str(spill_folder), **config}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        yield connection


def duckdb_module() -> Any:
    """Return the module; it belongs to a dependency group that the data plane runs without."""
    try:
        import duckdb  # noqa: PLC0415
    except ImportError as error:
        msg = "DuckDB is not installed: it comes with the dependency group `spark` (`uv sync --group spark`)"
        raise ConfigurationError(msg) from error
    return duckdb


def _sources(catalog: Catalog, settings: Settings, contracts: Contracts) -> Iterator[_Source]:
    by_table = {item.table.name: item for item in contracts.with_table if item.table is not None}
    try:
        found = [
            (".".join(namespace), str(identifier[-1]))
            for namespace in catalog.list_namespaces()
            for identifier in catalog.list_tables(namespace)
        ]
    except CATALOG_ERRORS as error:
        msg = f"the tables of the catalog {settings.catalog_name} cannot be listed: {error}"
        raise ConfigurationError(msg) from error
    for namespace, name in sorted(found):
        yield _Source(namespace, name, by_table.get(name) if namespace == settings.namespace else None)


def _described(source: _Source, table: Table) -> QueryTable:
    snapshot = table.current_snapshot()
    summary = snapshot.summary if snapshot is not None else {"total-records": "0"}
    total = summary["total-records"] if summary is not None else None
    return QueryTable(
        name=f"{source.namespace}.{source.name}",
        view=f"{source.namespace}.{source.view}" if source.view else None,
        rows=int(total) if total is not None else None,
        purpose=source.contract.purpose if source.contract else table.properties.get("comment", ""),
        columns=tuple((field.name, str(field.field_type)) for field in table.schema().fields),
    )


def _define(connection: duckdb.DuckDBPyConnection, catalog: Catalog, sources: list[_Source], text: str) -> None:
    """Make one view for each table that `text` mentions, or for all where it mentions none (`SHOW TABLES`)."""
    words = {word.lower() for word in re.findall(r"\w+", text)}
    mentioned = [item for item in sources if words & {item.name.lower(), (item.view or item.name).lower()}]
    # Namespace of the contracts first: its tables are found by their name alone where others have the same.
    namespaces = dict.fromkeys(item.namespace for item in sorted(sources, key=lambda item: item.contract is None))
    for namespace in namespaces:
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(namespace)}")
    for source in mentioned or sources:
        relation = f"{quoted(source.namespace)}.{quoted(source.name)}"
        _define_table(connection, source.load(catalog), relation)
        if source.contract is not None and source.view is not None:
            view = f"{quoted(source.namespace)}.{quoted(source.view)}"
            connection.execute(f"CREATE VIEW {view} AS {latest_sql(source.contract, relation)}")
    if namespaces:
        connection.execute(f"SET search_path = {sql_text(','.join(quoted(item) for item in namespaces))}")


def _define_table(connection: duckdb.DuckDBPyConnection, table: Table, relation: str) -> None:
    fields = table.schema().fields
    tasks = list(table.scan().plan_files())
    types = {field.field_id: _duckdb_type(field) for field in fields}
    paths = [_local_path(task) for task in tasks]
    if None in types.values() or None in paths:
        name = f"rows of {relation}"
        connection.register(name, table.scan().to_arrow())
        connection.execute(f"CREATE VIEW {relation} AS SELECT * FROM {quoted(name)}")  # noqa: S608
    elif not paths:
        columns = ", ".join(f"NULL::{types[field.field_id]} AS {quoted(field.name)}" for field in fields)
        connection.execute(f"CREATE VIEW {relation} AS SELECT {columns} WHERE false")
    else:
        schema = ", ".join(
            f"{field.field_id}: {{name: {sql_text(field.name)}, type: '{types[field.field_id]}', default_value: NULL}}"
            for field in fields
        )
        files = ", ".join(sql_text(str(path)) for path in paths)
        reader = f"read_parquet([{files}], schema = MAP {{{schema}}}, hive_partitioning = false)"
        connection.execute(f"CREATE VIEW {relation} AS SELECT * FROM {reader}")  # noqa: S608


def _local_path(task: FileScanTask) -> Path | None:
    """Return where the file lies on this machine, None where DuckDB cannot read it as it is."""
    location = urlparse(task.file.file_path)
    if task.delete_files or location.scheme not in ("", "file"):
        return None
    # Not decoded: a percent sign stands in the file's very name where a partition value was escaped.
    return Path(location.path)


def _duckdb_type(field: NestedField) -> str | None:
    name = str(field.field_type)
    return name.upper() if name.startswith("decimal(") else _DUCKDB_TYPES.get(name)


def _first_rows(reader: pa.RecordBatchReader, limit_rows: int) -> Answer:
    rows: list[tuple[Any, ...]] = []
    for batch in reader:
        rows += zip(*(column.to_pylist() for column in batch.columns), strict=True)
        if len(rows) > limit_rows:
            break
    return Answer(tuple(reader.schema.names), rows[:limit_rows], len(rows) > limit_rows)


def quoted(name: str) -> str:
    """Return a name as SQL spells it."""
    return '"' + name.replace('"', '""') + '"'


def sql_text(value: str) -> str:
    """Return a text as SQL spells it."""
    return "'" + value.replace("'", "''") + "'"
