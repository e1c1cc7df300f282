"""Load history: rows of candle files into the raw backfill topic, as they stand in the file.

Nothing is understood here but which file holds which instrument: the history parser reads the rows behind
the log. Loading is at least once (a repeated load writes the rows again), the parser keeps each bar once.
"""

from __future__ import annotations

import gzip
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pyarrow as pa
from confluent_kafka import KafkaError, Message, Producer
from pyarrow import feather

from streamforge.contracts import Contracts
from streamforge.errors import ConfigurationError, PermanentSourceError, RetryableSourceError
from streamforge.kafka import admin_client, describe_topics, producer_config
from streamforge.log_reader import log_ends, log_starts
from streamforge.market.candles import BINARY_COLUMNS, CSV_COLUMNS, CandleFormat
from streamforge.market.instruments import instrument_of, split_symbol
from streamforge.offsets import OffsetRange, TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import topic_of

RAW_TOPIC = "raw-candles-backfill"

Progress = Callable[[int, int, str], None]
"""Hears how many rows are written, of how many, and which file is read."""

_FLUSH_TIMEOUT_S = 60.0
_POLL_S = 0.1
_BATCH_ROWS = 8_192
_PROGRESS_ROWS = 1_000
_READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)


class _Reader(Protocol):
    """How the files of one format are read."""

    def count(self, path: Path) -> int:
        """Check the columns and return the number of rows."""

    def rows(self, path: Path) -> Iterator[bytes]:
        """Yield the rows."""


@dataclass(frozen=True, slots=True)
class CandleFile:
    """One file to load: its instrument, and how many rows it has."""

    path: Path
    instrument: str
    rows: int


@dataclass(frozen=True, slots=True)
class HistoryPlan:
    """What a load would do.

    Args:
        format: of all the files.
        venue: whose candles they are.
        files: in the order of their names.
        others: files of the folders that are not of this format and are left alone.
    """

    format: CandleFormat
    venue: str
    files: Sequence[CandleFile]
    others: int

    @property
    def rows(self) -> int:
        """Return the rows of all files."""
        return sum(item.rows for item in self.files)


def plan_history(paths: Sequence[Path], kind: CandleFormat, venue: str | None = None) -> HistoryPlan:
    """Find the candle files among `paths` (files, or folders whose files are looked at) and check each.

    Raises:
        ConfigurationError: a path does not exist, a named file or a folder has no file of the format.
        PermanentSourceError: a file cannot be read or has other columns.
    """
    label = venue or kind.venue
    found: list[Path] = []
    others = 0
    for path in paths:
        if path.is_dir():
            inside = sorted(item for item in path.iterdir() if item.is_file())
            fitting = [item for item in inside if kind.file_name.fullmatch(item.name)]
            others += len(inside) - len(fitting)
            if not fitting:
                raise _not_of_format(f"folder {path} has {len(inside)} files and none", kind)
            found += fitting
        elif not path.is_file():
            msg = f"{path} does not exist. Name a file such as {kind.example}, or a folder of them"
            raise ConfigurationError(msg)
        elif kind.file_name.fullmatch(path.name):
            found.append(path)
        else:
            raise _not_of_format(f"{path} is not", kind)
    reader = _READERS[kind.name]
    files = [CandleFile(path, _instrument(path, kind, label), _counted(reader, path)) for path in dict.fromkeys(found)]
    return HistoryPlan(kind, label, files, others)


def load_history(
    settings: Settings,
    contracts: Contracts,
    plan: HistoryPlan,
    *,
    progress: Progress = lambda *_: None,
    now_ns: Callable[[], int] = time.time_ns,
) -> list[OffsetRange]:
    """Write the rows of a plan to the raw backfill topic and return what that topic holds then.

    Raises:
        PermanentSourceError: the topic does not exist, or a file cannot be read to its end.
        RetryableSourceError: the broker does not take the rows.
    """
    topic = topic_of(contracts, RAW_TOPIC).name
    identity = describe_topics(admin_client(settings), [topic]).get(topic)
    if identity is None:
        msg = f"topic {topic} does not exist. Create the topics with `streamforge contracts apply`"
        raise PermanentSourceError(msg)
    load_id = uuid.uuid4().hex[:12]
    sender = _Sender(settings, topic)
    done = 0
    for item in plan.files:
        headers = _headers(plan, item, load_id)
        for row_number, row in enumerate(_read(_READERS[plan.format.name].rows(item.path), item.path, done)):
            sender.send(item.instrument, row, headers(row_number, now_ns()))
            done += 1
            if done % _PROGRESS_ROWS == 0:
                progress(done, plan.rows, item.path.name)
    sender.flush()
    progress(done, plan.rows, "all files are read")
    partitions = [TopicPartition(topic, number) for number in range(identity.partitions)]
    starts, ends = log_starts(settings, partitions), log_ends(settings, partitions)
    return [OffsetRange(topic, item.partition, starts[item], ends[item]) for item in partitions if ends[item]]


