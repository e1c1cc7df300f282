"""The structs say what the contracts say, field by field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from confluent_kafka import Message

from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import DecodeError
from streamforge.events import Command, ProcessEvent
from streamforge.letter_decisions import LetterDecision
from streamforge.market.records import Bar, DeadLetter, MarketGap, Prediction, Trade, VenueBar, raw_record
from streamforge.settings import Settings
from streaming.processors.types import ChangelogRecord

STRUCTS: dict[str, type[msgspec.Struct]] = {
    "trades": Trade,
    "bars": Bar,
    "venue-bars": VenueBar,
    "predictions": Prediction,
    "market-gaps": MarketGap,
    "raw-trades.dlq": DeadLetter,
    "parser-changelog": ChangelogRecord,
    "bars-changelog": ChangelogRecord,
    "history-parser-changelog": ChangelogRecord,
    "inference-changelog": ChangelogRecord,
    "letter-decisions": LetterDecision,
    "queue-events": ProcessEvent,
    "queue-control": Command,
}


@pytest.fixture(scope="module")
def contracts() -> Contracts:
    return load_contracts(Settings.model_fields["contracts_dir"].default)


def type_name(kind: msgspec.inspect.Type) -> str:
    """Return a field's type in the contract's spelling; int stands for long too."""
    if isinstance(kind, msgspec.inspect.Metadata):
        return str((kind.extra or {})["physical_type"])
    if isinstance(kind, msgspec.inspect.UnionType):
        [inner] = [item for item in kind.types if not isinstance(item, msgspec.inspect.NoneType)]
        return type_name(inner)
    if isinstance(kind, msgspec.inspect.ListType):
        return f"list<{type_name(kind.item_type)}>"
    if isinstance(kind, msgspec.inspect.DictType):
        return f"map<{type_name(kind.key_type)},{type_name(kind.value_type)}>"
    names: dict[type, str] = {
        msgspec.inspect.StrType: "string",
        msgspec.inspect.EnumType: "string",
        msgspec.inspect.IntType: "long",
        msgspec.inspect.FloatType: "double",
        msgspec.inspect.BoolType: "boolean",
    }
    return names[type(kind)]


def is_optional(kind: msgspec.inspect.Type) -> bool:
    return isinstance(kind, msgspec.inspect.UnionType) and any(
        isinstance(item, msgspec.inspect.NoneType) for item in kind.types
    )


@pytest.mark.parametrize("contract_id", STRUCTS)
def test_struct_has_the_contracts_wire_fields(contracts: Contracts, contract_id: str) -> None:
    info = msgspec.inspect.type_info(STRUCTS[contract_id])
    assert isinstance(info, msgspec.inspect.StructType)
    wire = {item.name: item for item in contracts[contract_id].wire_fields}
    found = {item.name: item for item in info.fields}
    assert set(found) == set(wire)
    for name, item in wire.items():
        expected = "long" if item.type_name == "int" else item.type_name
        assert type_name(found[name].type) == expected, name
        assert is_optional(found[name].type) is not item.required, name


@pytest.mark.parametrize("contract_id", STRUCTS)
def test_struct_enums_are_the_contracts(contracts: Contracts, contract_id: str) -> None:
    info = msgspec.inspect.type_info(STRUCTS[contract_id])
    assert isinstance(info, msgspec.inspect.StructType)
    for item in info.fields:
        if isinstance(item.type, msgspec.inspect.EnumType):
            assert {member.value for member in item.type.cls} == set(contracts[contract_id].field(item.name).enum)


def message(headers: Any, key: bytes | None = b"BTC-USDT.SIM", value: bytes | None = b"{}") -> Message:
    return Message(topic="raw-trades", partition=3, offset=7, key=key, value=value, headers=headers)


HEADERS = [
    ("venue", b"SIM"),
    ("channel", b"trade"),
    ("connection_id", b"c-1"),
    ("sequence_in_connection", b"12"),
    ("ts_receive_ns", b"1700000000000000000"),
]


def test_raw_record_of_a_good_record_has_every_part() -> None:
    record = raw_record("id", message(HEADERS))
    assert record == ("id", 3, 7, "BTC-USDT.SIM", "SIM", "trade", "c-1", 12, 1_700_000_000_000_000_000, b"{}")


@pytest.mark.parametrize("missing", [name for name, _ in HEADERS])
def test_raw_record_without_a_header_is_refused(missing: str) -> None:
    with pytest.raises(DecodeError, match=missing) as caught:
        raw_record("id", message([item for item in HEADERS if item[0] != missing]))
    assert caught.value.reason == "missing_header"


@pytest.mark.parametrize(
    ("name", "value"),
    [("ts_receive_ns", b"soon"), ("ts_receive_ns", b"-1"), ("sequence_in_connection", b"9" * 30), ("venue", b"\xff")],
)
def test_raw_record_with_a_bad_header_is_refused(name: str, value: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        raw_record("id", message([*HEADERS, (name, value)]))
    assert caught.value.reason == "bad_header"


@pytest.mark.parametrize(("key", "reason"), [(None, "missing_key"), (b"", "missing_key"), (b"\xff", "bad_key")])
def test_raw_record_without_a_readable_key_is_refused(key: bytes | None, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        raw_record("id", message(HEADERS, key))
    assert caught.value.reason == reason


def test_raw_record_without_headers_or_value_is_refused_or_empty() -> None:
    with pytest.raises(DecodeError):
        raw_record("id", message(None))
    assert raw_record("id", message(HEADERS, value=None)).payload == b""
