"""What processes say (`queue-events`) and what they are told (`queue-control`): types and encoding.

The adapters that publish and listen are in `streamforge.supervision`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from streamforge.errors import NOT_JSON, DecodeError


class EventKind(StrEnum):
    """What is said."""

    STARTED = "started"
    HEARTBEAT = "heartbeat"
    PROGRESS = "progress"
    FINISHED = "finished"
    ERROR = "error"


class ProcessState(StrEnum):
    """State of a process after an event."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class CommandKind(StrEnum):
    """What a process can be told; `fault` is for the simulator only."""

    PING = "ping"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    FAULT = "fault"


class ProcessEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One record of `queue-events`; fields as in its contract."""

    process_id: str
    kind: str
    slot: str
    host: str
    pid: int
    version: str
    event: EventKind
    state: ProcessState
    ts_ns: int
    assignment: list[str]
    positions: dict[str, int]
    lag: dict[str, int]
    counters: dict[str, float]
    metrics_port: int | None = None
    in_reply_to: str | None = None
    exit_code: int | None = None
    detail: str = ""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One record of `queue-control`; fields as in its contract."""

    command_id: str
    target: str
    command: CommandKind
    issued_by: str
    ts_issued_ns: int
    arguments: dict[str, str] = {}

    @property
    def is_desired_state(self) -> bool:
        """Return whether it holds until another one replaces it; else it is done once."""
        return self.command in (CommandKind.PAUSE, CommandKind.RESUME)

    @property
    def key(self) -> str:
        """Return the record key: the target for desired state, a key of its own for what is done once."""
        if self.is_desired_state:
            return self.target
        return f"{self.target}#{self.command_id}"

    def addresses(self, *, process_id: str, kind: str, slot: str) -> bool:
        """Return whether a process with these names is meant."""
        return self.target in ("*", kind, f"{kind}/{slot}", process_id)


_EVENT_DECODER = msgspec.json.Decoder(ProcessEvent)
_COMMAND_DECODER = msgspec.json.Decoder(Command)


def decode_event(value: bytes) -> ProcessEvent:
    """Decode one record of `queue-events`.

    Raises:
        DecodeError: not JSON, or not the contract's shape.
    """
    try:
        return _EVENT_DECODER.decode(value)
    except NOT_JSON as error:
        raise DecodeError("bad_event", f"queue-events record: {error}") from error


def decode_command(value: bytes) -> Command:
    """Decode one record of `queue-control`.

    Raises:
        DecodeError: not JSON, or not the contract's shape.
    """
    try:
        return _COMMAND_DECODER.decode(value)
    except NOT_JSON as error:
        raise DecodeError("bad_command", f"queue-control record: {error}") from error
