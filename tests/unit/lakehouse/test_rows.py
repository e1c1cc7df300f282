"""Records become rows: exact decimals, contract types, and dead letters for what does not fit."""

from __future__ import annotations

import json
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamforge.contracts import Contract, load_contracts
from streamforge.lakehouse import rows as rows_module
from streamforge.lakehouse.rows import Decoded, RowDecoder, finish_rows, raw_topic_ids
from tests.kafka_records import HEADERS, Record
from tests.writer_support import RAW_TOPIC_ID, trade_value

CONTRACTS = load_contracts(Path(__file__).resolve().parents[3] / "contracts")
NS = 1_700_000_000_123_456_789


def decode(contract_id: str, *records: Record) -> Decoded:
    return RowDecoder(CONTRACTS[contract_id]).decode(records)  # type: ignore[arg-type]


def finished(contract: Contract, decoded: Decoded) -> list[dict[str, Any]]:
    table = pa.concat_tables(decoded.rows.values())
    epochs = dict.fromkeys(raw_topic_ids(table), 4)
    done = finish_rows(contract, table, commit_id="commit", source_epoch=2, raw_epochs=epochs)
    assert done.schema == contract.arrow_schema
    return done.to_pylist()


def test_trade_becomes_a_row_with_every_contract_field() -> None:
    decoded = decode("trades", Record(trade_value(7, ts_event_ns=NS), offset=41, partition=3))
    (row,) = finished(CONTRACTS["trades"], decoded)
    assert row["price"] == Decimal("60007.250000000000000000")
    assert row["ts_event"].microsecond == 123_456
    assert row["ts_event_ns"] == NS
    assert (row["raw_topic_id"], row["raw_epoch"], row["raw_offset"]) == (RAW_TOPIC_ID, 4, 7)
    assert (row["source_epoch"], row["source_partition"], row["source_offset"], row["source_index"]) == (2, 3, 41, 0)
    assert (row["commit_id"], row["contract_version"]) == ("commit", CONTRACTS["trades"].version)
    assert row.keys() == {field.name for field in CONTRACTS["trades"].fields}


@pytest.mark.parametrize("contract_id", [item.id for item in CONTRACTS.with_table if item.topic is not None])
def test_every_wire_field_of_every_contract_reaches_the_row(contract_id: str) -> None:
    contract = CONTRACTS[contract_id]
    if contract.topic is not None and contract.topic.encoding == "bytes":
        decoded = decode(contract_id, Record(b"\xff\x00", headers=HEADERS))
        (row,) = finished(contract, decoded)
        assert row["payload"] == b"\xff\x00"
        assert (row["instrument"], row["sequence_in_connection"]) == ("BTC-USDT.SIM", 12)
        return
    values = {item.name: _example(item.type_name, item.enum) for item in contract.wire_fields}
    (row,) = finished(contract, decode(contract_id, Record(json.dumps(values).encode())))
    for item in contract.wire_fields:
        expected = Decimal(values[item.name]) if item.type_name.startswith("decimal") else values[item.name]
        assert row[item.name] == expected, item.name


def test_optional_field_missing_is_null_and_unknown_field_is_ignored() -> None:
    gap = {item.name: _example(item.type_name, item.enum) for item in CONTRACTS["market-gaps"].wire_fields}
    del gap["id_before"]
    gap["id_after"] = None
    record = Record(json.dumps(gap | {"newer": [{"x": 1}]}).encode())
    (row,) = finished(CONTRACTS["market-gaps"], decode("market-gaps", record))
    assert row["id_before"] is None
    assert row["id_after"] is None


