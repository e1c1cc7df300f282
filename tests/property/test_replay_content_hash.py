"""The content hash: blind to order, files and encodings, and to nothing else."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from streamforge.contracts import load_contracts
from streamforge.errors import SchemaMismatchError
from streamforge.lakehouse.content_hash import ContentHash, content_hash, content_schema, row_hashes
from streamforge.settings import Settings

SCHEMA = pa.schema(
    [
        ("name", pa.large_string()),
        ("payload", pa.large_binary()),
        ("price", pa.decimal128(38, 18)),
        ("count", pa.int64()),
        ("small", pa.int32()),
        ("flag", pa.bool_()),
        ("ratio", pa.float64()),
        ("ts", pa.timestamp("us", tz="UTC")),
    ]
)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "name": st.text(alphabet="ab\0é€", max_size=5),
    "payload": st.binary(max_size=5),
    "price": st.decimals(min_value=-(10**19), max_value=10**19, places=18, allow_nan=False),
    "count": st.integers(-(2**63), 2**63 - 1),
    "small": st.integers(-(2**31), 2**31 - 1),
    "flag": st.booleans(),
    "ratio": st.floats(allow_nan=False),
    "ts": st.integers(-(10**15), 10**15).map(lambda us: _EPOCH + dt.timedelta(microseconds=us)),
}
ROW = st.fixed_dictionaries({name: st.none() | values for name, values in VALUES.items()})
ROWS = st.lists(ROW, max_size=12)
# How long drawing takes is the machine's affair.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


def table(rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


@relaxed
@given(ROWS, st.randoms(use_true_random=False))
def test_hash_of_permuted_rows_is_the_same(rows: list[dict[str, Any]], random: Any) -> None:
    shuffled = random.sample(rows, len(rows))
    assert content_hash(table(shuffled), SCHEMA) == content_hash(table(rows), SCHEMA)


@relaxed
@given(ROWS, st.integers(0, 12))
def test_hash_of_parts_adds_up_to_the_hash_of_all(rows: list[dict[str, Any]], cut: int) -> None:
    whole = table(rows)
    parts = content_hash(whole.slice(0, cut), SCHEMA) + content_hash(whole.slice(cut), SCHEMA)
    assert parts == content_hash(whole, SCHEMA)


@relaxed
@given(st.lists(ROW, min_size=1, max_size=6), st.data())
def test_hash_moves_with_any_single_change(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(rows) - 1))
    column = data.draw(st.sampled_from(sorted(VALUES)))
    value = data.draw(st.none() | VALUES[column])
    assume(value != rows[index][column])
    changed = [*rows[:index], {**rows[index], column: value}, *rows[index + 1 :]]
    assert content_hash(table(changed), SCHEMA) != content_hash(table(rows), SCHEMA)


@relaxed
@given(ROW, ROW, st.sampled_from(sorted(VALUES)))
def test_hash_moves_when_two_rows_swap_a_value(one: dict[str, Any], other: dict[str, Any], column: str) -> None:
    swapped = [{**one, column: other[column]}, {**other, column: one[column]}]
    assume(one[column] != other[column])
    assume({k: v for k, v in one.items() if k != column} != {k: v for k, v in other.items() if k != column})
    assert content_hash(table(swapped), SCHEMA) != content_hash(table([one, other]), SCHEMA)


@relaxed
@given(ROWS, ROW)
def test_two_equal_rows_differ_from_one_and_from_none(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    hashes = {content_hash(table(rows + [row] * times), SCHEMA) for times in range(4)}
    assert len(hashes) == 4
    lanes = {each.lanes for each in hashes}
    assert len(lanes) == 4, "the lanes alone tell them apart, not only the count"


@relaxed
@given(ROWS, st.integers(1, 5))
def test_hash_is_blind_to_chunks_dictionaries_string_width_and_columns_of_others(
    rows: list[dict[str, Any]], chunk: int
) -> None:
    expected = content_hash(table(rows), SCHEMA)
    whole = table(rows)
    chunks = [whole.slice(start, chunk) for start in range(0, len(rows), chunk)]
    assert content_hash(pa.concat_tables(chunks) if chunks else whole, SCHEMA) == expected
    narrow = whole.cast(
        pa.schema([field.with_type(pa.string()) if field.name == "name" else field for field in SCHEMA])
    ).set_column(1, "payload", whole["payload"].cast(pa.binary()))
    encoded = narrow.set_column(0, "name", narrow["name"].dictionary_encode())
    mixed = encoded.select(list(reversed(SCHEMA.names))).append_column("commit_id", pa.array(["c"] * len(rows)))
    assert content_hash(mixed, SCHEMA) == expected


@relaxed
@given(st.lists(ROW, min_size=1, max_size=6))
def test_column_that_is_null_everywhere_counts_as_absent(rows: list[dict[str, Any]]) -> None:
    wider = pa.schema([*SCHEMA, ("later", pa.string())])
    assert content_hash(table([{**row, "later": None} for row in rows], wider), wider) == content_hash(
        table(rows), SCHEMA
    )
    assert content_hash(table(rows), wider) == content_hash(table(rows), SCHEMA)


def test_same_value_in_two_columns_swapped_between_the_columns_moves_the_hash() -> None:
    schema = pa.schema([("bid", pa.int64()), ("ask", pa.int64())])
    assert content_hash(table([{"bid": 1, "ask": 2}], schema), schema) != content_hash(
        table([{"bid": 2, "ask": 1}], schema), schema
    )


def test_row_hashes_has_a_pair_of_lanes_for_each_row() -> None:
    schema = pa.schema([("count", pa.int64())])
    assert row_hashes(table([{"count": 1}, {"count": 2}, {"count": None}], schema), schema).shape == (2, 3)


def test_hash_of_known_rows_is_what_it_was_when_defined() -> None:
    """Stored hashes are compared over versions: this value may never change."""
    rows = [
        {
            "name": "BTC-USDT.SIM",
            "payload": b"\x00\xff",
            "price": Decimal("61234.500000000000000001"),
            "count": -1,
            "small": 7,
            "flag": True,
            "ratio": 0.5,
            "ts": _EPOCH + dt.timedelta(microseconds=1_700_000_000_000_001),
        },
        dict.fromkeys(VALUES),
    ]
    assert str(content_hash(table(rows), SCHEMA)) == "b4c6fac68aec73dbc63eb642d52b2b54-2"
    assert content_hash(table([]), SCHEMA) == ContentHash()


def test_content_schema_of_trades_leaves_out_provenance_only() -> None:
    contract = load_contracts(Settings(_env_file=None).contracts_dir)["trades"]
    left_out = {field.name for field in contract.fields} - set(content_schema(contract).names)
    assert left_out == {
        "source_epoch",
        "source_partition",
        "source_offset",
        "source_index",
        "commit_id",
        "contract_version",
        "parser_version",
        "raw_epoch",
    }


def test_hash_of_a_column_of_another_type_is_refused_and_named() -> None:
    with pytest.raises(SchemaMismatchError, match="'price' is string and cannot be read as decimal128"):
        content_hash(pa.table({"price": ["cheap"]}), SCHEMA)
