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
from streaming.simulator.metrics import KIND, counters
from streaming.simulator.server import MarketServer

_LOG = structlog.get_logger("streamforge.simulator")
_POLL_S = 0.1
_REPORT_S = 5.0
_CONTROL_TIMEOUT_S = 30.0


class KafkaControl:
    """Publish the simulator's events, and obey the commands that are addressed to it.

    A paused market stands still; when it resumes it makes up for the time, so nothing of it is missing. It stands
    still at the start too, until it is known whether it was paused.

    Args:
        settings: where the broker is.
        slot: name of this simulator, stable over restarts.
        metrics_port: port of metrics and readiness, said in events.
        control_timeout_s: longest wait for `queue-control` at the start, seconds.
    """

    def __init__(
        self,
        settings: Settings,
        slot: str,
        *,
        metrics_port: int | None = None,
        control_timeout_s: float = _CONTROL_TIMEOUT_S,
    ) -> None:
        contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
        identity = ProcessIdentity.of_this_process(KIND, slot)
        self._events = EventPublisher(settings, contracts, identity, metrics_port=metrics_port)
        self._control = ControlListener(settings, contracts, identity)
        self._control_timeout_s = control_timeout_s
        self._said_at_s = 0.0
        self._said_messages = 0

    async def run(self, server: MarketServer) -> None:
        """Say that it started, then hear commands and report until cancelled.

        Raises:
            RetryableSourceError: whether it is paused could not be learned.
        """
        self._events.started(self._status(server))
        started_s = self._said_at_s = time.monotonic()
        commands: list[Command] = []
        while True:
            await asyncio.sleep(_POLL_S)
            commands += self._control.poll()
            server.paused = self._control.paused or not self._control.caught_up
            if not self._control.caught_up:
                # What was heard on the way is answered when the state after it is known.
                if time.monotonic() - started_s > self._control_timeout_s:
                    raise self._control.not_caught_up(self._control_timeout_s)
                continue
            for command in commands:
                self._events.answer(command, self._status(server), detail=_obey(command, server))
            commands.clear()
            self._report(server)

    def _report(self, server: MarketServer) -> None:
        """Say every few seconds how far it is, or that it lives where nothing was sent."""
        elapsed_s = time.monotonic() - self._said_at_s
        if elapsed_s < _REPORT_S:
            return
        messages = server.messages_sent - self._said_messages
        if messages:
            self._events.progress(self._status(server), detail=f"{messages / elapsed_s:,.0f} messages/s")
        else:
            self._events.heartbeat(self._status(server))
        self._said_at_s, self._said_messages = self._said_at_s + elapsed_s, server.messages_sent

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
        if not self._control.caught_up:
            state = ProcessState.STARTING
        return ProcessStatus(state, counters=counters(server))


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
