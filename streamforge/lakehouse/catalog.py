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
from filelock import FileLock
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.catalog.rest import RestCatalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    TableAlreadyExistsError,
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
from streamforge.errors import CommitConflictError, CommitError, ConfigurationError, SchemaMismatchError
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
        ConfigurationError: it cannot be reached; names the URI without its password. Or credentials are missing.
    """
    uri = settings.resolved_catalog_uri
    properties = {"uri": uri, "warehouse": settings.resolved_warehouse, **_s3_properties(settings)}
    try:
        if settings.catalog_type == "rest":
            implementation = f"{DeadlineRestCatalog.__module__}.{DeadlineRestCatalog.__name__}"
            properties |= {"py-catalog-impl": implementation, **_signing_properties(settings)}
            return load_catalog(settings.catalog_name, **properties)
        return _open_sql_catalog(settings.catalog_name, properties)
    except CATALOG_ERRORS as error:
        shown = uri if settings.catalog_type == "rest" else make_url(uri).render_as_string(hide_password=True)
        msg = (
            f"the Iceberg catalog {shown} ({settings.catalog_type}) cannot be opened: {error}. "
            "Check STREAMFORGE_CATALOG_URI and STREAMFORGE_CATALOG_TYPE, and the credentials where it asks for some"
        )
        raise ConfigurationError(msg) from error


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
        ConfigurationError: it does not exist.
        SchemaMismatchError: its fields are not the contract's.
    """
    identifier = table_identifier(settings, contract)
    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError as error:
        msg = f"table {'.'.join(identifier)} does not exist: `streamforge contracts apply` creates it"
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
        SchemaMismatchError: it exists with other fields than the contract.
    """
    identifier = table_identifier(settings, contract)
    with suppress(NamespaceAlreadyExistsError):
        catalog.create_namespace(identifier[:-1])
    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError:
        table = _create_table(catalog, identifier, contract.iceberg_schema, contract.partition_spec)
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
        ConfigurationError: the catalog cannot be opened.
    """
    # Imported here: commit builds on this module.
    from streamforge.lakehouse import commit  # noqa: PLC0415

    catalog = open_catalog(settings)
    identifier = (settings.namespace, f"streamforge_probe_{uuid.uuid4().hex}")
    try:
        catalog.create_namespace_if_not_exists(identifier[:-1])
        table = _create_table(catalog, identifier, Schema(), PartitionSpec())
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


def _s3_properties(settings: Settings) -> dict[str, str]:
    """Return how the object store is reached; what is not set, AWS's own search finds.

    Raises:
        ConfigurationError: one half of a key.
    """
    if (settings.s3_access_key_id is None) != (settings.s3_secret_access_key is None):
        msg = (
            "STREAMFORGE_S3_ACCESS_KEY_ID and STREAMFORGE_S3_SECRET_ACCESS_KEY belong together, found one of them. "
            "Set both, or none: then AWS's own search finds credentials"
        )
        raise ConfigurationError(msg)
    secrets = {
        "client.access-key-id": settings.s3_access_key_id,
        "client.secret-access-key": settings.s3_secret_access_key,
        "client.session-token": settings.s3_session_token,
    }
    plain = {
        "s3.endpoint": settings.s3_endpoint,
        "client.region": settings.s3_region,
        "s3.connect-timeout": str(CONNECT_TIMEOUT_S),
        "s3.request-timeout": str(REQUEST_TIMEOUT_S),
    }
    return {key: secret.get_secret_value() for key, secret in secrets.items() if secret is not None} | {
        key: value for key, value in plain.items() if value is not None
    }


def _signing_properties(settings: Settings) -> dict[str, str]:
    """Return how requests to the catalog are signed.

    Raises:
        ConfigurationError: no region, or no credentials; PyIceberg would only find out in the midst of a request.
    """
    if settings.catalog_signing_name is None:
        return {}
    import boto3  # noqa: PLC0415 - heavy

    found = boto3.Session(region_name=settings.s3_region)
    missing = {
        "STREAMFORGE_S3_REGION": found.region_name is None,
        "STREAMFORGE_S3_ACCESS_KEY_ID and STREAMFORGE_S3_SECRET_ACCESS_KEY": settings.s3_access_key_id is None
        and found.get_credentials() is None,
    }
    if any(missing.values()):
        names = " and ".join(name for name, is_missing in missing.items() if is_missing)
        msg = (
            f"requests to the Iceberg catalog {settings.resolved_catalog_uri} are to be signed for "
            f"{settings.catalog_signing_name}, and neither the settings nor AWS's own search say with what: set {names}"
        )
        raise ConfigurationError(msg)
    return {
        "rest.sigv4-enabled": "true",
        "rest.signing-name": settings.catalog_signing_name,
        "rest.signing-region": str(found.region_name),
        # A request is sent once: what its failure means is decided by whoever sent it.
        "rest.sigv4.max-retries": "0",
    }


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
