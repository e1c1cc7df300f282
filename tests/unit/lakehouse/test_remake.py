"""Trades made again: what is remembered of the rows around a range, and which limits hold."""

from __future__ import annotations

from typing import Any, cast

import pyarrow as pa
import pytest
from confluent_kafka import Message

from streamforge.contracts import Contracts, load_contracts
from streamforge.lakehouse.remake import RECIPES, ReparseTrades, lineage_of
from streamforge.market.dedupe import MAX_INTERVALS
from streamforge.settings import Settings, load_settings
from tests.pipeline_support import trade_frame

BTC = "BTC-USDT.SIM"
RECEIVED_MS = 1_700_000_000_000


def raw_message(offset: int, *, ahead_s: int = 0) -> Message:
    """Return a raw record as a consumer gives it; its trade id is its offset."""
    values = ("SIM", "trade", "c", "0", f"{RECEIVED_MS}000000")
    names = ("venue", "channel", "connection_id", "sequence_in_connection", "ts_receive_ns")
    return Message(
        topic="raw-trades",
        partition=0,
        offset=offset,
        key=BTC.encode(),
        value=trade_frame(BTC, offset, ts_ms=RECEIVED_MS + 1_000 * ahead_s),
        headers=[(name, value.encode()) for name, value in zip(names, values, strict=True)],
    )


@pytest.fixture
def contracts() -> Contracts:
    return load_contracts(Settings(_env_file=None).contracts_dir)  # type: ignore[call-arg]


def made(remake: ReparseTrades, ids_around: list[int], messages: list[Message]) -> tuple[int, Any]:
    """Return how many rows the messages give behind rows with `ids_around`, and what gave none."""
    rows = pa.table({"instrument": [BTC] * len(ids_around), "trade_id": [str(number) for number in ids_around]})
    state = remake.remember(remake.initial(), rows) if ids_around else remake.initial()
    _, remade = remake.remake(state, messages)
    return remade.rows.num_rows, dict(remade.dropped)


def of_settings(contracts: Contracts, **values: Any) -> ReparseTrades:
    """Return the re-run of `trades` as a replay makes it."""
    settings = load_settings(_env_file=None, **values)
    remake = RECIPES["trades"].make(settings)(lineage_of(contracts, "trades"), "topic-id")
    return cast("ReparseTrades", remake)


@pytest.mark.parametrize("gaps", [MAX_INTERVALS - 1, MAX_INTERVALS + 500])
def test_rows_with_many_gaps_behind_a_range_do_not_make_its_rows_too_old(contracts: Contracts, gaps: int) -> None:
    behind = [100 + 2 * number for number in range(gaps)]
    assert made(of_settings(contracts), behind, [raw_message(n) for n in range(50)]) == (50, {})


def test_a_range_with_more_gaps_than_the_live_parser_keeps_is_made_whole(contracts: Contracts) -> None:
    # The rows around say nothing of the instrument, so the re-run itself starts its set of ids.
    remake = of_settings(contracts, parser_max_id_intervals=2)
    assert made(remake, [], [raw_message(n) for n in (10, 20, 30, 40, 5)]) == (5, {})


def test_rows_around_a_range_are_duplicates(contracts: Contracts) -> None:
    assert made(of_settings(contracts), [3, 4], [raw_message(n) for n in range(5)]) == (3, {"duplicates": 2})


def test_trades_are_made_again_with_the_limits_of_the_live_parser(contracts: Contracts) -> None:
    late = [raw_message(0, ahead_s=90)]
    assert made(of_settings(contracts), [], late) == (0, {"event_in_future": 1})
    assert made(of_settings(contracts, parser_max_event_ahead_s=100.0), [], late) == (1, {})
