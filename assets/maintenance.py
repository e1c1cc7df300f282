"""Maintenance of the tables: small files are merged, old table snapshots expire, the writer goes on beside it.

The writer commits every two seconds, so a table gathers tens of thousands of small files a day. Merging them makes
one table snapshot with the same rows. Expiry then keeps the newest table snapshots, and every tagged one: time
travel points, and what a model was trained on. The summaries of those that go are in the table `commits`. Neither
touches the writer's position, which lies in the table's properties. Who meets a commit of the writer tries again; where
others are always faster, the run fails, says so and is retried.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime

import dagster as dg
from pydantic import Field
from pyiceberg.catalog import Catalog

from assets.catalogue import PLATFORM_RESOURCE, platform_of, table_key
from assets.failures import clear_failures, fail_of, others_first
from streamforge.contracts import Contract, Contracts
from streamforge.errors import StreamForgeError
from streamforge.lakehouse.catalog import ensure_table, load_table, open_catalog, table_identifier
from streamforge.lakehouse.maintenance import Maintenance
from streamforge.settings import Settings
from streamforge.spark.maintenance import ORPHAN_AGE_H, ORPHAN_AGE_MIN_H, Compaction, compact_table, remove_orphans
from streamforge.spark.session import spark_session

MAINTENANCE = "maintenance"


class MaintenanceConfig(dg.Config):
    """What maintenance does to each table that is chosen."""

    compact: bool = Field(default=True, description="Merge small files in Spark; off: only expire.")
    retained_snapshots: int = Field(
        default=100, ge=1, description="Table snapshots that stay; tagged ones stay beside them."
    )


class OrphansConfig(dg.Config):
    """Which files are orphans."""

    older_than_h: float = Field(
        default=ORPHAN_AGE_H,
        ge=ORPHAN_AGE_MIN_H,
        description="Least age in hours: longer than the longest commit and replay take.",
    )


def maintenance_key(contract: Contract) -> dg.AssetKey:
    """Return the asset key of the maintenance of a contract's table."""
    return dg.AssetKey([MAINTENANCE, *table_key(contract).path[1:]])


def maintained_tables(contracts: Contracts) -> dg.AssetsDefinition:
    """Return one asset for each table: its last maintenance."""
    specs = [
        dg.AssetSpec(
            maintenance_key(contract),
            deps=[table_key(contract)],
            description=f"Last maintenance of the table {contract.id}.\n\n{__doc__}",
            group_name=MAINTENANCE,
            owners=[f"team:{contract.owner}"] if contract.owner else None,
            kinds={"spark", "iceberg"},
            skippable=True,
        )
        for contract in contracts.with_table
    ]

    @dg.multi_asset(
        specs=specs,
        name="maintain_tables",
        can_subset=True,
        required_resource_keys={PLATFORM_RESOURCE},
        retry_policy=dg.RetryPolicy(max_retries=2, delay=10),
    )
    def maintain_tables(
        context: dg.AssetExecutionContext, config: MaintenanceConfig
    ) -> Iterator[dg.MaterializeResult[None]]:
        settings, known = platform_of(context.op_execution_context)
        wanted = [
            contract
            for contract in known.with_table
            if maintenance_key(contract) in context.op_execution_context.selected_asset_keys
        ]
        failed: list[StreamForgeError] = []
        with clear_failures():
            catalog = open_catalog(settings)
        for contract in wanted:
            with others_first(f"table {contract.id}", failed, context.log):
                if _is_there(context.log, catalog, settings, contract):
                    yield _maintained(config, catalog, settings, known, contract)
        fail_of(failed)

    return maintain_tables


def orphan_removal(contracts: Contracts) -> dg.JobDefinition:
    """Return the job that deletes files that no table snapshot needs; it has no data, so it is no asset."""
    names = ", ".join(contract.id for contract in contracts.with_table)

    @dg.op(required_resource_keys={PLATFORM_RESOURCE})
    def remove_orphan_files(context: dg.OpExecutionContext, config: OrphansConfig) -> None:
        """Delete old files below the tables' folders that no table snapshot needs."""
        settings, known = platform_of(context)
        failed: list[StreamForgeError] = []
        with clear_failures():
            catalog, session = open_catalog(settings), spark_session(settings)
        now = datetime.now(UTC)
        for contract in known.with_table:
            with others_first(f"table {contract.id}", failed, context.log):
                if _is_there(context.log, catalog, settings, contract):
                    removed = remove_orphans(session, settings, contract, older_than_h=config.older_than_h, now=now)
                    context.log.info("table %s: %d orphans removed", contract.id, removed)
        fail_of(failed)

    @dg.job(name="remove_orphans", description=f"Delete files that no table snapshot needs any more, of: {names}.")
    def remove_orphans_job() -> None:
        remove_orphan_files()

    return remove_orphans_job


def _is_there(log: logging.Logger, catalog: Catalog, settings: Settings, contract: Contract) -> bool:
    """Return whether the table exists; where it does not, there is nothing to maintain yet."""
    exists = bool(catalog.table_exists(table_identifier(settings, contract)))
    if not exists:
        log.warning("table %s does not exist yet: nothing to maintain", contract.id)
    return exists


def _maintained(
    config: MaintenanceConfig, catalog: Catalog, settings: Settings, contracts: Contracts, contract: Contract
) -> dg.MaterializeResult[None]:
    done = compact_table(spark_session(settings), settings, contracts, contract) if config.compact else Compaction()
    ledger = ensure_table(catalog, settings, contracts["commits"])
    table = load_table(catalog, settings, contract)
    after = Maintenance(ledger, contracts["commits"], retained=config.retained_snapshots).expire_or_fail(table)
    snapshot = after.current_snapshot()
    return dg.MaterializeResult(
        asset_key=maintenance_key(contract),
        metadata={
            **asdict(done),
            "table_snapshots_before": len(table.metadata.snapshots),
            "table_snapshots_after": len(after.metadata.snapshots),
            "table_snapshot": str(snapshot.snapshot_id if snapshot is not None else "none"),
        },
    )
