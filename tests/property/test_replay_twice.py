"""A replay over any log and any range: what is right stays as it is, what is wrong becomes right, twice equals once."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from streamforge.contracts import load_contracts
from streamforge.lakehouse.content_hash import ContentHash, content_hash
from streamforge.lakehouse.remake import lineage_of, reparse_trades
from streamforge.offsets import OffsetRange
from streamforge.settings import Settings
from tests.kafka_records import HEADERS, Record
from tests.pipeline_support import trade_frame

SETTINGS = Settings(_env_file=None)  # type: ignore[call-arg]
LINEAGE = lineage_of(load_contracts(SETTINGS.contracts_dir), "trades")
TOPIC_ID = "topic-id"
BROKEN = b'{"stream":"btcusdt@trade","data":{"e":"trade","t":'
TRADE_HEADERS = [(name, b"trade" if name == "channel" else value) for name, value in HEADERS]
INSTRUMENTS = ("BTC-USDT.SIM", "ETH-USDT.SIM")


@dataclass(frozen=True)
class Log:
    """A topic-partition of raw records and a range of it."""

    records: list[Record]
    start: int
    end: int

    @property
    def ranges(self) -> list[OffsetRange]:
        """Return the range as a replay takes it."""
        return [OffsetRange("raw-trades", 0, self.start, self.end)]


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Return records of few trade ids, so that most come twice, and some that cannot be parsed."""
    frames = draw(
        st.lists(st.tuples(st.sampled_from(INSTRUMENTS), st.none() | st.integers(1, 9)), min_size=1, max_size=25)
    )
    records = [
        Record(
            BROKEN if number is None else trade_frame(instrument, number),
            offset=offset,
            key=instrument.encode(),
            headers=TRADE_HEADERS,
        )
        for offset, (instrument, number) in enumerate(frames)
    ]
    start = draw(st.integers(0, len(records) - 1))
    return Log(records, start, draw(st.integers(start + 1, len(records))))


def remake(kept: pa.Table, records: list[Record]) -> pa.Table:
    """Return the rows that the re-run makes of `records` where `kept` are the table's other rows."""
    step = reparse_trades(SETTINGS)(LINEAGE, TOPIC_ID)
    _, made = step.remake(step.remember(step.initial(), kept), records)  # type: ignore[arg-type]
    return made.rows.select(LINEAGE.compared.names).cast(LINEAGE.compared)


def replayed(table: pa.Table, log: Log) -> pa.Table:
    """Return the table after a replay of the log's range."""
    kept = table.filter(pa.array(~within(table, log)))
    return pa.concat_tables([kept, remake(kept, log.records[log.start : log.end])])


def within(table: pa.Table, log: Log) -> object:
    """Return which rows came from the range."""
    epochs = table.append_column("raw_epoch", pa.array([1] * table.num_rows, pa.int32()))
    return LINEAGE.within(epochs, 1, log.ranges)


def hash_of(table: pa.Table) -> ContentHash:
    """Return the content hash by which replays compare."""
    return content_hash(table, LINEAGE.compared)


def landed(log: Log) -> pa.Table:
    """Return the table as the live path made it of the whole log."""
    return remake(LINEAGE.compared.empty_table(), log.records)


@settings(max_examples=60, deadline=None)
@given(logs())
def test_replay_of_right_rows_changes_nothing(log: Log) -> None:
    table = landed(log)
    assert table.num_rows == len({(r.key(), r.value()) for r in log.records if r.value() != BROKEN})
    assert hash_of(replayed(table, log)) == hash_of(table)


@settings(max_examples=60, deadline=None)
@given(logs(), st.data())
def test_replay_mends_wrong_rows_and_twice_equals_once(log: Log, data: st.DataObject) -> None:
    right = landed(log)
    inside = [index for index, hit in enumerate(within(right, log)) if hit]  # type: ignore[arg-type, var-annotated]
    lost = set(data.draw(st.lists(st.sampled_from(inside), unique=True)) if inside else [])
    wrong = right.take(pa.array([index for index in range(right.num_rows) if index not in lost], pa.int64()))
    once = replayed(wrong, log)
    assert hash_of(once) == hash_of(right)
    assert hash_of(replayed(once, log)) == hash_of(once)
