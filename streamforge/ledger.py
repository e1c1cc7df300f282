"""The ledger of the simulated market: what it handed to which connection, and what it held back on purpose.

One Arrow IPC stream file per simulator process, `ledger-<start>.arrows`, in a folder. The file is readable
while it is written; a record batch that is cut short at its end (a SIGKILL during the write) is left out.

`sent` means: handed to the transport of a connection that was open. What the client has read of it is not
known here: the tail before a disconnect may have been lost on the way, as it is with a real venue.
Rows are decided in the same step as the send and are written at least every flush interval, so a SIGKILL of
the simulator can lose the rows of one interval (0.2 s by default), and those only. With a flush interval of
0 each batch of rows is on its way to the file before its messages go to the sockets: then a SIGKILL can
leave rows of messages that were not sent, never the other way round.
"""

from __future__ import annotations

import time
from array import array
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from streamforge.errors import ConfigurationError

LEDGER_SUFFIX = ".arrows"
_FIELDS: list[tuple[str, pa.DataType]] = [
    ("connection", pa.string()),
    ("symbol", pa.string()),
    ("channel", pa.string()),
    ("first_id", pa.int64()),
    ("last_id", pa.int64()),
    ("ts_event_ns", pa.int64()),
    ("ts_sent_ns", pa.int64()),
    ("fate", pa.string()),
    ("detail", pa.string()),
]
LEDGER_SCHEMA = pa.schema(_FIELDS)

_CODES = pa.int32()
_WRITTEN_SCHEMA = pa.schema(
    [(name, pa.dictionary(_CODES, kind) if kind == pa.string() else kind) for name, kind in _FIELDS]
)
# Ids and times rise slowly, so a row takes a few bytes instead of fifty.
_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
_COLUMNS = 7
_NO_IDS = -1


class Fate(IntEnum):
    """What became of one message for one connection; the ledger holds the lower-case name."""

    SENT = 0
    DOUBLED = 1
    """The second copy of a message whose first copy has a row `sent`."""
    REORDERED = 2
    """Sent, but behind the message that followed it."""
    MALFORMED = 3
    """Sent, but cut so that it is no JSON."""
    DROPPED = 4
    """Not sent: dropped on purpose."""
    STALLED = 5
    """Not sent: its connection was open and silent."""
    CONNECTED = 6
    """No message: a connection was opened. Ids are -1."""
    DISCONNECTED = 7
    """No message: a connection ended; `detail` says why. Ids are -1."""


ARRIVING_FATES = ("sent", "doubled", "reordered")
"""Fates of messages that went out whole."""

_FATE_NAMES = [fate.name.lower() for fate in Fate]


class LedgerWriter:
    """Append rows to one ledger file; not thread-safe.

    Args:
        folder: where the file is made; created when absent.
        flush_interval_ms: how old a row may become before `flush_due` writes it.
    """

    def __init__(self, folder: Path, *, start_ns: int | None = None, flush_interval_ms: int = 200) -> None:
        self._interval_ns = flush_interval_ms * 1_000_000
        self._rows = array("q")
        self._connections: list[str] = []
        self._symbols: list[str] = []
        self._channels: list[str] = []
        self._details: list[str] = []
        self._streams: dict[tuple[str, str, str], int] = {}
        self._flushed_ns = 0
        self.rows_total = 0
        self.path = folder / f"ledger-{start_ns or time.time_ns()}{LEDGER_SUFFIX}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb", buffering=0)
        except OSError as error:
            msg = f"cannot write a ledger to {folder}: {error.strerror}. Choose another --ledger folder"
            raise ConfigurationError(msg) from error
        self._writer = pa.ipc.new_stream(self._file, _WRITTEN_SCHEMA, options=_OPTIONS)

    def connection_code(self, name: str) -> int:
        """Register a connection and return its code for `append`."""
        self._connections.append(name)
        return len(self._connections) - 1

    def stream_code(self, symbol: str, channel: str, detail: str = "") -> int:
        """Return the code of (symbol, channel, detail) for `append`, registering it when it is new."""
        key = (symbol, channel, detail)
        code = self._streams.get(key)
        if code is None:
            code = self._streams[key] = len(self._streams)
            self._symbols.append(symbol)
            self._channels.append(channel)
            self._details.append(detail)
        return code

    def append(  # noqa: PLR0917 - the hot path: names would cost as much as the row
        self, connection: int, stream: int, first_id: int, last_id: int, ts_event_ns: int, ts_sent_ns: int, fate: int
    ) -> None:
        """Add one row; it reaches the file with the next flush."""
        self._rows.extend((connection, stream, first_id, last_id, ts_event_ns, ts_sent_ns, fate))

    def append_connection(self, connection: int, fate: Fate, detail: str, now_ns: int) -> None:
        """Add the row of a connection that was opened or ended."""
        self.append(connection, self.stream_code("", "", detail), _NO_IDS, _NO_IDS, now_ns, now_ns, fate)

    def flush_due(self, now_ns: int) -> None:
        """Write the rows when the oldest may be older than the flush interval."""
        if now_ns - self._flushed_ns >= self._interval_ns:
            self._flushed_ns = now_ns
            self.flush()

    def flush(self) -> None:
        """Write all rows to the file."""
        if not self._rows:
            return
        table = np.frombuffer(self._rows, dtype=np.int64).reshape(-1, _COLUMNS)
        streams = pa.array(table[:, 1], _CODES)
        columns: list[pa.Array[Any]] = [
            _encoded(pa.array(table[:, 0], _CODES), self._connections),
            _encoded(streams, self._symbols),
            _encoded(streams, self._channels),
            *(pa.array(table[:, column], pa.int64()) for column in range(2, 6)),
            _encoded(pa.array(table[:, 6], _CODES), _FATE_NAMES),
            _encoded(streams, self._details),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_WRITTEN_SCHEMA))
        self.rows_total += len(table)
        self._rows = array("q")

    def close(self) -> None:
        """Write what is left and end the file; safe to call twice."""
        if self._file.closed:
            return
        self.flush()
        self._writer.close()
        self._file.close()


def read_ledger(folder: Path) -> pa.Table:
    """Read every ledger file of `folder`, oldest first, as far as each is whole.

    Returns:
        A table with `LEDGER_SCHEMA`; rows of one connection are in the order of sending.

    Raises:
        ConfigurationError: the folder holds no ledger.
    """
    files = sorted(folder.glob(f"ledger-*{LEDGER_SUFFIX}"))
    if not files:
        msg = f"no ledger in {folder}: expected files ledger-*{LEDGER_SUFFIX}. Run `streamforge simulate --ledger`"
        raise ConfigurationError(msg)
    batches = [batch for file in files for batch in _whole_batches(file)]
    if not batches:
        return LEDGER_SCHEMA.empty_table()
    return pa.concat_tables(pa.Table.from_batches([batch]).cast(LEDGER_SCHEMA) for batch in batches)


def _whole_batches(file: Path) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = []
    with pa.memory_map(str(file)) if file.stat().st_size else pa.BufferReader(b"") as source:
        try:
            reader = pa.ipc.open_stream(source)
            while True:
                batches.append(reader.read_next_batch())
        except (StopIteration, pa.ArrowInvalid, OSError):
            # The end, or a batch that was cut short: what was read before it is whole.
            return batches


def _encoded(codes: pa.Array[Any], names: list[str]) -> pa.Array[Any]:
    return pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string()))
