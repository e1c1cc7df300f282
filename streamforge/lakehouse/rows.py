"""Kafka records of one topic become rows of its table, as the contract says.

A whole fetch is decoded at once, one Arrow array for each column: cut out of the records where they are written in
the contract's own form (`streamforge.lakehouse.json_lines`), else by one JSON decoder call over all values, which alone
says what is refused. Where anything in it cannot be decoded the fetch is halved until the bad record stands alone, so
that one bad record costs a few decodes and never sinks the batch. Decimals go from text to decimal(38,18) by Arrow,
which refuses what does not fit and never rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message

from streamforge.contract_model import Contract, ContractField, Encoding, FieldSource
from streamforge.errors import NOT_JSON, ConfigurationError, DecodeError
from streamforge.lakehouse.json_lines import LineCutter, text_bytes

SOURCE_EPOCH = "source_epoch"
SOURCE_PARTITION = "source_partition"
SOURCE_OFFSET = "source_offset"
SOURCE_INDEX = "source_index"
COMMIT_ID = "commit_id"
CONTRACT_VERSION = "contract_version"
RAW_TOPIC_ID = "raw_topic_id"

NO_VALUE = "no_value"
MALFORMED = "malformed"
NOT_THE_CONTRACT = "not_the_contract"
BAD_DECIMAL = "bad_decimal"
BAD_NUMBER = "bad_number"
BAD_TEXT = "bad_text"
BAD_HEADERS = "bad_headers"
BAD_KEY = "bad_key"

CUT_FROM_RECORDS = 500

_WIRE_TYPES: dict[str, Any] = {"string": str, "int": int, "long": int, "boolean": bool, "double": float}
_ALWAYS_FITS = 20
"""Characters of digits and a point that hold less than 10^20."""
_EXACT_IN_128_BITS = 39
"""Characters of text that cannot hold more than 38 digits and a point."""
_LONGEST_DECIMAL = 57
"""Characters of text that are exact in 256 bits at any scale up to 18."""
_NS_TYPE = pa.timestamp("ns", tz="UTC")


@dataclass(frozen=True, slots=True)
class Refused:
    """One record that cannot be decoded, and why: a dead letter."""

    message: Message
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """Rows by topic-partition number, each in offset order, without what only the commit knows; and refusals."""

    rows: Mapping[int, pa.Table]
    refused: Sequence[Refused]


@dataclass(frozen=True, slots=True)
class _Records:
    """Records of one or more topic-partitions, those of one after another, and where each is from."""

    messages: Sequence[Message]
    partitions: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def halves(self) -> tuple[_Records, _Records]:
        middle = len(self.messages) // 2
        first = _Records(self.messages[:middle], self.partitions[:middle], self.offsets[:middle])
        return first, _Records(self.messages[middle:], self.partitions[middle:], self.offsets[middle:])


class RowDecoder:
    """Decodes the records of one contract's topic.

    Args:
        contract: of the topic.
        cut_from: so many records are cut into columns where they have the contract's own form; fewer are decoded as
            JSON, which begins faster. The result is the same.

    Raises:
        ConfigurationError: the contract asks for what a row cannot be made of.
    """

    def __init__(self, contract: Contract, *, cut_from: int = CUT_FROM_RECORDS) -> None:
        if contract.topic is None or contract.table is None:
            msg = f"contract {contract.id} ({contract.path}) has no topic and table, so it has no rows"
            raise ConfigurationError(msg)
        self._contract = contract
        self._types = {field.name: field.type for field in contract.arrow_schema}
        self._derived = [item for item in contract.fields if item.source is FieldSource.DERIVED]
        for item in self._derived:
            if item.type_name != "timestamptz" and item.derived_from != RAW_TOPIC_ID:
                msg = f"contract {contract.id} ({contract.path}): no rule derives {item.name} from {item.derived_from}"
                raise ConfigurationError(msg)
        self._columns: Callable[[Sequence[Message]], dict[str, pa.Array[Any]]]
        if contract.topic.encoding is Encoding.JSON:
            self._wire = contract.wire_fields
            self._json = msgspec.json.Decoder(_wire_struct(contract.id, self._wire))
            self._getters = [attrgetter(item.name) for item in self._wire]
            self._cutter = LineCutter(self._wire) if LineCutter.cuts(self._wire) else None
            self._cut_from = cut_from
            self._enums = {item.name: pa.array(item.enum, pa.string()) for item in self._wire if item.enum}
            self._columns = self._json_columns
        else:
            self._headers = [item for item in contract.fields if item.source is FieldSource.HEADER]
            self._header_names = [item.name for item in self._headers]
            self._columns = self._bytes_columns

    def decode(self, messages: Sequence[Message]) -> Decoded:
        """Decode records of the topic; those of one topic-partition must be in offset order."""
        refused: list[Refused] = []
        tables = list(self._halves(_in_partition_order(messages), refused))
        if not tables:
            return Decoded({}, refused)
        table = pa.concat_tables(tables)
        encode: Any = pc.run_end_encode  # type: ignore[attr-defined]  # the stubs do not know it
        runs = encode(table[SOURCE_PARTITION].combine_chunks())
        rows, start = {}, 0
        for partition, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
            rows[partition] = table.slice(start, end - start)
            start = end
        return Decoded(rows, refused)

    def _halves(self, records: _Records, refused: list[Refused]) -> Iterable[pa.Table]:
        if not records.messages:
            return
        try:
            yield self._table(records)
        except DecodeError as error:
            if len(records.messages) == 1:
                refused.append(Refused(records.messages[0], error.reason, error.detail))
                return
            for half in records.halves():
                yield from self._halves(half, refused)

    def _table(self, records: _Records) -> pa.Table:
        columns = self._columns(records.messages)
        for item in self._derived:
            if item.type_name == "timestamptz" and item.derived_from is not None:
                columns[item.name] = _microseconds(columns[item.derived_from], self._types[item.name])
        columns[SOURCE_PARTITION] = pa.array(records.partitions)
        columns[SOURCE_OFFSET] = pa.array(records.offsets)
        return pa.table(columns)

    def _json_columns(self, messages: Sequence[Message]) -> dict[str, pa.Array[Any]]:
        values = [message.value() for message in messages]
        if None in values:
            raise DecodeError(NO_VALUE, "the record has no value; expected a JSON object")
        found = self._cut_columns(cast("list[bytes]", values))
        if found is not None:
            return found
        records = self._json_records(values)
        return {
            item.name: typed_array(item, list(map(getter, records)), self._types[item.name])
            for item, getter in zip(self._wire, self._getters, strict=True)
        }

    def _cut_columns(self, values: Sequence[bytes]) -> dict[str, pa.Array[Any]] | None:
        """Return the columns without decoding JSON; None where there is any doubt, or a value that does not fit."""
        if self._cutter is None or len(values) < self._cut_from:
            return None
        texts = self._cutter.cut(values)
        if texts is None:
            return None
        for name, known in self._enums.items():
            if not pc.all(pc.is_in(texts[name], known)).as_py():
                return None
        try:
            return {item.name: typed_array(item, texts[item.name], self._types[item.name]) for item in self._wire}
        except DecodeError:
            return None

    def _json_records(self, values: Sequence[Any]) -> Sequence[Any]:
        """Decode one value a line; a value with a line feed in it is decoded alone, so that lines stay values."""
        try:
            if len(values) == 1:
                return [self._json.decode(values[0])]
            lines = b"\n".join(values)
            if lines.count(b"\n") != len(values) - 1:
                raise DecodeError(MALFORMED, "a value has a line feed")
            records = self._json.decode_lines(lines)
        except msgspec.ValidationError as error:
            raise DecodeError(NOT_THE_CONTRACT, str(error)) from error
        except (*NOT_JSON, ValueError) as error:
            raise DecodeError(MALFORMED, f"{type(error).__name__}: {error}") from error
        if len(records) != len(values):
            raise DecodeError(MALFORMED, "a value is blank")
        return records

    def _bytes_columns(self, messages: Sequence[Message]) -> dict[str, pa.Array[Any]]:
        headers: list[Any] = [message.headers() or () for message in messages]
        wanted = self._header_names
        # The loader writes them in the contract's order; any other order costs a dictionary for each record.
        if any([name for name, _ in pairs] != wanted for pairs in headers):
            headers = [_in_order(pairs, wanted) for pairs in headers]
        columns = {
            item.name: _header_array(item, [pairs[index][1] for pairs in headers], self._types[item.name])
            for index, item in enumerate(self._headers)
        }
        for item in self._contract.fields:
            if item.source is FieldSource.KEY:
                keys = [message.key() for message in messages]
                if item.required and not all(keys):
                    raise DecodeError(BAD_KEY, f"the record has no key; expected {item.name}")
                columns[item.name] = _text_array(item, keys, self._types[item.name], BAD_KEY)
            elif item.source is FieldSource.PAYLOAD:
                values = [message.value() or b"" for message in messages]
                columns[item.name] = pa.array(values, self._types[item.name])
        return columns


def finish_rows(
    contract: Contract, rows: pa.Table, *, commit_id: str, source_epoch: int, raw_epochs: Mapping[str, int]
) -> pa.Table:
    """Add what only the commit knows, and order the columns as the contract does.

    Args:
        contract: of the table.
        rows: from `RowDecoder`, or made by a replay; columns that it has are kept.
        commit_id: ours, not Iceberg's.
        source_epoch: of the topic in this table.
        raw_epochs: by raw topic id, each id of the rows.
    """
    count = rows.num_rows
    constants: dict[str, Any] = {
        SOURCE_EPOCH: source_epoch,
        SOURCE_INDEX: 0,
        COMMIT_ID: commit_id,
        CONTRACT_VERSION: contract.version,
    }
    columns: list[Any] = []
    for item, field in zip(contract.fields, contract.arrow_schema, strict=True):
        if item.name in rows.column_names:
            columns.append(rows[item.name])
        elif item.source is FieldSource.DERIVED and item.derived_from == RAW_TOPIC_ID:
            columns.append(_epochs(rows[RAW_TOPIC_ID], raw_epochs))
        elif item.name in constants:
            columns.append(pa.repeat(pa.scalar(constants[item.name], field.type), count))
        else:
            columns.append(pa.nulls(count, field.type))
    return pa.Table.from_arrays(columns, schema=contract.arrow_schema)


def raw_topic_ids(rows: pa.Table) -> list[str]:
    """Return the raw topic ids that rows name; none where the table has no such column."""
    if RAW_TOPIC_ID not in rows.column_names:
        return []
    return [str(item) for item in pc.unique(rows[RAW_TOPIC_ID]).to_pylist()]


def typed_array(item: ContractField, values: Sequence[Any] | pa.StringArray, arrow_type: pa.DataType) -> pa.Array[Any]:
    """Return values of one field as Arrow, exactly: a decimal is text and must fit, a number must fit.

    Args:
        item: the field.
        values: Python's, or all as text; a whole number's text is digits alone, which the caller has checked.
        arrow_type: of the field.

    Raises:
        DecodeError: a value does not fit the field.
    """
    try:
        if pa.types.is_decimal(arrow_type):
            return _decimals(cast(pa.StringArray, _array(values, pa.string())), arrow_type)
        return _array(values, arrow_type)
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
        reason = BAD_DECIMAL if pa.types.is_decimal(arrow_type) else BAD_NUMBER
        reason = BAD_TEXT if item.type_name == "string" else reason
        raise DecodeError(reason, f"{item.name} as {item.type_name}: {error}") from error


def _array(values: Sequence[Any] | pa.StringArray, arrow_type: pa.DataType) -> pa.Array[Any]:
    if not isinstance(values, pa.StringArray):
        return pa.array(values, arrow_type)
    return values if values.type == arrow_type else values.cast(arrow_type)


def _decimals(texts: pa.StringArray, arrow_type: Any) -> pa.Array[Any]:
    """Cast text to decimal, exactly or not at all.

    Arrow's own cast to 128 bits is exact only within them: beyond 38 digits it wraps around and says nothing
    (`340282366920938463804` becomes 340.6...), and far below its scale an exponent becomes 0. So exponents
    are refused, size and length are checked first, and long text goes through 256 bits.
    """
    lengths: Any = pc.binary_length(texts)
    longest = pc.max(lengths).as_py() or 0
    if longest > _LONGEST_DECIMAL:
        msg = f"a text of {longest} characters; expected at most {_LONGEST_DECIMAL}"
        raise ValueError(msg)
    if longest > min(_ALWAYS_FITS, arrow_type.precision - arrow_type.scale) or not _is_digits_and_points(texts):
        _check_size(texts, arrow_type)
    if longest > _EXACT_IN_128_BITS:
        return texts.cast(pa.decimal256(76, arrow_type.scale)).cast(arrow_type)
    return texts.cast(arrow_type)


def _check_size(texts: pa.StringArray, arrow_type: Any) -> None:
    if any(pc.any(pc.match_substring(texts, letter)).as_py() for letter in "eE"):
        msg = "a text with an exponent; expected a plain decimal"
        raise ValueError(msg)
    sizes: Any = pc.min_max(texts.cast(pa.float64())).as_py()
    bound = 1.5 * 10.0 ** (arrow_type.precision - arrow_type.scale)  # exact bounds are the cast's; this is below a wrap
    if sizes["max"] is not None and not -bound < sizes["min"] <= sizes["max"] < bound:
        msg = f"values from {sizes['min']} to {sizes['max']} do not fit {arrow_type}"
        raise ValueError(msg)


def _is_digits_and_points(texts: pa.StringArray) -> bool:
    """Return whether there is nothing from `.` to `9` besides; the slash between them is left to the cast."""
    return bool((text_bytes(texts) - np.uint8(ord(".")) <= ord("9") - ord(".")).all())


def _in_partition_order(messages: Sequence[Message]) -> _Records:
    partitions = np.array([message.partition() for message in messages], np.int32)
    offsets = np.array([message.offset() for message in messages], np.int64)
    if (partitions[1:] < partitions[:-1]).any():
        order = np.argsort(partitions, kind="stable")
        messages = [messages[index] for index in order.tolist()]
        partitions, offsets = partitions[order], offsets[order]
    return _Records(messages, partitions, offsets)


def _wire_struct(name: str, fields: Sequence[ContractField]) -> type[msgspec.Struct]:
    required = [(item.name, _wire_type(item)) for item in fields if item.required]
    optional = [(item.name, _wire_type(item) | None, None) for item in fields if not item.required]
    return msgspec.defstruct(name.replace("-", "_"), [*required, *optional], gc=False)


def _wire_type(item: ContractField) -> Any:
    if item.enum:
        return Literal[item.enum]
    return _WIRE_TYPES.get(item.type_name, str)


def _microseconds(nanoseconds: pa.Array[Any], arrow_type: pa.DataType) -> pa.Array[Any]:
    return nanoseconds.cast(_NS_TYPE).cast(arrow_type, safe=False)


def _in_order(pairs: Any, wanted: Sequence[str]) -> list[tuple[str, Any]]:
    found = dict(pairs.items() if isinstance(pairs, Mapping) else pairs)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DecodeError(BAD_HEADERS, f"header {missing[0]!r} is missing; expected {', '.join(wanted)}")
    return [(name, found[name]) for name in wanted]


def _header_array(item: ContractField, values: Sequence[Any], arrow_type: pa.DataType) -> pa.Array[Any]:
    if item.required and None in values:
        raise DecodeError(BAD_HEADERS, f"header {item.name!r} has no value")
    return _text_array(item, values, arrow_type, BAD_HEADERS)


def _text_array(item: ContractField, values: Sequence[Any], arrow_type: pa.DataType, reason: str) -> pa.Array[Any]:
    try:
        # The cast from bytes checks the UTF-8; the one from text to a number refuses what does not fit.
        return pa.array(values, pa.binary()).cast(pa.string()).cast(arrow_type)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DecodeError(reason, f"{item.name} as {item.type_name}: {error}") from error


def _epochs(topic_ids: pa.ChunkedArray[Any], raw_epochs: Mapping[str, int]) -> pa.Array[Any]:
    encoded = topic_ids.combine_chunks().dictionary_encode()
    epochs = pa.array([raw_epochs[str(item)] for item in encoded.dictionary.to_pylist()], pa.int32())
    return epochs.take(encoded.indices)
