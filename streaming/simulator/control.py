"""The simulator's side of `queue-events` and `queue-control`: says that it lives, obeys commands and faults."""

from __future__ import annotations

import asyncio
import time

import structlog

from streamforge.contracts import load_contracts
from streamforge.errors import ConfigurationError, StreamForgeError
from streamforge.events import Command, CommandKind, ProcessState
from streamforge.settings import Settings
from streamforge.supervision import ControlListener, EventPublisher, ProcessIdentity, ProcessStatus
from streaming.simulator.faults import fault_from_arguments
from streaming.simulator.server import MarketServer

KIND = "simulator"

_LOG = structlog.get_logger("streamforge.simulator")
_POLL_S = 0.1
_HEARTBEAT_S = 5.0


class KafkaControl:
    """Publish the simulator's events, and obey the commands that are addressed to it.

    A paused market stands still; when it resumes it makes up for the time, so nothing of it is missing.

    Args:
        settings: where the broker is.
        slot: name of this simulator, stable over restarts.
    """

    def __init__(self, settings: Settings, slot: str) -> None:
        contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
        identity = ProcessIdentity.of_this_process(KIND, slot)
        self._events = EventPublisher(settings, contracts, identity)
        self._control = ControlListener(settings, contracts, identity)

    async def run(self, server: MarketServer) -> None:
        """Say that it started, then hear commands and send heartbeats until cancelled."""
        self._events.started(self._status(server))
        beat_s = time.monotonic()
        while True:
            await asyncio.sleep(_POLL_S)
            commands = self._control.poll()
            server.paused = self._control.paused
            for command in commands:
                self._events.answer(command, self._status(server), detail=_obey(command, server))
            if time.monotonic() - beat_s >= _HEARTBEAT_S:
                beat_s = time.monotonic()
                self._events.heartbeat(self._status(server))

    def close(self, error: StreamForgeError | None) -> None:
        """Say that it finished, or what went wrong, and let go of the clients."""
        if error is None:
            self._events.finished()
        else:
            self._events.error(str(error), exit_code=error.exit_code)
        self._events.close()
        self._control.close()

    def _status(self, server: MarketServer) -> ProcessStatus:
        state = ProcessState.PAUSED if self._control.paused else ProcessState.RUNNING
        counters = {
            "messages_sent_total": float(server.messages_sent),
            "connections_total": float(server.connections_total),
        }
        return ProcessStatus(state, counters=counters)


def _obey(command: Command, server: MarketServer) -> str:
    """Do what a command says and return what there is to say about it."""
    if command.command is CommandKind.STOP:
        server.stop()
    elif command.command is CommandKind.FAULT:
        try:
            fault = fault_from_arguments(command.arguments)
        except ConfigurationError as error:
            _LOG.warning("fault refused", command=command.command_id, reason=str(error))
            return f"refused: {error}"
        server.faults.add(fault, server.monotonic_ns())
    return ""
