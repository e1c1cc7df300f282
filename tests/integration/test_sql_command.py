"""`streamforge sql` answers from the tables as they are, and teaches where a question is wrong."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.expressions import EqualTo
from pyiceberg.schema import Schema
from pyiceberg.types import ListType, LongType, NestedField
from typer.testing import CliRunner, Result

from cli.app import app
from streamforge.contracts import load_contracts
from streamforge.lakehouse.catalog import open_catalog
from streamforge.settings import Settings
from tests.marts_support import START_NS, MinuteBar, append_bars, settings_of, table_of

pytestmark = pytest.mark.usefixtures("restored_logging")
BTC = "BTC-USDT.SIM"


@pytest.fixture(scope="module")
def revisions(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return settings of all tables, five bars in three commits among them: no test changes it."""
    settings = settings_of(tmp_path_factory.mktemp("sql") / "home")
    append_bars(settings, [bar(0, "2"), bar(1, "3")])
    append_bars(settings, [bar(0, "4", revision=7), bar(1, "5", replay_epoch=1)])
    append_bars(settings, [bar(1, "6", revision=9)])
    return settings


@pytest.fixture
def shared(revisions: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Let the command find the tables of `revisions`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMFORGE_HOME", str(revisions.home))
    return revisions


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return settings of a home with an empty table bars of its own, that the command finds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMFORGE_HOME", str(tmp_path / "home"))
    return settings_of(tmp_path / "home", "bars")


def bar(minute: int, close: str, *, revision: int = 0, replay_epoch: int = 0) -> MinuteBar:
    return MinuteBar(
        BTC, minute, Decimal(1), Decimal(9), Decimal(1), Decimal(close), Decimal(2), revision, replay_epoch
    )


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sql", *arguments])


def rows(query: str, *more: str) -> list[dict[str, object]]:
    result = call(query, "--output", "json", *more)
    assert result.exit_code == 0, result.output
    found: list[dict[str, object]] = json.loads(result.stdout)["rows"]
    return found


@pytest.mark.usefixtures("shared")
def test_empty_tables_have_their_columns_and_no_rows() -> None:
    assert rows("SELECT * FROM trades") == []
    described = {row["column_name"]: row["column_type"] for row in rows("DESCRIBE trades")}
    contract = load_contracts(Settings().contracts_dir)["trades"]
    assert list(described) == [item.name for item in contract.fields]
    assert described["price"] == "DECIMAL(38,18)"


@pytest.mark.usefixtures("shared")
def test_latest_revision_wins_over_all_commits_and_a_rebuild_over_the_stream() -> None:
    assert rows("SELECT count(*) AS n FROM bars") == [{"n": 5}]
    found = rows("SELECT close, revision FROM bars_latest ORDER BY ts_start_ns")
    assert found == [{"close": "4", "revision": 7}, {"close": "5", "revision": 0}]
    # Twice in one query: a source that can be read once only would answer with nothing.
    twice = rows("SELECT count(*) AS n FROM market.bars_latest a JOIN bars b USING (instrument, ts_start_ns)")
    assert twice == [{"n": 5}]


def test_values_are_exact_and_times_are_utc(lake: Settings) -> None:
    append_bars(lake, [MinuteBar(BTC, 0, *([Decimal("0.000000000000000001")] * 3), Decimal("12345.6"), Decimal(3))])
    [row] = rows("SELECT low, close, ts_start, ts_start_ns, low - close AS loss FROM bars")
    assert row == {
        "low": "0.000000000000000001",
        "close": "12345.6",
        "ts_start": "2026-01-01 00:00:00+00:00",
        "ts_start_ns": START_NS,
        "loss": "-12345.599999999999999999",
    }


def test_a_field_added_after_the_first_file_is_null_in_it_and_ids_decide_not_names(lake: Settings) -> None:
    append_bars(lake, [bar(0, "2")])
    with table_of(lake, "bars").update_schema() as update:
        update.rename_column("close", "last")
    with table_of(lake, "bars").update_schema() as update:
        update.add_column("close", LongType())
    assert rows("SELECT last, close FROM market.bars") == [{"last": "2", "close": None}]


def test_deleted_rows_are_not_seen(lake: Settings) -> None:
    append_bars(lake, [bar(0, "2"), bar(1, "3")])
    table_of(lake, "bars").delete(EqualTo("revision", 0))
    append_bars(lake, [bar(2, "4", revision=1)])
    assert rows("SELECT close FROM bars") == [{"close": "4"}]


def test_a_table_that_duckdb_cannot_read_by_itself_is_read_by_pyiceberg(lake: Settings) -> None:
    catalog = open_catalog(lake)
    catalog.create_namespace("other")
    schema = Schema(NestedField(1, "numbers", ListType(2, LongType(), element_required=False), required=False))
    table = catalog.create_table("other.lists", schema)
    table.append(pa.table({"numbers": [[1, 2], [3]]}, schema=table.schema().as_arrow()))
    assert rows("SELECT sum(len(a.numbers)) AS n FROM lists AS a, other.lists AS b") == [{"n": "6"}]


@pytest.mark.usefixtures("shared")
def test_limit_cuts_and_says_so() -> None:
    assert len(rows("SELECT * FROM bars", "--limit", "3")) == 3
    assert "only the first 3" in call("SELECT close FROM bars", "--limit", "3").output
    assert "only the first" not in call("SELECT close FROM bars", "--limit", "5").output


def test_without_a_query_the_tables_are_listed_with_what_they_are(shared: Settings) -> None:
    result = call("--output", "json")
    assert result.exit_code == 0, result.output
    tables = {item["name"]: item for item in json.loads(result.stdout)["tables"]}
    contracts = load_contracts(shared.contracts_dir)
    assert set(tables) == {f"market.{item.table.name}" for item in contracts.with_table if item.table is not None}
    assert tables["market.bars"]["view"] == "market.bars_latest"
    assert (tables["market.bars"]["rows"], tables["market.trades"]["rows"]) == (5, 0)
    assert tables["market.trades"]["purpose"] == contracts["trades"].purpose


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("query", ["SELECT * FROM tradez", "SELEC 1", "SELECT nothing FROM trades", "DELETE FROM bars"])
def test_a_wrong_query_exits_2_with_a_sentence_and_the_tables(query: str) -> None:
    result = call(query)
    assert result.exit_code == 2
    assert "cannot be answered" in result.output
    assert "market.trades" in result.output
    assert "Traceback" not in result.output


def test_show_tables_names_all(shared: Settings) -> None:
    names = {row["name"] for row in rows("SHOW TABLES")}
    assert {"trades", "bars", "bars_latest"} <= names
    assert not (shared.home_path / "duckdb").exists()


def test_a_home_without_tables_says_how_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFORGE_HOME", str(tmp_path / "new"))
    assert "streamforge up" in call().output
    assert call("SELECT * FROM trades").exit_code == 2
