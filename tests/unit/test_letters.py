"""Dead letters as values: one letter for each refusal, what is meant by a filter, and what a redrive has to replay."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from confluent_kafka import Message

from streamforge.contracts import load_contracts
from streamforge.dead_letters import make_dead_letter, readable
from streamforge.errors import ConfigurationError
from streamforge.lakehouse.redrive import errand_of
from streamforge.lakehouse.trace import Hop, hops_of
from streamforge.letter_decisions import DecisionKind
from streamforge.letters import (
    Letter,
    LetterFilter,
    LetterState,
    chosen,
    count_letters,
    count_states,
    decision_about,
    discard,
    letter_from,
    letter_of,
    merged,
    payload_of,
    topic_names,
)
from streamforge.market.records import DeadLetter
from streamforge.settings import Settings
from tests.contract_files import FOLDER
from tests.pipeline_support import make_trade

CONTRACTS = load_contracts(FOLDER, topic_prefix="x.")


def record(**changes: Any) -> DeadLetter:
    """Return the dead letter of a raw frame that the parser refused."""
    values: dict[str, Any] = {
        "topic": "x.raw-trades",
        "topic_id": "A",
        "partition": 3,
        "offset": 41,
        "index": 0,
        "reason": "malformed_json",
        "detail": "expected an object",
        "processor": "parser",
        "ts_ns": 1_000,
        "key": b"BTC-USDT.SIM",
        "payload": b"{",
        "headers": [("venue", b"SIM")],
    }
    return make_dead_letter(**(values | changes))


def kept(letter: DeadLetter, offset: int = 0) -> Letter:
    """Return the letter in a record of a dead-letter topic."""
    message = Message(f"{letter.topic}.dlq", 1, offset, b"", msgspec.json.encode(letter))
    return letter_from(message, letter)


def test_records_about_one_refusal_are_one_letter_with_the_last_words() -> None:
    first, again = kept(record(), 5), kept(record(ts_ns=9_000, reason="other"), 8)
    assert first.letter_id == again.letter_id
    for one, two in ((first, again), (again, first)):
        letter = merged(one, two)
        assert (letter.records, letter.first_ns, letter.last_ns, letter.reason) == (2, 1_000, 9_000, "other")
        assert letter.kept_at[1] == 8
    assert merged(None, first) == first


@pytest.mark.parametrize(
    "change", [{"topic_id": "B"}, {"partition": 4}, {"offset": 42}, {"index": 1}, {"processor": "writer"}]
)
def test_another_record_or_processor_is_another_letter(change: dict[str, Any]) -> None:
    assert kept(record()).letter_id != kept(record(**change)).letter_id


def decided(letter: Letter, kind: DecisionKind) -> Letter:
    made = decision_about(letter, kind, who="somebody", why="because", ts_decided_ns=1)
    return dataclasses.replace(letter, decision=made)


LETTERS = [
    kept(record(offset=1)),
    decided(kept(record(offset=2, reason="bad_price")), DecisionKind.DISCARDED),
    decided(kept(record(offset=3, topic="x.trades", processor="writer")), DecisionKind.REDRIVEN),
]


@pytest.mark.parametrize(
    ("wanted", "offsets"),
    [
        (LetterFilter(), [1, 2, 3]),
        (LetterFilter(ids=(LETTERS[1].letter_id[:9],)), [2]),
        (LetterFilter(topics=("x.trades",)), [3]),
        (LetterFilter(partition=3, offset=1), [1]),
        (LetterFilter(partition=0), []),
        (LetterFilter(reason="bad_price"), [2]),
        (LetterFilter(processor="writer"), [3]),
        (LetterFilter(states={LetterState.OPEN, LetterState.REDRIVEN}), [1, 3]),
        (LetterFilter(reason="bad_price", processor="writer"), []),
    ],
)
def test_filter_means_what_meets_all_of_it(wanted: LetterFilter, offsets: list[int]) -> None:
    assert [each.offset for each in LETTERS if wanted.matches(each)] == offsets


def test_letters_to_decide_about_are_the_open_ones_or_those_named() -> None:
    assert chosen(LETTERS) == LETTERS[:1]
    assert chosen(LETTERS, [LETTERS[1].letter_id[:8], LETTERS[1].letter_id]) == [LETTERS[1]]
    for asked in ("", "no such id"):
        with pytest.raises(ConfigurationError, match="means"):
            letter_of(LETTERS, asked)


def test_letters_are_counted_by_kind_and_state() -> None:
    counts = {(each.topic, each.reason, each.state): each.letters for each in count_letters([*LETTERS, LETTERS[0]])}
    assert counts == {
        ("x.raw-trades", "malformed_json", LetterState.OPEN): 2,
        ("x.raw-trades", "bad_price", LetterState.DISCARDED): 1,
        ("x.trades", "malformed_json", LetterState.REDRIVEN): 1,
    }
    assert count_states(LETTERS) == {"open": 1, "redriven": 1, "discarded": 1}


def test_topic_is_named_by_contract_or_in_full_with_or_without_dlq() -> None:
    assert topic_names(CONTRACTS, ["trades", "trades.dlq", "x.trades", "x.trades.dlq"]) == ("x.trades",) * 4
    with pytest.raises(ConfigurationError, match="topics are: bars"):
        topic_names(CONTRACTS, ["queue-events"])


@pytest.mark.parametrize(("who", "why"), [("", "because"), ("me", " ")])
def test_discard_without_a_person_or_a_reason_is_refused(who: str, why: str) -> None:
    settings = Settings(_env_file=None)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="by somebody, for a reason"):
        discard(settings, CONTRACTS, LETTERS, who=who, why=why)


def test_parsers_letter_is_redriven_by_its_own_record() -> None:
    errand = errand_of(CONTRACTS, kept(record(index=2)))
    assert (errand.table, errand.topic_id, str(errand.source), errand.index) == (
        "trades",
        "A",
        "x.raw-trades-3[41,42)",
        2,
    )


def test_writers_letter_of_a_typed_record_is_redriven_by_its_raw_record() -> None:
    trade = msgspec.structs.replace(make_trade("BTC-USDT.SIM", 7, 1), price="1e3", raw_topic_id="R", raw_index=1)
    payload = msgspec.json.encode(trade)
    letter = kept(record(topic="x.trades", processor="writer", payload=payload))
    errand = errand_of(CONTRACTS, letter)
    assert (errand.table, errand.topic_id, str(errand.source), errand.index) == (
        "trades",
        "R",
        "x.raw-trades-0[7,8)",
        1,
    )


def test_writers_letter_of_a_raw_record_lands_in_the_raw_table() -> None:
    errand = errand_of(CONTRACTS, kept(record(processor="writer")))
    assert (errand.table, str(errand.source), errand.index) == ("raw-trades", "x.raw-trades-3[41,42)", 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topic": "x.trades", "processor": "writer"}, "do not say which raw record"),
        ({"topic": "x.trades", "processor": "writer", "payload": b"\xff[1"}, "do not say which raw record"),
        ({"topic": "x.trades", "processor": "writer", "payload": b'{"raw_topic_id":"\xff"}'}, "do not say which"),
        ({"topic": "x.trades", "processor": "writer", "payload": b'{"x":' + b"[" * 100_000}, "do not say which"),
        ({"topic": "x.trades", "processor": "bars"}, "streamforge backfill bars"),
        ({"topic": "x.raw-candles-backfill", "processor": "history-parser"}, "no replay makes"),
        ({"topic": "y.trades"}, "no contract has the topic y.trades"),
    ],
)
def test_letter_that_no_replay_can_solve_says_why(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        errand_of(CONTRACTS, kept(record(**change)))


def test_letter_of_another_program_without_base64_is_shown_as_it_is() -> None:
    letter = msgspec.structs.replace(record(), payload_base64="not base64!")
    assert payload_of(letter) == ("not base64!", "not base64")
    assert kept(letter).raw is None


def test_bytes_are_shown_as_text_or_as_base64() -> None:
    assert readable("{ä".encode()) == ("{ä", "utf-8")
    assert readable(b"\xff\x00") == ("/wA=", "base64")


def test_hops_are_measured_from_the_last_one_that_is_known() -> None:
    hops = hops_of([("event", 5_000_000), ("receive", None), ("commit", 7_500_000)])
    assert hops == [Hop("event", 5_000_000, None), Hop("receive", None, None), Hop("commit", 7_500_000, 2.5)]
