"""Cutting columns out of records gives the rows and refusals that decoding them as JSON gives, for any bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamforge.contracts import load_contracts
from streamforge.lakehouse.json_lines import LineCutter
from streamforge.lakehouse.rows import CUT_FROM_RECORDS, Decoded, RowDecoder
from tests.kafka_records import Record
from tests.writer_support import trade_value

CONTRACTS = load_contracts(Path(__file__).resolve().parents[2] / "contracts")
TRADES = CONTRACTS["trades"]
CUTTING, PLAIN = RowDecoder(TRADES, cut_from=1), RowDecoder(TRADES, cut_from=sys.maxsize)
FIRST, SECOND = trade_value(1), trade_value(2)
END = b',"parser_version":"1"}'


def outcome(decoded: Decoded) -> tuple[Any, ...]:
    rows = {partition: table.combine_chunks() for partition, table in decoded.rows.items()}
    refused = [(item.message.offset(), item.reason, item.detail) for item in decoded.refused]
    return {number: (table.schema, table.to_pylist()) for number, table in rows.items()}, refused


def agree(values: list[bytes]) -> None:
    records: Any = [Record(value, offset=offset, partition=offset % 3) for offset, value in enumerate(values)]
    assert outcome(CUTTING.decode(records)) == outcome(PLAIN.decode(records))


def test_records_in_the_contracts_form_are_cut() -> None:
    """Without this the tests below could compare the slow way with itself."""
    texts = LineCutter(TRADES.wire_fields).cut([FIRST, trade_value(22, symbol="é€😀", price="-1")])
    assert texts is not None
    assert {name: text.to_pylist()[1] for name, text in texts.items()} == {
        name: str(value) for name, value in json.loads(trade_value(22, symbol="é€😀", price="-1")).items()
    }


@pytest.mark.parametrize("contract_id", ["trades", "market-gaps"])
def test_form_with_number_or_text_at_either_end_is_cut(contract_id: str) -> None:
    fields = CONTRACTS[contract_id].wire_fields
    for shift in range(len(fields)):
        turned = [*fields[shift:], *fields[:shift]]
        values = {item.name: number if item.type_name in ("int", "long") else "x" for number, item in enumerate(turned)}
        text = json.dumps(values, separators=(",", ":")).encode()
        cut = LineCutter(turned).cut([text, text, text])
        assert cut is not None
        assert {name: texts.to_pylist() for name, texts in cut.items()} == {k: [str(v)] * 3 for k, v in values.items()}


ODD = [
    b'"', b"\\", b"\\u0041", b"\\n", b",", b":", b"{", b"}", b"\n", b"\r", b"\r\n", b"\t", b" ", b"\x00", b"\x1f",
    b"\x7f", b"\xff", b"\xc3\xa9", b"\xed\xa0\x80", b"\xc0\xaf", b"\xef\xbb\xbf", b"0", b"1", b"-", b"+", b".", b"e5",
    b"E", b"_", b"null", b"true", b"NaN", b"0x1", b"[", b"]", b'""', b'","', b'":"', b'","venue":"X', b"}\n{", END,
]  # fmt: skip
TEXT = st.text(max_size=8) | st.sampled_from(["", "BUY", 'a"b', "a\\b", "a\nb", "\u2028", "\ud7ff"])
NUMBER = st.integers(-1, 2**31) | st.integers(-(2**65), 2**65) | st.sampled_from([0, 1.0, 1e3, True, None, "5", "x"])
DECIMAL = st.from_regex(r"-?[0-9]{0,22}\.?[0-9]{0,20}(e[0-9])?", fullmatch=True)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "venue": TEXT, "symbol": TEXT, "trade_id": TEXT | st.none(), "price": DECIMAL, "size": DECIMAL | TEXT,
        "aggressor_side": st.sampled_from(["BUY", "SELL", "buy", "", None]),
        "ts_event_ns": NUMBER, "raw_partition": NUMBER, "raw_offset": NUMBER, "parser_version": TEXT, "other": NUMBER,
    },
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(ODD) | st.binary(max_size=3)), max_size=2
)


def edited(value: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, removed, put in edits:
        at = place % (len(value) + 1)
        value = value[:at] + put + value[at + removed :]
    return value


RECORD = st.builds(edited, st.builds(lambda changes: trade_value(3, **changes), FIELDS), EDITS)


@settings(max_examples=200, deadline=None)
@given(st.lists(RECORD | st.just(FIRST) | st.binary(max_size=20), min_size=1, max_size=4))
@example([FIRST, SECOND])
@example([FIRST.replace(b"BTCUSDT", b"BTC\\u0055SDT"), SECOND])
@example([FIRST.replace(b"BTCUSDT", b"BTC\tUSDT"), SECOND])
@example([FIRST.replace(b"BTCUSDT", b"BTC\nUSDT"), b"", SECOND])
@example([FIRST.replace(b"BTCUSDT", b"\xff"), SECOND])
@example([FIRST.replace(b"BTCUSDT", b"\xed\xa0\x80"), SECOND])
@example([FIRST.replace(b'"venue"', b'"venux"'), SECOND])
@example([FIRST.replace(b'"venue":"SIM"', b'"venue" : "SIM"'), SECOND])
@example([FIRST.replace(b'"venue":"SIM"', b'"venue":"SIM","venue":"X"'), SECOND])
@example([FIRST.replace(b'"venue":"SIM",', b""), SECOND.replace(b'"venue":"SIM"', b'"venue":"SIM","venue":"X"')])
@example([FIRST.replace(b'"raw_index":0', b'"raw_index":'), SECOND])
@example([FIRST.replace(b'"raw_index":0', b'"raw_index"0'), SECOND])
@example([FIRST.replace(b'"raw_index":0', b'"raw_index":00'), SECOND])
@example([FIRST.replace(b'"raw_index":0', b'"raw_index":-0'), SECOND])
@example([FIRST.replace(b'"raw_index":0', b'"raw_index":0x1'), SECOND])
@example([FIRST.replace(b'"raw_index":0', b'"raw_index": 0'), SECOND])
@example([FIRST.replace(b'"raw_index":0', b'"raw_index":0,"x":0'), SECOND])
@example([FIRST.replace(b'"raw_index":0', b'"raw_index":2147483648'), SECOND])
@example([FIRST.replace(b'"raw_offset":1', b'"raw_offset":9223372036854775808'), SECOND])
@example([FIRST.replace(b'"BUY"', b'"HOLD"'), SECOND])
@example([FIRST + b" ", SECOND])
@example([FIRST + b"\n", SECOND])
@example([FIRST + b"\r", SECOND])
@example([b" " + FIRST, SECOND])
@example([FIRST + b"\n" + SECOND, b""])
@example([FIRST + b"\r" + SECOND, b""])
@example([FIRST + SECOND, b""])
@example([FIRST[:-1], b"}", SECOND])
@example([FIRST[:40], FIRST[40:], SECOND])
@example([FIRST, SECOND + b"}"])
@example([b"\xef\xbb\xbf" + FIRST, SECOND])
@example([FIRST.replace(b'"size":"0.5"', b'"size":"1e30"'), SECOND])
@example([FIRST.replace(b'"size":"0.5"', b'"size":"340282366920938463804"'), SECOND])
@example([FIRST.replace(b'"size":"0.5"', b'"size":"99999999999999999999"'), SECOND])
@example([FIRST.replace(b'"size":"0.5"', b'"size":"1/2"'), SECOND])
@example([FIRST.replace(b'"size":"0.5"', b'"size":""'), SECOND])
@example([FIRST.replace(b'"size":"0.5"', b'"size":null'), SECOND])
def test_any_records_give_the_same_rows_and_refusals_cut_or_decoded(values: list[bytes]) -> None:
    agree(values)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.sampled_from(ODD), st.integers(0, 400))
def test_text_moved_over_the_border_of_two_records_changes_nothing(sizes: list[int], odd: bytes, place: int) -> None:
    """The same bytes in other records: only borders tell them apart."""
    lines = edited(b"\n".join(trade_value(size) for size in sizes), [(place, 0, odd)])
    agree(lines.split(b"\n"))
    agree([lines[start : start + len(FIRST)] for start in range(0, len(lines), len(FIRST))])


def test_one_bad_record_in_a_fetch_that_is_cut_is_refused_alone() -> None:
    values = [trade_value(number) for number in range(2 * CUT_FROM_RECORDS)]
    values[700] = values[700].replace(b'"BUY"', b'"HOLD"')
    records: Any = [Record(value, offset=offset) for offset, value in enumerate(values)]
    decoded = RowDecoder(TRADES).decode(records)
    assert outcome(decoded) == outcome(PLAIN.decode(records))
    assert [item.message.offset() for item in decoded.refused] == [700]
