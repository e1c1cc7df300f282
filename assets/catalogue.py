"""Streams and tables, one asset each, made from the contracts.

Nothing here runs the data plane: the consumers do. Dagster observes what they wrote, so every asset is
external, and an observation records where it stands: offsets of a stream and the lag of each of its consumers,
rows, table snapshot and newest event of a table.
"""

import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from typing import Any, cast

import dagster as dg

from assets.failures import fail_of, others_first
from streamforge.contracts import Contract, ContractField, Contracts
from streamforge.errors import StreamForgeError
from streamforge.lakehouse.catalog import open_catalog
from streamforge.lakehouse.observation import StreamState, TableState, look_at_streams, look_at_table
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


def observable_streams_and_tables(contracts: Contracts) -> dg.AssetsDefinition:
    """Return streams and tables, observed by one step.

    It tells end offsets, retained records and the lag of each consumer of a stream; rows, table snapshot and newest
    event of a table. One step and not two: of two, the one of the tables would wait for every stream before
    them, and be skipped where a topic is absent or the broker away.
    """

    def observe_streams_and_tables(context: dg.OpExecutionContext) -> Iterator[dg.ObserveResult]:
        settings, known = platform_of(context)
        selected = context.selected_asset_keys
        failed: list[StreamForgeError] = []
        wanted = [item for item in _inputs_first(known) if stream_key(item) in selected]
        try:
            states = look_at_streams(settings, known, wanted)
        except StreamForgeError as error:
            failed.append(error)
        else:
            for contract in wanted:
                if contract.id in states:
                    yield _stream_observation(contract, states[contract.id])
                else:
                    name = topic_of(known, contract.id).name
                    context.log.warning("topic %s does not exist; run `streamforge contracts apply`", name)
        tables = [item for item in known.with_table if table_key(item) in selected]
        with others_first("catalog", failed, context.log):
            catalog = open_catalog(settings)
            for contract in tables:
                with others_first(f"table {contract.id}", failed, context.log):
                    yield _table_observation(contract, look_at_table(catalog, settings, contract))
        fail_of(failed)

    specs = [*stream_specs(contracts), *table_specs(contracts)]
    return observable("observe_streams_and_tables", specs, observe_streams_and_tables)


def _inputs_first(contracts: Contracts) -> list[Contract]:
    """Return the contracts with a topic in the order in which Dagster wants their assets told of."""
    order = TopologicalSorter({item.id: item.inputs for item in contracts.with_topic}).static_order()
    return [contracts[name] for name in order]


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


def _stream_observation(contract: Contract, state: StreamState) -> dg.ObserveResult:
    return dg.ObserveResult(
        asset_key=stream_key(contract),
        data_version=dg.DataVersion(f"{state.topic.topic_id}:{sum(state.ends.values())}"),
        metadata={
            "topic": state.topic.topic,
            "topic_id": state.topic.topic_id,
            "topic_partitions": len(state.ends),
            "retained_offsets": state.retained,
            "end_offsets": {str(number): offset for number, offset in sorted(state.ends.items())},
            **{f"lag/{consumer.replace(' ', '_')}": records for consumer, records in state.lag.items()},
        },
    )


def _table_observation(contract: Contract, state: TableState) -> dg.ObserveResult:
    metadata: dict[str, Any] = {
        "dagster/row_count": state.rows,
        "dagster/table_name": state.name,
        "table_snapshot": str(state.snapshot_id) if state.snapshot_id is not None else "none",
        "table_snapshots_retained": state.snapshots,
        "data_files": state.files,
        "data_bytes": state.bytes,
        "location": dg.MetadataValue.path(state.location),
    }
    if state.committed_at is not None:
        metadata["committed_at"] = dg.MetadataValue.timestamp(state.committed_at)
        metadata["committed_by"] = state.kind
    if state.newest_event_at is not None:
        metadata["newest_event_at"] = dg.MetadataValue.timestamp(state.newest_event_at)
        metadata["newest_event_age_s"] = round((datetime.now(UTC) - state.newest_event_at).total_seconds(), 3)
    return dg.ObserveResult(
        asset_key=table_key(contract), data_version=dg.DataVersion(str(state.snapshot_id)), metadata=metadata
    )


def _spec(contract: Contract, key: dg.AssetKey, group: str, kinds: set[str], deps: list[dg.AssetKey]) -> dg.AssetSpec:
    columns = [
        dg.TableColumn(
            name=item.name,
            type=item.type_name,
            description=item.description,
            constraints=dg.TableColumnConstraints(nullable=not item.required, other=_limits(item)),
            tags={"primary_key": ""} if item.name in contract.primary_key else {},
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


def _limits(item: ContractField) -> list[str]:
    """Return what else a field's values meet, in words."""
    limits = [f"{name} {value}" for name, value in item.options.items()]
    return [*limits, f"one of {', '.join(item.enum)}"] if item.enum else limits


def _name(contract: Contract) -> str:
    return contract.id.replace("-", "_").replace(".", "_")
