"""What cannot be read of `queue-events` and `queue-control` is an error of ours, whatever bytes it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from streamforge.errors import DecodeError
from streamforge.events import Command, CommandKind, decode_command, decode_event

UNREADABLE = (b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'{"command_id":"\xff"}', b"[" * 100_000, b'{"pid":"x"}')


@pytest.mark.parametrize("decode", [decode_event, decode_command])
@pytest.mark.parametrize("value", UNREADABLE, ids=range(len(UNREADABLE)))
def test_unreadable_record_raises_decode_error(decode: Callable[[bytes], object], value: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(value)


@pytest.mark.parametrize(
    ("target", "meant"),
    [("*", True), ("parser", True), ("parser/0", True), ("parser/0/17", True), ("parser/1", False), ("bars", False)],
)
def test_command_addresses_everyone_kind_slot_or_process(target: str, meant: bool) -> None:
    command = _command(target, CommandKind.PING)
    assert command.addresses(process_id="parser/0/17", kind="parser", slot="0") is meant


def test_only_pause_and_resume_are_desired_state_of_the_target() -> None:
    keys = {kind: _command("parser", kind).key for kind in CommandKind}
    assert {kind for kind, key in keys.items() if key == "parser"} == {CommandKind.PAUSE, CommandKind.RESUME}
    assert len(set(keys.values())) == 2, "what is done once has a key of its own"


def _command(target: str, kind: CommandKind) -> Command:
    return Command(command_id="c1", target=target, command=kind, issued_by="test", ts_issued_ns=1)
