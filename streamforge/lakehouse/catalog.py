"""The Iceberg catalog: opened from settings, tables made from contracts, and the proof that it compares.

Two things PyIceberg does not do for us. `create_table` gives fields new ids; we send the creation as
updates of our own, so that ids are those of the contract. The REST client has no timeout; ours has.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyiceberg.exceptions
import requests
from filelock import FileLock
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    RESTError,
    ServerError,
    ServiceUnavailableError,
    TableAlreadyExistsError,
    TooManyRequestsError,
)
from pyiceberg.partitioning import PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.sorting import UNSORTED_SORT_ORDER
from pyiceberg.table.update import (
    AddPartitionSpecUpdate,
    AddSchemaUpdate,
    AddSortOrderUpdate,
    AssertCreate,
    AssignUUIDUpdate,
    SetCurrentSchemaUpdate,
    SetDefaultSortOrderUpdate,
    SetDefaultSpecUpdate,
    SetLocationUpdate,
    SetPropertiesUpdate,
    TableUpdate,
    UpgradeFormatVersionUpdate,
)
from pyiceberg.typedef import Identifier
from requests import PreparedRequest, Response, Session
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from streamforge.contracts import Contract, Contracts
from streamforge.errors import (
    CommitConflictError,
    CommitError,
    ConfigurationError,
    RetryableSourceError,
    SchemaMismatchError,
    TableMissingError,
)
from streamforge.lakehouse.store_properties import s3_properties, signing_properties
from streamforge.settings import Settings

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
FORMAT_VERSION = 2
RACING_PROBES = 4
_OPEN_ATTEMPTS = 3

TABLE_PROPERTIES = {
    "write.parquet.compression-codec": "zstd",
    # A dictionary that grows to PyIceberg's 2 MiB costs more than it saves where values rarely repeat (ADR 0086).
    "write.parquet.dict-size-bytes": "65536",
    "write.parquet.page-size-bytes": "262144",
    # Metadata files are one per commit: a day of 2 s commits would leave 43,200 of them behind each table.
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "100",
}

CATALOG_ERRORS: tuple[type[Exception], ...] = (
    OSError,  # files, sockets; requests' and pyarrow's errors are OSErrors or ValueErrors
    ValueError,
    RuntimeError,
    LookupError,
    SQLAlchemyError,
    sqlite3.Error,
    *(
        item
        for item in vars(pyiceberg.exceptions).values()
        if isinstance(item, type) and issubclass(item, Exception) and item.__module__ == pyiceberg.exceptions.__name__
    ),
)
"""What a call of the catalog or of its files may raise; after a commit was sent each is an unknown outcome."""

_AWAY = (
    requests.ConnectionError,
    requests.Timeout,
    ServerError,
    ServiceUnavailableError,
    TooManyRequestsError,
)
"""What a REST catalog that is away for a while raises."""


class DeadlineRestCatalog(RestCatalog):
    """PyIceberg's REST catalog with a deadline on every request."""

    def _create_session(self) -> Session:
        session: Session = super()._create_session()
        # Those that are there, not others in their place: the one that signs requests is among them.
        for adapter in session.adapters.values():
            adapter.send = partial(_send_with_deadline, adapter.send)  # type: ignore[method-assign]
        return session


def _send_with_deadline(send: Callable[..., Response], request: PreparedRequest, **kwargs: Any) -> Response:
    kwargs["timeout"] = kwargs.get("timeout") or (CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S)
    return send(request, **kwargs)


def open_catalog(settings: Settings) -> Catalog:
    """Open the catalog that the settings name.

    Raises:
        ConfigurationError: it cannot be opened; names the URI without its password. Or credentials are missing.
        RetryableSourceError: a REST catalog does not answer now; whoever supervises the process starts it again.
    """
    uri = settings.resolved_catalog_uri
    reach = s3_properties(settings, connect_timeout_s=CONNECT_TIMEOUT_S, request_timeout_s=REQUEST_TIMEOUT_S)
    properties = {"uri": uri, "warehouse": settings.resolved_warehouse, **reach}
    try:
        if settings.catalog_type == "rest":
            implementation = f"{DeadlineRestCatalog.__module__}.{DeadlineRestCatalog.__name__}"
            properties |= {"py-catalog-impl": implementation, **signing_properties(settings)}
            return load_catalog(settings.catalog_name, **properties)
        return _open_sql_catalog(settings.catalog_name, properties)
    except CATALOG_ERRORS as error:
        raise _unusable(settings, error) from error


def table_identifier(settings: Settings, contract: Contract) -> tuple[str, str]:
    """Return namespace and name of the contract's table.

    Raises:
        ConfigurationError: the contract has no table.
    """
    if contract.table is None:
        msg = f"contract {contract.id} ({contract.path}) has no table"
        raise ConfigurationError(msg)
    return settings.namespace, contract.table.name


