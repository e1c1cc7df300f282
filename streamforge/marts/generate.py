"""Files of the dbt project that follow from something else: staging from the contracts, the graph from the manifest.

`uv run python dbt/generate.py` writes them; tests compare, so they cannot fall behind.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from streamforge.contracts import Contract, Contracts
from streamforge.lakehouse.views import LATEST_SUFFIX, latest_keys, latest_sql
from streamforge.marts.project import (
    GRAPH_FILE,
    SOURCE_NAME,
    MartGraph,
    Model,
    ModelColumn,
    ModelTest,
)

STAGING = "models/staging"
_HEAD = "Written from contracts/{file} by dbt/generate.py: do not edit."
_WIDTH = 110


def staging_files(contracts: Contracts) -> dict[str, str]:
    """Return the files of the staging layer by their path in the project."""
    wanted = [contract for contract in contracts.with_table if contract.table is not None]
    files = {f"{STAGING}/{staging_name(item)}.sql": _staging_sql(item) for item in wanted}
    return files | {f"{STAGING}/_contracts.yml": _staging_yaml(wanted)}


def staging_name(contract: Contract) -> str:
    """Return the model that reads the contract's table."""
    return f"stg_{_table(contract)}"


def graph_of(manifest: Mapping[str, Any]) -> MartGraph:
    """Return what Dagster needs of dbt's manifest, in an order that does not change."""
    nodes = manifest["nodes"].values()
    models = {node["unique_id"]: node for node in nodes if node["resource_type"] == "model"}
    tests = [node for node in nodes if node["resource_type"] == "test"]
    return MartGraph(
        models=[_model(node, manifest) for node in sorted(models.values(), key=lambda node: node["name"])],
        tests=[_test(node, models) for node in sorted(tests, key=lambda node: node["name"])],
    )


def graph_file(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return `graph.json` by its path in the project."""
    return {GRAPH_FILE: msgspec.json.format(msgspec.json.encode(graph_of(manifest)), indent=2).decode() + "\n"}


def _staging_sql(contract: Contract) -> str:
    columns = tuple(item.name for item in contract.own_fields)
    query = latest_sql(contract, f"{{{{ source('{SOURCE_NAME}', '{_table(contract)}') }}}}", columns)
    return f"-- {_HEAD.format(file=contract.path.name)}\n{textwrap.fill(query, _WIDTH, break_on_hyphens=False)}\n"


def _staging_yaml(contracts: list[Contract]) -> str:
    document = {
        "version": 2,
        "sources": [
            {
                "name": SOURCE_NAME,
                "schema": "{{ var('namespace') }}",
                "description": "Iceberg tables that the contracts describe; the writer alone writes them.",
                "tables": [
                    {
                        "name": _table(item),
                        "description": _sentence(item.purpose, item.limitations),
                        "columns": _columns(item, all_fields=True),
                    }
                    for item in contracts
                ],
            }
        ],
        "models": [
            {
                "name": staging_name(item),
                "description": _sentence(item.purpose, _revisions(item)),
                "columns": _columns(item, all_fields=False),
            }
            for item in contracts
        ],
    }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return f"# {_HEAD.format(file='*.yaml')}\n{text}"


def _columns(contract: Contract, *, all_fields: bool) -> list[dict[str, str]]:
    fields = contract.fields if all_fields else contract.own_fields
    return [{"name": item.name, "data_type": item.type_name, "description": item.description} for item in fields]


def _revisions(contract: Contract) -> str:
    if contract.table is None or not contract.table.latest_by:
        return "Without the columns of provenance."
    keys = ", ".join(latest_keys(contract))
    return f"The latest revision of each ({keys}), as {_table(contract)}{LATEST_SUFFIX} of `streamforge sql`."


def _sentence(*parts: str) -> str:
    return " ".join(part.strip() for part in parts if part.strip())


def _table(contract: Contract) -> str:
    return contract.table.name if contract.table is not None else ""


def _model(node: Mapping[str, Any], manifest: Mapping[str, Any]) -> Model:
    parents = node["depends_on"]["nodes"]
    return Model(
        name=node["name"],
        layer=node["fqn"][1],
        materialized=node["config"]["materialized"],
        description=node["description"].strip(),
        columns=[
            ModelColumn(item["name"], item["data_type"] or "", item["description"]) for item in node["columns"].values()
        ],
        models=sorted({manifest["nodes"][name]["name"] for name in parents if name.startswith("model.")}),
        tables=sorted({manifest["sources"][name]["name"] for name in parents if name.startswith("source.")}),
    )


def _test(node: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> ModelTest:
    # A test in a file of its own stands at no model: it judges the first one that it reads.
    judged = node.get("attached_node") or next(name for name in node["depends_on"]["nodes"] if name in models)
    return ModelTest(
        name=node["name"],
        model=models[judged]["name"],
        description=node["description"].strip(),
        severity=node["config"]["severity"].lower(),
    )
