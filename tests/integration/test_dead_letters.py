"""Dead letters on a real broker and catalog: after a fix each refused record lands once, and what was decided stays."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition
from typer.testing import CliRunner

from cli.app import app
from streamforge.errors import RetryableSourceError
from streamforge.kafka import admin_client, producer_config
from streamforge.lakehouse import redrive as redrive_module
from streamforge.lakehouse.redrive import Outcome, redrive
from streamforge.lakehouse.verify import verify_tables
from streamforge.letter_decisions import DecisionKind
from streamforge.letters import LetterState, read_letters
from streamforge.settings import Settings
from tests.letters_support import LETTER_TOPICS, PLANTED, faulty, plant_letters, raw_messages
from tests.pipeline_support import Pipeline, RawFrame, committed, environment, make_pipeline, produce_raw
from tests.replay_support import (
    BTC,
    forgetful,
    frames,
    land,
    land_direct,
    live_line,
    rows_of,
    snapshot_ids,
    with_parser,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("restored_logging")]

Call = Callable[..., tuple[int, dict[str, Any]]]
Say = Callable[..., tuple[int, str]]


@pytest.fixture
def pipeline(broker_settings: Settings, tmp_path: Path) -> Pipeline:
    return make_pipeline(broker_settings, tmp_path, f"t{uuid.uuid4().hex[:8]}.", LETTER_TOPICS)


@pytest.fixture
def call(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return what calls `streamforge ... --output json` on the platform: exit code and result."""
    for name, value in environment(pipeline.settings, COLUMNS="200").items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(app, [*arguments, "--output", "json"])
        assert result.stdout, repr(result.exception)
        return result.exit_code, json.loads(result.stdout)

    return run


@pytest.fixture
def say(call: Call) -> Say:
    """Return what calls `streamforge ...` on the platform of `call`: exit code and text for people."""
    del call

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.stdout

    return run


def counts(listed: dict[str, Any]) -> dict[tuple[str, str, str], int]:
    return {(each["reason"], each["processor"], each["state"]): each["letters"] for each in listed["counts"]}


def test_parser_fault_is_listed_redriven_once_beside_the_live_writer_and_the_rest_discarded(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, call: Call, say: Say
) -> None:
    # The processes have the faulty parser until the end; the commands, started after the fix, have the right one.
    with live_line(pipeline, monkeypatch, parse=faulty) as line:
        produce_raw(pipeline, [*frames(BTC, range(20)), RawFrame(BTC, b"not json")])
        line.wait()
        repeat_a_letter(pipeline)
        code, listed = call("dlq", "list")
        assert (code, listed["letters"], listed["open"], listed["unreadable"]) == (0, 12, 12, 0)
        garbage = next(each for each in listed["newest"] if each["reason"] not in (PLANTED, "bad_decimal"))
        expected = {(PLANTED, "parser", "open"): 10, (garbage["reason"], "parser", "open"): 1}
        assert counts(listed) == {**expected, ("bad_decimal", "writer", "open"): 1}
        assert len(rows_of(pipeline)) == 9

        snapshots = snapshot_ids(pipeline)
        code, dry = call("dlq", "redrive", "--dry-run")
        assert (code, dry["landed"], dry["refused"], dry["recorded"]) == (1, 11, 1, 0)
        assert [each["rows_added"] for each in dry["replays"]] == [11]
        assert (len(rows_of(pipeline)), snapshot_ids(pipeline)) == (9, snapshots), "a dry run changed the table"

        produce_raw(pipeline, frames(BTC, range(100, 120, 2)))
        code, done = call("dlq", "redrive", "--who", "a tester")
        assert (code, done["landed"], done["refused"], done["recorded"]) == (1, 11, 1, 11)
        line.wait()
        assert Counter(int(row["trade_id"]) for row in rows_of(pipeline)) == Counter([*range(20), *range(100, 120, 2)])
        assert {row["trade_id"]: str(row["price"])[:5] for row in rows_of(pipeline)}["4"] == "104.5"
        assert set(snapshots) < set(snapshot_ids(pipeline))

        after = snapshot_ids(pipeline)
        code, text = say("dlq", "redrive")
        assert (code, "trades: 0 equal, 0 changed, 0 added, 0 gone" in text) == (1, True), text
        assert "of 1 letters are: 1 refused" in text
        redriven = next(each for each in call("dlq", "list")[1]["newest"] if each["state"] == "redriven")
        code, again = call("dlq", "redrive", redriven["letter_id"])
        assert (code, again["landed"], again["recorded"], again["replays"][0]["committed"]) == (0, 1, 0, False)
        assert snapshot_ids(pipeline) == after, "a second redrive made a commit"

    assert (redriven["decision"]["who"], redriven["decision"]["redrive_commit_id"]) == (
        "a tester",
        done["replays"][0]["commit_id"],
    )
    check_discard(pipeline, call, say, garbage)
    assert all(item.tally.is_clean for item in verify_tables(pipeline.settings, pipeline.contracts, ["trades"]))


def repeat_a_letter(pipeline: Pipeline) -> None:
    """Write a dead letter again, as a processor may that was killed before its offsets moved."""
    first = committed(pipeline, "raw-trades.dlq")[0]
    producer = Producer(producer_config(pipeline.settings))
    producer.produce(first.topic() or "", first.value(), first.key())
    assert producer.flush(30) == 0


