"""What a table's metadata knows of a column without reading data: the least and the greatest value of each file."""

from __future__ import annotations

from collections.abc import Mapping

from pyiceberg.conversions import from_bytes
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.manifest import DataFile
from pyiceberg.table import FileScanTask, Table
from pyiceberg.types import LongType

from streamforge.errors import ConfigurationError
from streamforge.lakehouse.replay_target import files_with

_UNKNOWN = 2**63 - 1


def greatest(table: Table, column: str) -> int | None:
    """Return the greatest value of a column of longs by the files' own bounds; None where no file tells one.

    Raises:
        CommitError: the table's metadata cannot be read.
    """
    found = [upper_bound(table, task.file, column) for task in files_with(table, AlwaysTrue())]
    return max((value for value in found if value is not None), default=None)


def newest_first(table: Table, tasks: list[FileScanTask], column: str) -> list[FileScanTask]:
    """Return the files by their greatest value of `column`, greatest first; those that tell none come first."""

    def order(task: FileScanTask) -> int:
        bound = upper_bound(table, task.file, column)
        return _UNKNOWN if bound is None else bound

    return sorted(tasks, key=order, reverse=True)


def upper_bound(table: Table, file: DataFile, column: str) -> int | None:
    """Return the greatest value of a column of longs in one file; None where the file does not tell it."""
    return _bound(table, file.upper_bounds, column)


def lower_bound(table: Table, file: DataFile, column: str) -> int | None:
    """Return the least value of a column of longs in one file; None where the file does not tell it."""
    return _bound(table, file.lower_bounds, column)


def _bound(table: Table, bounds: Mapping[int, bytes] | None, column: str) -> int | None:
    field = table.schema().find_field(column)
    if not isinstance(field.field_type, LongType):
        msg = f"column {column} of table {'.'.join(table.name())} is {field.field_type}, expected a long"
        raise ConfigurationError(msg)
    bound = (bounds or {}).get(field.field_id)
    return None if bound is None else int(from_bytes(field.field_type, bound))
