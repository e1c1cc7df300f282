"""The content hash: what rows say, without who wrote them, where they lie and in which order.

Two sets of rows have the same hash when they are equal as multisets over the contract's columns without
provenance, whatever their order, files, row groups, dictionary encoding or string width. It is used to see
that a replay would change nothing and that a rebuilt table is the one that was there.

Definition, fixed for ever (stored hashes must stay comparable). All arithmetic is modulo 2**64, on two lanes:

- a column's salt is BLAKE2b-128 of its name, as two little-endian words, one a lane;
- a value's words: of a number, boolean, date or timestamp its 64 bits; of a decimal its two words, low first;
  of text or bytes the two words of BLAKE2b-128, each the only word of its lane. A value's hash folds its words
  into the salt: `h = mix(h ^ word)`, with `mix` the finalizer of SplitMix64. Null adds 0, so that a column
  that is null everywhere counts as absent and a contract may gain optional fields;
- a row's hash is `mix(sum of its values' hashes + 1)`; the hash of rows is the sum of theirs, with their count.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from streamforge.contracts import Contract, FieldSource
from streamforge.errors import SchemaMismatchError

Words = npt.NDArray[np.uint64]

# Made by a program version or numbered by a table: provenance that travels in a record's value.
PROVENANCE_FIELDS = frozenset({"parser_version", "processor_version", "raw_epoch"})

_LANES = 2
_DIGEST_BYTES = 16
_TEXT_OR_BYTES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


@dataclass(frozen=True, slots=True)
class ContentHash:
    """The hash of a multiset of rows; hashes of disjoint sets add up."""

    rows: int = 0
    lanes: tuple[int, int] = (0, 0)

    def __add__(self, other: ContentHash) -> ContentHash:
        low, high = ((a + b) % 2**64 for a, b in zip(self.lanes, other.lanes, strict=True))
        return ContentHash(self.rows + other.rows, (low, high))

    @classmethod
    def of_rows(cls, hashes: Words) -> ContentHash:
        """Return the hash of rows that have `hashes`, as from `row_hashes`."""
        low, high = hashes.sum(axis=1, dtype=np.uint64)
        return cls(hashes.shape[1], (int(low), int(high)))

    def __str__(self) -> str:
        return f"{self.lanes[0]:016x}{self.lanes[1]:016x}-{self.rows}"


def content_schema(contract: Contract) -> pa.Schema:
    """Return the columns that the content hash of a contract's rows covers."""
    kept = {
        item.name
        for item in contract.fields
        if item.source is not FieldSource.WRITER and item.name not in PROVENANCE_FIELDS
    }
    return pa.schema([field for field in contract.arrow_schema if field.name in kept])


def content_hash(data: pa.Table, schema: pa.Schema) -> ContentHash:
    """Return the content hash of `data` over the columns of `schema`.

    Raises:
        SchemaMismatchError: a column cannot be read as the type that `schema` says.
    """
    return ContentHash.of_rows(row_hashes(data, schema))


def row_hashes(data: pa.Table, schema: pa.Schema) -> Words:
    """Return each row's hash.

    A column of `schema` that `data` lacks counts as null; a column that `schema` lacks is left out.

    Shapes:
        result: `(2, data.num_rows)` uint64

    Raises:
        SchemaMismatchError: a column cannot be read as the type that `schema` says.
    """
    total = np.ones((_LANES, data.num_rows), dtype=np.uint64)
    for field in schema:
        index = data.schema.get_field_index(field.name)
        if index >= 0:
            total += _column_hashes(field, data.column(index))
    return _mix(total)


def _column_hashes(field: pa.Field[Any], column: pa.ChunkedArray[Any]) -> Words:
    array = _as_type(field, column)
    salt = _digest_words([field.name.encode()])
    if pa.types.is_binary(array.type):
        encoded = array.dictionary_encode()
        hashes = _mix(salt ^ _digest_words(encoded.dictionary.to_pylist()))
        hashes = hashes[:, encoded.indices.fill_null(0).to_numpy()] if hashes.size else _zeros(array)
    else:
        hashes = np.repeat(salt, len(array), axis=1)
        for word in _fixed_width_words(array, 2 if pa.types.is_decimal128(array.type) else 1):
            hashes = _mix(hashes ^ word)
    if array.null_count:
        hashes[:, array.is_null().to_numpy(zero_copy_only=False)] = 0
    return hashes


def _as_type(field: pa.Field[Any], column: pa.ChunkedArray[Any]) -> Any:
    """Return the column as one array of binary, decimal128 or int64, the types that are hashed."""
    kind = field.type
    try:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        column = column.cast(kind)
        array: Any = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
        if any(is_kind(kind) for is_kind in _TEXT_OR_BYTES):
            return array.cast(pa.binary())
        if pa.types.is_decimal128(kind):
            return array
        if pa.types.is_floating(kind):
            return array.cast(pa.float64()).view(pa.int64())
        return array.cast(pa.int64())
    except pa.ArrowInvalid as error:
        msg = f"column {field.name!r} is {column.type} and cannot be read as {kind}: {error}"
        raise SchemaMismatchError(msg) from error


def _fixed_width_words(array: Any, words: int) -> Words:
    """Return the values' 64-bit words, least significant first; those of nulls are whatever lies there.

    Shapes:
        result: `(words, len(array))` uint64
    """
    buffer = array.buffers()[1]
    if buffer is None:
        return np.zeros((words, len(array)), dtype=np.uint64)
    flat: Words = np.frombuffer(memoryview(buffer), dtype=np.dtype("<u8"))
    return flat[array.offset * words :][: len(array) * words].reshape(-1, words).T


def _digest_words(values: list[bytes]) -> Words:
    """Return the two words of each value's digest.

    Shapes:
        result: `(2, len(values))` uint64
    """
    joined = b"".join(hashlib.blake2b(value, digest_size=_DIGEST_BYTES).digest() for value in values)
    return np.frombuffer(joined, dtype=np.dtype("<u8")).reshape(-1, _LANES).T


def _zeros(array: Any) -> Words:
    return np.zeros((_LANES, len(array)), dtype=np.uint64)


def _mix(values: Words) -> Words:
    """Return SplitMix64's finalizer of each word: a bijection in which every input bit moves every output bit.

    Source:
        Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014), variant 13 of Stafford.
    """
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