def load_table(catalog: Catalog, settings: Settings, contract: Contract) -> Table:
    """Load the contract's table and check that it has the contract's shape.

    Raises:
        TableMissingError: it does not exist.
        ConfigurationError: the catalog does not let us in.
        RetryableSourceError: a REST catalog does not answer now.
        SchemaMismatchError: its fields are not the contract's.
    """
    identifier = table_identifier(settings, contract)
    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError as error:
        msg = f"table {'.'.join(identifier)} does not exist: `streamforge contracts apply` creates it"
        raise TableMissingError(msg) from error
    except (RESTError, *_AWAY) as error:
        raise _unusable(settings, error) from error
    except FileNotFoundError as error:
        msg = (
            f"table {'.'.join(identifier)} is in the catalog, but its files are gone: {error}. Bring the warehouse "
            "back, or drop the table from the catalog and land it again"
        )
        raise ConfigurationError(msg) from error
    check_schema(table, contract)
    return table


def ensure_tables(catalog: Catalog, settings: Settings, contracts: Contracts) -> dict[str, Table]:
    """Create every contract's table that is absent; return all by contract id.

    Raises:
        SchemaMismatchError: one exists with other fields than its contract.
    """
    return {contract.id: ensure_table(catalog, settings, contract) for contract in contracts.with_table}


def ensure_table(catalog: Catalog, settings: Settings, contract: Contract) -> Table:
    """Create the contract's table where it is absent, field ids and partition spec as the contract says.

    Raises:
        ConfigurationError: the catalog does not let us in.
        RetryableSourceError: a REST catalog does not answer now.
        SchemaMismatchError: it exists with other fields than the contract.
    """
    identifier = table_identifier(settings, contract)
    try:
        with suppress(NamespaceAlreadyExistsError):
            catalog.create_namespace(identifier[:-1])
        try:
            table = catalog.load_table(identifier)
        except NoSuchTableError:
            table = _create_table(catalog, identifier, contract.iceberg_schema, contract.partition_spec)
    except (RESTError, *_AWAY) as error:
        raise _unusable(settings, error) from error
    check_schema(table, contract)
    return table


def check_schema(table: Table, contract: Contract) -> None:
    """Compare the live table with its contract, by field id.

    Fields that only the table has are fine where they are optional: a newer contract was applied.

    Raises:
        SchemaMismatchError: names the field, both sides and the command that mends it.
    """
    live = {field.field_id: field for field in table.schema().fields}
    for wanted in contract.iceberg_schema.fields:
        found = live.pop(wanted.field_id, None)
        same = found is not None and (found.name, found.field_type, found.required) == (
            wanted.name,
            wanted.field_type,
            wanted.required,
        )
        if not same:
            raise _mismatch(table, contract, wanted.name, str(wanted), str(found or "no such field"))
    for extra in live.values():
        if extra.required:
            raise _mismatch(table, contract, extra.name, "no such field", str(extra))


def probe_compare_and_set(settings: Settings) -> str:
    """Prove on a scratch table that the catalog refuses the second of two conflicting commits.

    First several commits race on the same metadata, then one is sent on metadata that is known to be stale.

    Returns:
        One sentence that says what was shown.

    Raises:
        CommitError: the catalog let more than one pass, or lost the one that passed.
        ConfigurationError: the catalog cannot be opened, or does not let us in.
        RetryableSourceError: a REST catalog does not answer now.
    """
    # Imported here: commit builds on this module.
    from streamforge.lakehouse import commit  # noqa: PLC0415

    catalog = open_catalog(settings)
    identifier = (settings.namespace, f"streamforge_probe_{uuid.uuid4().hex}")
    try:
        catalog.create_namespace_if_not_exists(identifier[:-1])
        table = _create_table(catalog, identifier, Schema(), PartitionSpec())
    except (RESTError, *_AWAY) as error:
        raise _unusable(settings, error) from error
    except CATALOG_ERRORS as error:
        msg = f"the Iceberg catalog {settings.resolved_catalog_uri} cannot create a scratch table: {error}"
        raise CommitError(msg) from error
    try:
        drafts = [commit.draft_snapshot(table) for _ in range(RACING_PROBES + 1)]
        staged = [commit.stage_snapshot(table, draft, {}) for draft in drafts]

        def passed(index: int) -> bool:
            try:
                commit.send_once(table, staged[index].updates, staged[index].requirements)
            except CommitConflictError:
                return False
            except CommitError:
                return commit.has_landed(catalog.load_table(identifier), drafts[index].snapshot_id)
            return True

        with ThreadPoolExecutor(RACING_PROBES) as executor:
            winners = [index for index, won in enumerate(executor.map(passed, range(RACING_PROBES))) if won]
        stale_passed = passed(RACING_PROBES)
        main = catalog.load_table(identifier).metadata.current_snapshot_id
        if len(winners) != 1 or stale_passed or main != drafts[winners[0]].snapshot_id:
            msg = (
                f"the Iceberg catalog {settings.resolved_catalog_uri} does not compare and set: of "
                f"{RACING_PROBES} racing commits on one metadata {len(winners)} passed (expected 1), a stale one "
                f"{'passed' if stale_passed else 'was refused'} (expected refused). Rows would be lost or doubled; "
                "use a catalog that asserts requirements atomically"
            )
            raise CommitError(msg)
    finally:
        catalog.purge_table(identifier)
    return f"of {RACING_PROBES} racing commits exactly one passed, and a stale one was refused"


