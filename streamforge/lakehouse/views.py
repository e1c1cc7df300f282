"""SQL that reads a table as its contract means it; plain enough for Spark and DuckDB alike."""

from __future__ import annotations

from streamforge.contracts import Contract

LATEST_SUFFIX = "_latest"
_RANK = "_revisions_behind"


def latest_keys(contract: Contract) -> tuple[str, ...]:
    """Return the fields that revisions of one thing share: the primary key without what orders revisions."""
    latest_by = contract.table.latest_by if contract.table is not None else ()
    return tuple(name for name in contract.primary_key if name not in latest_by)


def latest_sql(contract: Contract, relation: str, columns: tuple[str, ...] = ()) -> str:
    """Return a query for the latest revision of every row of `relation`, or for all rows where there are no revisions.

    Args:
        contract: the table's contract; `table.latestBy` orders the revisions.
        relation: the table as the engine names it.
        columns: columns to select; all of the contract's where none is named.
    """
    named = ", ".join(columns or tuple(item.name for item in contract.fields))
    latest_by = contract.table.latest_by if contract.table is not None else ()
    if not latest_by:
        return f"SELECT {named} FROM {relation}"  # noqa: S608 - names come from contracts
    keys = ", ".join(latest_keys(contract))
    order = ", ".join(f"{name} DESC" for name in latest_by)
    return (
        f"SELECT {named} FROM (SELECT *, row_number() OVER (PARTITION BY {keys} ORDER BY {order}) AS {_RANK} "  # noqa: S608
        f"FROM {relation}) WHERE {_RANK} = 1"
    )
