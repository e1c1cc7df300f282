"""Compaction of small files and removal of orphans, by Iceberg's own procedures in Spark, beside the live writer.

Compaction makes one table snapshot with the same rows in fewer files. It descends from what was there, keeps
`total-records` and touches no table property, so a writer's comparison holds: its commit in flight meets a
conflict, compares again and lands. Iceberg rebases compaction on what the writer landed meanwhile. Files are
sorted as replays and `verify` ask for them.

Expiry is that of `streamforge.lakehouse.maintenance`, which deletes no file. Files that no table snapshot needs any
more are removed here by age. Spark reads and sorts with bounded memory: what does not fit goes to its local folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from streamforge.contract_model import Contract, Contracts
from streamforge.errors import CommitConflictError, CommitError, ConfigurationError
from streamforge.lakehouse.catalog import table_identifier
from streamforge.lakehouse.remake import lineage_of
from streamforge.settings import Settings
from streamforge.spark.session import failure_text, spark_failures

if TYPE_CHECKING:
    from pyspark.sql import Row, SparkSession

_CONFLICT = "CommitFailedException"
ORPHAN_AGE_H = 72
ORPHAN_AGE_MIN_H = 25
"""Files of a commit or a replay under way are no orphans; Iceberg itself refuses less than a day."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did.

    Args:
        files_rewritten: small files that were merged; 0: there was nothing to gain, and no table snapshot was made.
        files_added: files that hold their rows now.
        rewritten_bytes: size of the files that were merged.
    """

    files_rewritten: int = 0
    files_added: int = 0
    rewritten_bytes: int = 0


def compact_table(session: SparkSession, settings: Settings, contracts: Contracts, contract: Contract) -> Compaction:
    """Merge the small data files of a table, as one table snapshot or none.

    Raises:
        ConfigurationError: the contract has no table.
        CommitConflictError: others always changed it first; nothing was changed.
        CommitError: it could not be read; nothing was changed.
    """
    order = _sort_order(contracts, contract)
    strategy = f"strategy => 'sort', sort_order => '{order}'" if order else "strategy => 'binpack'"
    (row,) = _call(session, settings, contract, "rewrite_data_files", strategy)
    return Compaction(
        files_rewritten=row["rewritten_data_files_count"],
        files_added=row["added_data_files_count"],
        rewritten_bytes=row["rewritten_bytes_count"],
    )


def remove_orphans(
    session: SparkSession, settings: Settings, contract: Contract, *, older_than_h: float = ORPHAN_AGE_H, now: datetime
) -> int:
    """Delete files below a table's location that no table snapshot needs and that are old; return how many.

    Args:
        session: on the catalog of the settings.
        settings: which catalog.
        contract: of the table.
        older_than_h: least age, hours: longer than the longest commit and replay take.
        now: what the age counts from.

    Raises:
        ConfigurationError: the contract has no table, or the age is too low.
        CommitError: the table or its folder could not be read.
    """
    if older_than_h < ORPHAN_AGE_MIN_H:
        msg = (
            f"orphans of {contract.id} must be at least {ORPHAN_AGE_MIN_H} hours old, found {older_than_h}: files of "
            "a commit or a replay under way look like orphans too"
        )
        raise ConfigurationError(msg)
    before = (now - timedelta(hours=older_than_h)).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    return len(_call(session, settings, contract, "remove_orphan_files", f"older_than => TIMESTAMP '{before}'"))


def _call(session: SparkSession, settings: Settings, contract: Contract, procedure: str, arguments: str) -> list[Row]:
    catalog = settings.catalog_name
    table = ".".join((catalog, *table_identifier(settings, contract)))
    # Text of a statement: its parts come from settings, contracts and numbers, never from data.
    statement = f"CALL `{catalog}`.system.{procedure}(table => '{table}', {arguments})"
    try:
        return session.sql(statement).collect()
    except spark_failures() as error:
        msg = (
            f"table {table}: Iceberg's {procedure} failed: {failure_text(error)}. The table is as it "
            "was; run it again, and look into the storage if it fails again"
        )
        raise (CommitConflictError if _CONFLICT in str(error) else CommitError)(msg) from error


def _sort_order(contracts: Contracts, contract: Contract) -> str | None:
    """Return the order of a table's source; None: no topic feeds it."""
    if contract.topic is None:
        return None
    epoch, partition, offset, _ = lineage_of(contracts, contract.id).columns
    return f"{epoch} ASC NULLS FIRST, {partition} ASC NULLS FIRST, {offset} ASC NULLS FIRST"