def _create_table(catalog: Catalog, identifier: Identifier, schema: Schema, spec: PartitionSpec) -> Table:
    # The staged table gives a location and a uuid; its schema has new field ids, so ours is sent instead.
    properties = {"format-version": str(FORMAT_VERSION), **TABLE_PROPERTIES}
    staged = catalog.create_table_transaction(identifier, schema, properties=properties)._table  # noqa: SLF001
    updates: tuple[TableUpdate, ...] = (
        AssignUUIDUpdate(uuid=staged.metadata.table_uuid),
        UpgradeFormatVersionUpdate(format_version=FORMAT_VERSION),
        AddSchemaUpdate(schema_=schema),
        SetCurrentSchemaUpdate(schema_id=-1),
        AddPartitionSpecUpdate(spec=spec),
        SetDefaultSpecUpdate(spec_id=-1),
        AddSortOrderUpdate(sort_order=UNSORTED_SORT_ORDER),
        SetDefaultSortOrderUpdate(sort_order_id=-1),
        SetLocationUpdate(location=staged.metadata.location),
        SetPropertiesUpdate(updates=dict(TABLE_PROPERTIES)),
    )
    # Another process may be first; the caller compares what it made with the contract.
    with suppress(TableAlreadyExistsError, CommitFailedException):
        catalog.commit_table(staged, (AssertCreate(),), updates)
    return catalog.load_table(identifier)


def _mismatch(table: Table, contract: Contract, field: str, expected: str, found: str) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"table {'.'.join(table.name())}, field {field!r}: contract {contract.id} {contract.version} "
        f"({contract.path}) expects {expected}, found {found}. Run `streamforge contracts apply`"
    )


def _unusable(settings: Settings, error: Exception) -> ConfigurationError | RetryableSourceError:
    """Return the error to raise for one of the catalog's."""
    shown = _shown_uri(settings)
    if isinstance(error, _AWAY):
        return RetryableSourceError(
            f"the Iceberg catalog {shown} ({settings.catalog_type}) does not answer: {error}. "
            "Start it, or check STREAMFORGE_CATALOG_URI, and try again"
        )
    return ConfigurationError(
        f"the Iceberg catalog {shown} ({settings.catalog_type}) cannot be opened: {error}. "
        "Check STREAMFORGE_CATALOG_URI and STREAMFORGE_CATALOG_TYPE, and the credentials where it asks for some"
    )


def _shown_uri(settings: Settings) -> str:
    """Return the catalog's URI without its password; of one that is none, nothing that could be a password."""
    uri = settings.resolved_catalog_uri
    if settings.catalog_type == "rest":
        return uri
    try:
        return make_url(uri).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return f"{uri.partition(':')[0]}:... (no SQLAlchemy URL)"


def _open_sql_catalog(name: str, properties: dict[str, str]) -> Catalog:
    url = make_url(properties["uri"])
    if url.get_backend_name() == "sqlite" and url.database:
        return _open_sqlite_catalog(name, properties, Path(url.database))
    for _ in range(_OPEN_ATTEMPTS - 1):
        # Opened for the first time by two processes at once, each looks for its two tables and then creates
        # them; whoever comes second is told that they exist.
        with suppress(SQLAlchemyError):
            return load_catalog(name, **properties, type="sql")
    return load_catalog(name, **properties, type="sql")


def _open_sqlite_catalog(name: str, properties: dict[str, str], database: Path) -> Catalog:
    """Open a SQLite catalog with a busy timeout, and write-ahead logging set once, in the file itself.

    One process at a time: SQLite does not wait for others when it changes the journal.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    uri = make_url(properties["uri"]).update_query_dict({"timeout": str(REQUEST_TIMEOUT_S)})
    with FileLock(f"{database}.lock", timeout=REQUEST_TIMEOUT_S):
        with closing(sqlite3.connect(database, timeout=REQUEST_TIMEOUT_S)) as connection:
            if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                connection.execute("PRAGMA journal_mode=WAL")
        opened = properties | {"uri": uri.render_as_string(hide_password=False)}
        return load_catalog(name, **opened, type="sql")
