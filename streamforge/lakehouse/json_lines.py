"""JSON records cut into columns of text without parsing them, where their own text proves that this is right.

Our producers write a record as msgspec does: the contract's fields in order, no spaces. So all records of a fetch
are one template with other values in it. The values are cut out where the template says they are, and what is left
between them is compared with the template, byte by byte. If all of it is equal, and no value holds a backslash, a
control character or (numbers) anything but digits, then a JSON decoder can find nothing else. If anything differs
there is no answer, and the caller decodes the records as JSON: this way is faster, never more lenient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.lib.stride_tricks import sliding_window_view

from streamforge.contract_model import ContractField

_NUMBERS = frozenset({"int", "long"})
_MAX_BYTES = 2**31 - 1
"""What offsets of 32 bits reach."""

_Positions = npt.NDArray[np.int32]


class LineCutter:
    """Cuts records that are written in the contract's own form.

    Args:
        fields: of the record, in the order in which they are written.
    """

    def __init__(self, fields: Sequence[ContractField]) -> None:
        self._fields = fields
        self._quotes = 0
        first, shift, gaps, before = [], [], [], b"{"
        for item in fields:
            gap = before + b'"' + item.name.encode() + b'":'
            if item.type_name in _NUMBERS:
                first += [self._quotes + 1, self._quotes + 2]
                shift += [2, -1]
                self._quotes += 2
                before = b","
            else:
                gap += b'"'
                first += [self._quotes + 2, self._quotes + 3]
                shift += [1, 0]
                self._quotes += 4
                before = b'",'
            gaps.append(gap)
        self._end = before[:-1] + b"}\n"
        if before == b",":
            shift[-1] = -len(b"}\n{")
        self._first = np.array(first)
        """From which quote each value's start and end is found; one past a record's last is the next record's first."""
        self._shift = np.array(shift, np.int32)
        self._gaps = [self._end + gaps[0], *gaps[1:]]
        """What stands before each value, from the end of the value before it."""
        self._gap_bytes = np.array([len(gap) for gap in self._gaps], np.int32)
        self._numbers = [index for index, item in enumerate(fields) if item.type_name in _NUMBERS]
        self._others = [index for index, item in enumerate(fields) if item.type_name not in _NUMBERS]

    @staticmethod
    def cuts(fields: Sequence[ContractField]) -> bool:
        """Return whether every field is a text or a whole number."""
        return all(
            item.type_name in _NUMBERS or item.type_name == "string" or item.type_name.startswith("decimal")
            for item in fields
        )

    def cut(self, values: Sequence[bytes]) -> Mapping[str, pa.StringArray] | None:
        """Return the text of each field of all records; None where nothing proves that it is.

        A number's text is digits without leading zeros, a text's characters stand for themselves.
        """
        lines = b"\n".join((self._end[:-1], *values, b""))
        if not lines.startswith(self._gaps[0]) or not _is_plain(lines, len(values)):
            return None
        places = self._places(lines, len(values))
        if places is None or not self._fits(lines, places):
            return None
        return self._texts(lines, places, len(values))

    def _places(self, lines: bytes, count: int) -> _Positions | None:
        """Return where values start and end, in turn, between 0 and the end of all lines."""
        before = self._end.count(b'"')
        found = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord('"'))
        if len(found) != before + count * self._quotes:
            return None
        quotes = np.empty(count * self._quotes + 1, np.int32)
        quotes[:-1] = found[before:]
        quotes[-1] = len(lines) + 1  # where the next record would have its first
        places = np.empty(2 * count * len(self._fields) + 2, np.int32)
        places[0], places[-1] = 0, len(lines)
        by_record = sliding_window_view(quotes, self._quotes + 1)[:: self._quotes]
        np.add(by_record[:, self._first], self._shift, out=places[1:-1].reshape(count, -1))
        return places

    def _fits(self, lines: bytes, places: _Positions) -> bool:
        """Return whether all that is not a value is the template."""
        starts, ends = places[1:-1:2], places[2:-1:2]
        gap_starts = places[:-2:2].reshape(-1, len(self._gaps))
        gap_bytes = starts.reshape(gap_starts.shape) - gap_starts
        # Places in order first: only then is each text that is looked at below, or cut later, inside the lines.
        if not (gap_bytes == self._gap_bytes).all() or not (starts <= ends).all():
            return False
        if lines[places[-2] :] != self._end:
            return False
        for column, gap in enumerate(self._gaps):
            windows = np.ndarray((len(lines) - len(gap) + 1,), f"V{len(gap)}", lines, strides=(1,))
            if windows[gap_starts[:, column]].tobytes() != gap * len(gap_starts):
                return False
        return True

    def _texts(self, lines: bytes, places: _Positions, count: int) -> Mapping[str, pa.StringArray] | None:
        pieces: Any = pa.Array.from_buffers(
            pa.string(), len(places) - 1, [None, pa.py_buffer(places.data), pa.py_buffer(lines)]
        )
        records = np.arange(1, 2 * len(self._fields) * count, 2 * len(self._fields))
        found: dict[str, pa.StringArray] = {}
        for columns in filter(None, (self._numbers, self._others)):
            # One copy for all columns of a kind; numbers apart, so that their text does not live as long as the rows.
            texts = pieces.take(pa.array((2 * np.array(columns, int)[:, np.newaxis] + records).ravel()))
            if columns is self._numbers and not _are_numbers(texts):
                return None
            found |= {self._fields[index].name: texts.slice(at * count, count) for at, index in enumerate(columns)}
        return found


def text_bytes(texts: pa.StringArray) -> npt.NDArray[np.uint8]:
    """Return the bytes of all texts, one after another, without a copy."""
    if not len(texts):
        return np.empty(0, np.uint8)
    starts = _starts(texts)
    data = np.frombuffer(memoryview(texts.buffers()[2] or b""), np.uint8)
    return data[starts[0] : starts[-1]]


def _starts(texts: pa.StringArray) -> _Positions:
    offsets = np.frombuffer(memoryview(texts.buffers()[1] or b""), np.int32)
    return offsets[texts.offset : texts.offset + len(texts) + 1]


def _is_plain(lines: bytes, count: int) -> bool:
    """Return whether each character stands for itself, and none but `count` + 1 line feeds controls anything."""
    if len(lines) > _MAX_BYTES or b"\\" in lines:
        return False
    if not lines.isascii():
        try:
            lines.decode()
        except UnicodeDecodeError:
            return False
    controls: Any = np.count_nonzero(np.frombuffer(lines, np.uint8) < ord(" "))
    return bool(controls == count + 1)


def _are_numbers(texts: pa.StringArray) -> bool:
    """Return whether each text is one or more digits, the first of several not 0."""
    starts, data = _starts(texts), text_bytes(texts)
    if not (starts[1:] > starts[:-1]).all() or not (data - np.uint8(ord("0")) <= ord("9") - ord("0")).all():
        return False
    zeros = data[starts[:-1] - starts[0]] == ord("0")
    return not (zeros & (starts[1:] - starts[:-1] > 1)).any()


__all__ = ["LineCutter", "text_bytes"]