def check_discard(pipeline: Pipeline, call: Call, say: Say, garbage: dict[str, Any]) -> None:
    """Discard the letter that no fix can help: it is recorded, stays readable, and the table of decisions has it."""
    letters = len(committed(pipeline, "raw-trades.dlq"))
    asked = ("dlq", "discard", "--code", garbage["reason"], "--reason", "a test stream", "--who", "somebody")
    assert call(*asked, "--dry-run")[1]["discarded"] == 1
    assert "discarded" not in say("dlq", "list")[1]
    assert call(*asked)[0] == 0
    place = ("--topic", "raw-trades", "--partition", str(garbage["partition"]), "--offset", str(garbage["offset"]))
    code, shown = call("dlq", "show", *place)
    [letter] = shown["letters"]
    assert (code, letter["payload"], letter["state"]) == (0, "not json", "discarded")
    assert (letter["decision"]["who"], letter["decision"]["why"]) == ("somebody", "a test stream")
    code, text = say("dlq", "show", garbage["letter_id"][:8])
    assert (code, "not json" in text, "a test stream" in text) == (0, True, True), text
    assert len(committed(pipeline, "raw-trades.dlq")) == letters, "nothing is deleted"
    assert say("dlq", "redrive") == (0, "no letter is open: nothing to redrive\n")
    land_direct(pipeline, "letter-decisions")
    kept = Counter(row["decision"] for row in rows_of(pipeline, "letter-decisions"))
    assert kept == {DecisionKind.REDRIVEN: 11, DecisionKind.DISCARDED: 1}


def test_letter_refused_again_stays_open_and_a_repetition_and_what_is_gone_are_told(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, contracts = pipeline.settings, pipeline.contracts
    # The parser lost trade 1, and the venue sent trade 3 twice.
    twice = frames(BTC, [0, 1, 2, 3, 3])
    land(pipeline, twice[:3], twice[3:], parse=forgetful(lambda trade: trade.trade_id == "1"))
    land_direct(pipeline, "raw-trades")
    records = raw_messages(pipeline)
    plant_letters(pipeline, [records[1], records[4]], times=2)
    before, snapshots = rows_of(pipeline), snapshot_ids(pipeline)
    letters = read_letters(settings, contracts).letters
    assert [(each.offset, each.records) for each in letters] == [(1, 2), (4, 2)]

    still = redrive(settings, contracts, letters, who="a tester", recompute=with_parser(faulty))
    assert [each.outcome for each in still.letters] == [Outcome.REFUSED, Outcome.NO_ROW]
    assert (rows_of(pipeline), snapshot_ids(pipeline)) == (before, snapshots)
    states = [each.state for each in read_letters(settings, contracts).letters]
    assert states == [LetterState.OPEN, LetterState.REDRIVEN]

    first = KafkaTopicPartition(pipeline.topic("raw-trades"), records[0].partition() or 0, 2)
    admin = admin_client(settings)  # its end would cancel the request
    admin.delete_records([first])[first].result()
    lost = [dataclasses.replace(letters[0], offset=999), dataclasses.replace(letters[0], topic_id="another")]
    end_before_recording(monkeypatch, lambda: redrive(settings, contracts, [letters[0]], who="a tester"))
    assert len(rows_of(pipeline)) == len(before) + 1
    done = redrive(settings, contracts, [letters[0], *lost], who="a tester")
    assert [each["committed"] for each in done.replays] == [False], "what had landed was landed again"
    found = {each.letter.letter_id: each for each in done.letters}
    assert [found[each.letter_id].outcome for each in lost] == [Outcome.NOT_POSSIBLE, Outcome.NOT_POSSIBLE]
    assert "ends beyond the last stable offset" in found[lost[0].letter_id].detail
    assert "topic id another" in found[lost[1].letter_id].detail
    # Kafka no longer has its record: it came from the raw table.
    assert found[letters[0].letter_id].outcome is Outcome.LANDED
    assert [row["trade_id"] for row in rows_of(pipeline)] == ["0", "1", "2", "3"]
    assert [each.letter_id for each in done.decisions] == [letters[0].letter_id]


def end_before_recording(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Let a redrive end between its commit and what it records of it."""

    def away(*_arguments: object) -> None:
        raise RetryableSourceError("the broker went away")

    with monkeypatch.context() as patch:
        patch.setattr(redrive_module, "record_decisions", away)
        with pytest.raises(RetryableSourceError, match="went away"):
            run()


def test_wrong_use_says_what_is_expected(call: Call) -> None:
    for arguments, said in (
        (("dlq", "discard", "--reason", "because"), "say which letters"),
        (("dlq", "show"), "say which letter"),
        (("dlq", "show", "feed"), "means none"),
        (("dlq", "show", "--topic", "trades", "--partition", "0", "--offset", "7"), "no dead letter about"),
        (("dlq", "list", "--topic", "nothing"), "topics are: bars"),
    ):
        code, result = call(*arguments)
        assert (code, result["error"]) == (2, "ConfigurationError")
        assert said in result["message"]
