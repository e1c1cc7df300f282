"""A catalog that lets the last write win, as one that ignores the requirements of a commit does."""

from __future__ import annotations

from typing import Any

import pytest
from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
from pyiceberg.table import CommitTableResponse
from sqlalchemy import update


def let_the_last_write_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every commit on an existing table of a SQL catalog pass, on whatever metadata it was made."""
    real = SqlCatalog.commit_table

    def last_write_wins(self: SqlCatalog, table: Any, requirements: Any, updates: Any) -> CommitTableResponse:
        if not table.metadata_location or not self.table_exists(table.name()):
            return real(self, table, requirements, updates)
        staged = self._update_and_stage_table(table, table.name(), (), updates)
        self._write_metadata(staged.metadata, staged.io, staged.metadata_location)
        with self.engine.begin() as connection:
            where = IcebergTables.table_name == table.name()[-1]
            connection.execute(update(IcebergTables).where(where).values(metadata_location=staged.metadata_location))
        return CommitTableResponse(metadata=staged.metadata, metadata_location=staged.metadata_location)

    monkeypatch.setattr(SqlCatalog, "commit_table", last_write_wins)
