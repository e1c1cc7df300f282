"""Streams and tables, one asset each, made from the contracts.

Nothing here runs the data plane: the consumers do. Dagster observes what they wrote, so every asset is
external, and an observation records where it stands: offsets and records of a stream, rows and the table
snapshot of a table.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import dagster as dg

from streamforge.contracts import Contract, Contracts
from streamforge.kafka import admin_client, describe_topics
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.log_reader import log_starts, stable_ends
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import topic_of

STREAMS = "streams"
TABLES = "tables"
PLATFORM_RESOURCE = "platform"
"""Key of the resource that gives `Settings` and `Contracts`; the `orchestration` room provides it."""


def stream_key(contract: Contract) -> dg.AssetKey:
    """Return the asset key of a contract's topic."""
    return dg.AssetKey([STREAMS, _name(contract)])


def table_key(contract: Contract) -> dg.AssetKey:
    """Return the asset key of a contract's table."""
    return dg.AssetKey([TABLES, _name(contract)])


def stream_specs(contracts: Contracts) -> list[dg.AssetSpec]:
    """Return one external asset for each topic; those that a processor makes depend on their inputs."""
    return [
        _spec(contract, stream_key(contract), STREAMS, {"kafka"}, [stream_key(contracts[i]) for i in contract.inputs])
        for contract in contracts.with_topic
    ]


def table_specs(contracts: Contracts) -> list[dg.AssetSpec]:
    """Return one external asset for each table; it depends on the topic that feeds it."""
    return [
        _spec(
            contract,
            table_key(contract),
            TABLES,
            {"iceberg"},
            [stream_key(contract)] if contract.topic is not None else [],
        )
        for contract in contracts.with_table
    ]


def observable_streams(contracts: Contracts) -> dg.AssetsDefinition:
    """Return the streams with an observation that tells log start, end offsets and records of each."""

    def observe_streams(context: dg.OpExecutionContext) -> Iterator[dg.ObserveResult]:
        settings, known = platform_of(context)
        wanted = [item for item in known.with_topic if stream_key(item) in context.selected_asset_keys]
        found = describe_topics(admin_client(settings), [topic_of(known, item.id).name for item in wanted])
        for contract in wanted:
            name = topic_of(known, contract.id).name
            if name not in found:
                context.log.warning("topic %s does not exist; run `streamforge contracts apply`", name)
                continue
            partitions = [TopicPartition(name, number) for number in range(found[name].partitions)]
            starts, ends = log_starts(settings, partitions), stable_ends(settings, partitions)
            yield dg.ObserveResult(
                asset_key=stream_key(contract),
                data_version=dg.DataVersion(f"{found[name].topic_id}:{sum(ends.values())}"),
                metadata={
                    "topic_id": found[name].topic_id,
                    "topic_partitions": len(partitions),
                    "retained_offsets": sum(ends.values()) - sum(starts.values()),
                    "end_offsets": {str(item.partition): offset for item, offset in sorted(ends.items())},
                },
            )

    return observable("observe_streams", stream_specs(contracts), observe_streams)


def observable_tables(contracts: Contracts) -> dg.AssetsDefinition:
    """Return the tables with an observation that tells rows and table snapshot of each."""

    def observe_tables(context: dg.OpExecutionContext) -> Iterator[dg.ObserveResult]:
        settings, known = platform_of(context)
        catalog = open_catalog(settings)
        for contract in known.with_table:
            if table_key(contract) not in context.selected_asset_keys:
                continue
            table = load_table(catalog, settings, contract)
            snapshot = table.current_snapshot()
            summary = snapshot.summary if snapshot is not None else None
            total_rows = int(summary["total-records"] or 0) if summary is not None else 0
            yield dg.ObserveResult(
                asset_key=table_key(contract),
                data_version=dg.DataVersion(str(snapshot.snapshot_id if snapshot is not None else None)),
                metadata={
                    "dagster/row_count": total_rows,
                    "table_snapshot": str(snapshot.snapshot_id) if snapshot is not None else "none",
                    "location": dg.MetadataValue.path(table.location()),
                },
            )

    return observable("observe_tables", table_specs(contracts), observe_tables)


def observable(
    name: str,
    specs: list[dg.AssetSpec],
    observe: Callable[[dg.OpExecutionContext], Iterator[dg.ObserveResult]],
) -> dg.AssetsDefinition:
    """Return external assets that one function observes, each alone where that is asked for."""
    with warnings.catch_warnings():
        # Beta in Dagster 1.13, which is pinned below 1.14; a test runs it for real.
        warnings.simplefilter("ignore", dg.BetaWarning)
        decorate = dg.multi_observable_source_asset(
            specs=specs, name=name, can_subset=True, required_resource_keys={PLATFORM_RESOURCE}
        )
    return cast("dg.AssetsDefinition", decorate(observe))


def platform_of(context: dg.OpExecutionContext) -> tuple[Settings, Contracts]:
    """Return the values of the resource `platform`."""
    platform = getattr(context.resources, PLATFORM_RESOURCE)
    return platform.settings, platform.contracts


def _spec(contract: Contract, key: dg.AssetKey, group: str, kinds: set[str], deps: list[dg.AssetKey]) -> dg.AssetSpec:
    columns = [
        dg.TableColumn(
            name=item.name,
            type=item.type_name,
            description=item.description,
            constraints=dg.TableColumnConstraints(nullable=not item.required),
        )
        for item in contract.fields
    ]
    metadata: dict[str, Any] = {
        "dagster/column_schema": dg.TableSchema(columns=columns),
        "contract_version": contract.version,
        "contract_file": contract.path.name,
    }
    if contract.freshness_s is not None:
        metadata["freshness_target_s"] = contract.freshness_s
    return dg.AssetSpec(
        key=key,
        deps=deps,
        description=f"{contract.purpose}\n\n{contract.limitations}",
        group_name=group,
        owners=[f"team:{contract.owner}"] if contract.owner else None,
        kinds=kinds,
        metadata=metadata,
    )


def _name(contract: Contract) -> str:
    return contract.id.replace("-", "_").replace(".", "_")
