"""The ledger's file: what is written comes back, and a file that is cut short gives what is whole."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamforge.errors import ConfigurationError
from streamforge.ledger import LEDGER_SCHEMA, Fate, LedgerWriter, read_ledger

ID = st.integers(-1, 2**63 - 1)
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["c1", "c2", "c3"]),
        st.sampled_from(["BTCUSDT", "ETHUSDT", ""]),
        st.sampled_from(["trade", "depth@100ms"]),
        ID,
        ID,
        ID,
        ID,
        st.sampled_from(Fate),
        st.booleans(),
    ),
    max_size=40,
)


Row = tuple[str, str, str, int, int, int, int, Fate]


def written(folder: Path, rows: list[Row], flush_after: set[int]) -> Path:
    ledger = LedgerWriter(folder)
    codes: dict[str, int] = {}
    for number, (connection, symbol, channel, first_id, last_id, ts_event_ns, ts_sent_ns, fate) in enumerate(rows):
        if connection not in codes:
            codes[connection] = ledger.connection_code(connection)
        stream = ledger.stream_code(symbol, channel)
        ledger.append(codes[connection], stream, first_id, last_id, ts_event_ns, ts_sent_ns, fate)
        if number in flush_after:
            ledger.flush()
    ledger.close()
    return ledger.path


@given(ROWS)
def test_ledger_any_rows_come_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[*Row, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    flush_after = {number for number, row in enumerate(rows) if row[-1]}
    written(folder, [row[:-1] for row in rows], flush_after)
    table = read_ledger(folder)
    assert table.schema == LEDGER_SCHEMA
    columns = LEDGER_SCHEMA.names[:-2]
    expected = [(*row[:7], row[7].name.lower()) for row in rows]
    assert [(*(item[name] for name in columns), item["fate"]) for item in table.to_pylist()] == expected


def test_read_ledger_every_truncation_gives_a_prefix(tmp_path: Path) -> None:
    rows = [(f"c{n // 3}", f"S{n}", "trade", n, n, n, n, Fate.SENT) for n in range(9)]
    whole = written(tmp_path / "whole", rows, {2, 5}).read_bytes()
    seen = set()
    for size in range(len(whole) + 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "ledger-1.arrows").write_bytes(whole[:size])
        ids = read_ledger(folder)["first_id"].to_pylist()
        assert ids == list(range(len(ids)))
        seen.add(len(ids))
    assert seen == {0, 3, 6, 9}


def test_read_ledger_while_it_is_written_gives_what_was_flushed(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path, flush_interval_ms=200)
    connection, stream = ledger.connection_code("c"), ledger.stream_code("BTCUSDT", "trade")
    ledger.append(connection, stream, 1, 1, 0, 0, Fate.SENT)
    ledger.flush_due(1_000_000_000)
    ledger.append(connection, stream, 2, 2, 0, 0, Fate.SENT)
    ledger.flush_due(1_199_999_999)
    assert read_ledger(tmp_path)["first_id"].to_pylist() == [1]
    ledger.flush_due(1_200_000_000)
    assert read_ledger(tmp_path)["first_id"].to_pylist() == [1, 2]
    ledger.close()


def test_read_ledger_two_processes_are_read_oldest_first(tmp_path: Path) -> None:
    for start_ns, first_id in ((1_800_000_000_000_000_000, 2), (1_700_000_000_000_000_000, 1)):
        ledger = LedgerWriter(tmp_path, start_ns=start_ns)
        ledger.append(ledger.connection_code("c"), ledger.stream_code("S", "trade"), first_id, first_id, 0, 0, 0)
        ledger.close()
    assert read_ledger(tmp_path)["first_id"].to_pylist() == [1, 2]


def test_append_connection_is_a_row_without_ids_and_with_the_reason(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path)
    ledger.append_connection(ledger.connection_code("c"), Fate.DISCONNECTED, "slow client", 5)
    ledger.close()
    row = read_ledger(tmp_path).to_pylist()[0]
    assert (row["fate"], row["detail"], row["first_id"], row["symbol"]) == ("disconnected", "slow client", -1, "")


def test_read_ledger_nothing_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no ledger in .*--ledger"):
        read_ledger(tmp_path)


def test_ledger_writer_folder_is_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write a ledger"):
        LedgerWriter(tmp_path / "file")


def test_read_ledger_empty_file_has_no_rows(tmp_path: Path) -> None:
    LedgerWriter(tmp_path).close()
    assert read_ledger(tmp_path).num_rows == 0
    assert isinstance(read_ledger(tmp_path), pa.Table)
