"""Parser and bars, killed by SIGKILL at every step of their transaction: nothing lost, nothing doubled, in order.

What came out is compared with the pure function over the whole input, key by key and record by record, so a
lost, doubled, reordered or changed record fails whichever step it came from.
"""

from __future__ import annotations

import difflib
import itertools
import random
import signal
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from streamforge.kafka import admin_client, describe_topics
from streamforge.log_reader import log_ends
from streamforge.market.bars import BarsState, SourcedTrade, add_trades
from streamforge.market.parsing import parse_records
from streamforge.market.records import Bar, MarketGap, Trade, raw_record
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from streaming.processors.base import TRANSACTION_STEPS
from tests.pipeline_support import (
    INSTRUMENTS,
    START_MS,
    Pipeline,
    RawFrame,
    committed,
    dead_letters,
    make_pipeline,
    make_trade,
    process,
    produce_raw,
    produce_trades,
    running,
    trade_frame,
    wait_for_positions,
)
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

_ids = itertools.count(1)
R = TypeVar("R", Trade, Bar, MarketGap)


@pytest.fixture(scope="module", params=["parser", "bars"])
def kind(request: pytest.FixtureRequest) -> str:
    """Return the kind of processor."""
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(kind: str, broker_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Return one platform for all steps of a kind: each adds its records and compares everything so far."""
    return make_pipeline(broker_settings, tmp_path_factory.mktemp("killed"), f"k{uuid.uuid4().hex[:8]}.")


def feed_raw(pipeline: Pipeline, rounds: int) -> None:
    """Produce trades of each instrument, some twice, and a frame that is none."""
    frames = []
    for _ in range(rounds):
        number = next(_ids)
        for instrument in INSTRUMENTS:
            frames.append(RawFrame(instrument, trade_frame(instrument, number, ts_ms=START_MS + number)))
            if number % 7 == 0:
                frames.append(frames[-1])
        if number % 50 == 0:
            frames.append(RawFrame(INSTRUMENTS[0], b'{"stream":"btcusdt@trade","data":{"e":"trade","t":'))
    produce_raw(pipeline, frames)


def feed_trades(pipeline: Pipeline, rounds: int) -> None:
    """Produce trades whose event times run ahead, some late, some too late, so that bars close all the time."""
    trades = []
    for _ in range(rounds):
        number = next(_ids)
        late_ms = {0: 130_000, 1: 900_000}.get(number % 11, 0)
        for index, instrument in enumerate(INSTRUMENTS):
            ts_ms = START_MS + 7_000 * number + 500 * index - late_ms
            trades.append(make_trade(instrument, number, ts_ms, price=f"{100 + number % 13}.5"))
    produce_trades(pipeline, trades)


FEED = {"parser": feed_raw, "bars": feed_trades}
INPUT = {"parser": "raw-trades", "bars": "trades"}


def check_parser(pipeline: Pipeline) -> None:
    """Compare trades and dead letters with what the raw records give."""
    topic_id = _topic_id(pipeline, "raw-trades")
    records = [raw_record(topic_id, message) for message in committed(pipeline, "raw-trades")]
    expected = parse_records({}, records)
    found = [msgspec.json.decode(message.value() or b"", type=Trade) for message in committed(pipeline, "trades")]
    _compare(_by_key(found), _by_key(expected.trades))
    assert Counter((d.partition, d.offset, d.index, d.reason) for d in dead_letters(pipeline, "raw-trades")) == Counter(
        (r.record.partition, r.record.offset, r.index, r.reason) for r in expected.refusals
    )


def check_bars(pipeline: Pipeline) -> None:
    """Compare bars and gaps with what the trades give."""
    topic_id = _topic_id(pipeline, "trades")
    states: dict[int, BarsState] = defaultdict(BarsState)
    bars: list[Bar] = []
    gaps: list[MarketGap] = []
    for message in committed(pipeline, "trades"):
        partition = message.partition() or 0
        trade = msgspec.json.decode(message.value() or b"", type=Trade)
        source = SourcedTrade(trade, topic_id, partition, message.offset() or 0)
        result = add_trades(states[partition], [source])
        states[partition] = result.state
        bars += result.bars
        gaps += result.gaps
    found = [msgspec.json.decode(message.value() or b"", type=Bar) for message in committed(pipeline, "bars")]
    _compare(_by_key(found), _by_key(bars))
    found_gaps = [msgspec.json.decode(m.value() or b"", type=MarketGap) for m in committed(pipeline, "market-gaps")]
    _compare(_by_key(found_gaps), _by_key(gaps))


CHECK = {"parser": check_parser, "bars": check_bars}


def _by_key(records: list[R]) -> dict[str, list[R]]:
    grouped: dict[str, list[R]] = defaultdict(list)
    for record in records:
        grouped[record.instrument].append(record)
    return dict(grouped)


def _compare(found: dict[str, list[R]], expected: dict[str, list[R]]) -> None:
    for key in sorted(found.keys() | expected.keys()):
        lines = list(
            difflib.unified_diff([str(r) for r in expected.get(key, [])], [str(r) for r in found.get(key, [])])
        )
        assert not lines, f"{key}: expected (-) and found (+) differ:\n" + "\n".join(lines[:20])


def _topic_id(pipeline: Pipeline, contract_id: str) -> str:
    name = topic_of(pipeline.contracts, contract_id).name
    return describe_topics(admin_client(pipeline.settings), [name])[name].topic_id


def finish(pipeline: Pipeline, kind: str) -> None:
    """Let a process that is not killed do the rest, then compare everything."""
    with running(pipeline, kind) as thread:
        wait_for_positions(pipeline, thread, INPUT[kind])
    assert thread.exit_code == 0
    CHECK[kind](pipeline)


@pytest.mark.parametrize("step", TRANSACTION_STEPS)
def test_processor_killed_at_step_loses_and_doubles_nothing(
    pipeline: Pipeline, kind: str, step: str, tmp_path: Path
) -> None:
    FEED[kind](pipeline, 60)
    with process(pipeline, kind, kill_at=f"{kind}.{step}", log=tmp_path / "log") as victim:
        assert victim.wait() == -signal.SIGKILL, victim.said()
    FEED[kind](pipeline, 20)
    finish(pipeline, kind)


def test_processor_killed_in_a_later_transaction_goes_on_from_the_one_before(
    pipeline: Pipeline, kind: str, tmp_path: Path
) -> None:
    with process(pipeline, kind, kill_at=f"{kind}.after_flush:3", log=tmp_path / "log") as victim:

        def fed_until_dead() -> bool:
            FEED[kind](pipeline, 5)
            return victim.returncode is not None

        wait_until(fed_until_dead, what=f"{kind} dies in its third transaction")
        assert victim.wait() == -signal.SIGKILL, victim.said()
    finish(pipeline, kind)


def test_processor_killed_at_any_instruction_loses_and_doubles_nothing(
    pipeline: Pipeline, kind: str, tmp_path: Path
) -> None:
    chance = random.Random(7)
    output = {"parser": "trades", "bars": "bars"}[kind]
    for _ in range(3):
        target = sum(log_ends(pipeline.settings, pipeline.partitions(output)).values()) + chance.randrange(1, 300)
        with process(pipeline, kind, log=tmp_path / "log") as victim:

            def has_written(target: int = target) -> bool:
                assert victim.returncode is None, victim.said()
                FEED[kind](pipeline, 5)
                return sum(log_ends(pipeline.settings, pipeline.partitions(output)).values()) >= target

            wait_until(has_written, what=f"{kind} writes up to {target}")
            victim.send_signal(signal.SIGKILL)
            assert victim.wait() == -signal.SIGKILL
    finish(pipeline, kind)