class _Sender:
    """Hands rows to the broker and says so when it does not take them."""

    def __init__(self, settings: Settings, topic: str) -> None:
        self._topic = topic
        self._producer = Producer(producer_config(settings))
        self._failure: KafkaError | None = None

    def send(self, instrument: str, row: bytes, headers: list[tuple[str, str | bytes | None]]) -> None:
        """Hand over one row; waits while the producer's buffer is full."""
        deadline_s = time.monotonic() + _FLUSH_TIMEOUT_S
        while True:
            try:
                self._producer.produce(self._topic, row, instrument, headers=headers, on_delivery=self._delivered)
            except BufferError:
                self._producer.poll(_POLL_S)
                if time.monotonic() > deadline_s:
                    raise self._error("its buffer stays full") from None
            else:
                break
        self._producer.poll(0)
        self._check()

    def flush(self) -> None:
        """Wait until the broker has every row."""
        left = self._producer.flush(_FLUSH_TIMEOUT_S)
        self._check()
        if left:
            raise self._error(f"{left} rows had no answer within {_FLUSH_TIMEOUT_S:g} s")

    def _check(self) -> None:
        if self._failure is not None:
            raise self._error(self._failure.str())

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._failure = error

    def _error(self, what: str) -> RetryableSourceError:
        return RetryableSourceError(
            f"the broker did not take all rows for {self._topic}: {what}. Is it up? `streamforge broker status`. "
            "Then load again: what has come already is not doubled"
        )


class _CsvReader:
    """Gzipped text: a row is its line, without the line feed."""

    def count(self, path: Path) -> int:
        """Check the header line and return the number of rows."""
        with gzip.open(path, "rb") as file:
            header = file.readline().strip().decode("utf-8", errors="replace")
            if tuple(header.split(",")) != CSV_COLUMNS:
                raise _other_columns(path, CSV_COLUMNS, header[:200] or "an empty file")
            return sum(1 for line in file if line.strip())

    def rows(self, path: Path) -> Iterator[bytes]:
        """Yield the lines behind the header; blank ones are no rows."""
        with gzip.open(path, "rb") as file:
            file.readline()
            for line in file:
                row = line.rstrip(b"\r\n")
                if row.strip():
                    yield row


class _FeatherReader:
    """Feather: a row is a JSON object of its columns, numbers as the shortest text that is the same number."""

    def count(self, path: Path) -> int:
        """Check columns and types and return the number of rows."""
        table = feather.read_table(path, memory_map=True)
        types = {item.name: item.type for item in table.schema}
        good = set(BINARY_COLUMNS) <= types.keys() and pa.types.is_timestamp(types["date"])
        if not good or types["date"].tz is None or not all(_is_number(types[name]) for name in BINARY_COLUMNS[1:]):
            found = ", ".join(f"{name}: {kind}" for name, kind in types.items())
            raise _other_columns(path, ("date: timestamp with a zone", *BINARY_COLUMNS[1:]), found)
        return int(table.num_rows)

    def rows(self, path: Path) -> Iterator[bytes]:
        """Yield the rows; `date` becomes nanoseconds since 1970 UTC."""
        table = feather.read_table(path, columns=list(BINARY_COLUMNS), memory_map=True)
        dates = table["date"].cast(pa.timestamp("ns", tz="UTC")).cast(pa.int64())
        table = table.set_column(table.schema.get_field_index("date"), "date", dates)
        encode = msgspec.json.Encoder().encode
        for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield encode(row)


_READERS: Mapping[str, _Reader] = {"candles_1h": _CsvReader(), "candles_1m": _FeatherReader()}


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _headers(
    plan: HistoryPlan, item: CandleFile, load_id: str
) -> Callable[[int, int], list[tuple[str, str | bytes | None]]]:
    """Return what makes the headers of a row; in the order of `RAW_HEADERS`, which parsing is quickest for."""
    common: list[Any] = [
        ("venue", plan.venue),
        ("channel", plan.format.name),
        ("connection_id", f"{item.path.name}#{load_id}"),
    ]

    def headers(row_number: int, ts_receive_ns: int) -> list[tuple[str, str | bytes | None]]:
        return [*common, ("sequence_in_connection", str(row_number)), ("ts_receive_ns", str(ts_receive_ns))]

    return headers


def _instrument(path: Path, kind: CandleFormat, venue: str) -> str:
    match = kind.file_name.fullmatch(path.name)
    parts = match.groupdict() if match is not None else {}
    base, quote = split_symbol(parts["symbol"]) if "symbol" in parts else (parts["base"], parts["quote"])
    return instrument_of(base, quote, venue)


def _counted(reader: _Reader, path: Path) -> int:
    try:
        return reader.count(path)
    except _READ_ERRORS as error:
        msg = f"{path} cannot be read: {error}. Nothing was loaded. Fetch the file again or leave it out"
        raise PermanentSourceError(msg) from error


def _read(rows: Iterator[bytes], path: Path, done: int) -> Iterator[bytes]:
    try:
        yield from rows
    except _READ_ERRORS as error:
        msg = f"{path} cannot be read to its end: {error}. {done} rows of the files before it are loaded. "
        raise PermanentSourceError(
            f"{msg}Fetch it again and load again: what has come already is not doubled"
        ) from error


def _not_of_format(what: str, kind: CandleFormat) -> ConfigurationError:
    return ConfigurationError(
        f"{what} named like a file of {kind.name}, for instance {kind.example}. Choose another --format or path"
    )


def _other_columns(path: Path, expected: Sequence[str], found: str) -> PermanentSourceError:
    return PermanentSourceError(
        f"{path}: expected the columns {', '.join(expected)}, found {found}. Nothing was loaded. "
        "Leave the file out or choose another --format"
    )
