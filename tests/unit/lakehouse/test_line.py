"""The line from outside: what is waited for is what the writer lands."""

from __future__ import annotations

from pathlib import Path

from streamforge.contracts import load_contracts
from streamforge.lakehouse.line import Line
from streamforge.settings import Settings
from tests.contract_files import FOLDER


def test_every_topic_that_has_a_table_is_waited_for(tmp_path: Path) -> None:
    contracts = load_contracts(FOLDER)
    line = Line(Settings(_env_file=None, home=tmp_path), contracts)  # type: ignore[call-arg]
    wanted = {item.id for item in contracts.with_table if item.topic is not None}
    assert {item.id for item in line.landed} == wanted