BAD = {
    "missing_field": (b'{"instrument": "x"}', rows_module.NOT_THE_CONTRACT),
    "no_value": (None, rows_module.NO_VALUE),
    "empty": (b"", rows_module.MALFORMED),
    "blank": (b"  ", rows_module.MALFORMED),
    "two_in_one": (trade_value(1) + b"\n" + trade_value(2), rows_module.MALFORMED),
    "two_on_one_line": (trade_value(1) + trade_value(2), rows_module.MALFORMED),
    "not_utf8": (trade_value(1).replace(b'"SIM"', b'"\xff"'), rows_module.MALFORMED),
    "lone_surrogate": (trade_value(1).replace(b'"SIM"', b'"\\ud800"'), rows_module.MALFORMED),
    "deep": (b'{"newer":' + b"[" * 100_000, rows_module.MALFORMED),
    "enum": (trade_value(1, aggressor_side="BID"), rows_module.NOT_THE_CONTRACT),
    "price_number": (trade_value(1, price=1), rows_module.NOT_THE_CONTRACT),
    "price_text": (trade_value(1, price="ten"), rows_module.BAD_DECIMAL),
    "price_nan": (trade_value(1, price="NaN"), rows_module.BAD_DECIMAL),
    "price_too_fine": (trade_value(1, price="0.0000000000000000001"), rows_module.BAD_DECIMAL),
    "price_too_great": (trade_value(1, price="1" + "0" * 20), rows_module.BAD_DECIMAL),
    "int_too_great": (trade_value(1, raw_partition=2**31), rows_module.BAD_NUMBER),
    "long_too_great": (trade_value(1, raw_offset=2**63), rows_module.BAD_NUMBER),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_record_in_the_middle_is_refused_alone(name: str) -> None:
    value, reason = BAD[name]
    good = [Record(trade_value(number), offset=number) for number in range(9)]
    decoded = decode("trades", *good[:4], Record(value, offset=100), *good[4:])
    (refused,) = decoded.refused
    assert (refused.message.offset(), refused.reason) == (100, reason)
    assert refused.detail
    assert decoded.rows[0]["source_offset"].to_pylist() == list(range(9))


def test_pretty_printed_value_is_decoded_although_it_has_line_feeds() -> None:
    value = json.dumps(json.loads(trade_value(5)), indent=1).encode()
    decoded = decode("trades", Record(trade_value(4)), Record(value, offset=1))
    assert not decoded.refused
    assert decoded.rows[0]["trade_id"].to_pylist() == ["4", "5"]


def test_conspiring_bad_values_never_shift_rows() -> None:
    """Joined with commas these three would be two valid records; joined by lines none is."""
    whole = trade_value(1)
    parts = [whole[:40], whole[40:], trade_value(2) + b"," + trade_value(3)]
    decoded = decode("trades", *[Record(part, offset=index) for index, part in enumerate(parts)])
    assert not decoded.rows
    assert len(decoded.refused) == 3


def test_rows_of_interleaved_topic_partitions_are_split_in_offset_order() -> None:
    records = [Record(trade_value(n), offset=n, partition=n % 3) for n in range(9)]
    records[4] = Record(b"{", offset=4, partition=1)
    decoded = decode("trades", *records)
    found = {partition: table["source_offset"].to_pylist() for partition, table in decoded.rows.items()}
    assert found == {0: [0, 3, 6], 1: [1, 7], 2: [2, 5, 8]}
    assert decoded.rows[1]["trade_id"].to_pylist() == ["1", "7"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"headers": HEADERS[:4]}, rows_module.BAD_HEADERS),
        ({"headers": None}, rows_module.BAD_HEADERS),
        ({"headers": [("venue", None), *HEADERS[1:]]}, rows_module.BAD_HEADERS),
        ({"headers": [("venue", b"\xff"), *HEADERS[1:]]}, rows_module.BAD_HEADERS),
        ({"headers": [*HEADERS[:4], ("ts_receive_ns", b"soon")]}, rows_module.BAD_HEADERS),
        ({"headers": HEADERS, "key": None}, rows_module.BAD_KEY),
    ],
)
def test_raw_record_with_bad_headers_or_key_is_refused(changes: dict[str, Any], reason: str) -> None:
    decoded = decode("raw-trades", Record(b"a", headers=HEADERS), Record(b"b", 1, **changes))
    assert [(item.message.offset(), item.reason) for item in decoded.refused] == [(1, reason)]
    assert decoded.rows[0]["payload"].to_pylist() == [b"a"]


def test_raw_headers_in_another_order_with_others_between_are_found_by_name() -> None:
    headers = [("trace", b"x"), *reversed(HEADERS)]
    decoded = decode("raw-trades", Record(b"a", headers=headers), Record(b"b", 1, headers=HEADERS))
    assert decoded.rows[0]["venue"].to_pylist() == ["SIM", "SIM"]
    assert decoded.rows[0]["sequence_in_connection"].to_pylist() == [12, 12]


@settings(max_examples=200, deadline=None)
@given(st.decimals(min_value="-99999999999999999999.999999999999999999", max_value=Decimal(10) ** 20 - 1, places=18))
def test_any_decimal_that_fits_comes_out_equal(value: Decimal) -> None:
    decoded = decode("trades", Record(trade_value(1, price=f"{value:f}")))
    assert not decoded.refused
    assert decoded.rows[0]["price"].to_pylist() == [value]


TEXTS = st.from_regex(r"-?[0-9]{1,45}(\.[0-9]{1,45})?([eE]-?[0-9]{1,3})?", fullmatch=True)


@settings(max_examples=500, deadline=None)
@given(TEXTS)
@example("340282366920938463804")
@example("93372957940498868974.0934484753573520058")
@example("9e58")
@example("1.0000E-111")
@example("1e30")
@example("9" * 39)
@example("-12345678901234567890.123456789012345678")
def test_any_decimal_text_comes_out_equal_or_is_a_dead_letter(text: str) -> None:
    """Arrow's own cast wraps around beyond 128 bits and says nothing; no such value may pass."""
    decoded = decode("trades", Record(trade_value(1, price=text)))
    with localcontext() as context:
        context.prec = 400
        value = Decimal(text)
        fits = abs(value) < Decimal(10) ** 20 and value == value.quantize(Decimal(10) ** -18)
    if decoded.refused:
        assert not fits or len(text) > 57 or "e" in text.lower()
    else:
        assert decoded.rows[0]["price"].to_pylist() == [value]


def _example(type_name: str, enum: tuple[str, ...]) -> Any:
    if enum:
        return enum[0]
    if type_name.startswith("decimal"):
        return "12.5"
    return {"string": "text", "int": 3, "long": 2**40, "boolean": True, "double": 0.5}[type_name]
