"""What a loader says of itself: events, answers to commands, Prometheus metrics, readiness."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from streamforge.contracts import Contracts
from streamforge.errors import StreamForgeError
from streamforge.events import Command, ProcessState
from streamforge.metrics import MetricsServer, ProcessMetrics
from streamforge.supervision import ControlListener, EventPublisher, ProcessIdentity, ProcessStatus
from streaming.loaders.base import LOADER_KIND, LoaderSettings
from streaming.loaders.sink import RawSink

_CONTROL_TIMEOUT_S = 30.0
_GAUGES = {"buffered_bytes", "gaps_waiting", "streams_held"}


class _SinkCollector(Collector):
    """Reads the sink's counters when Prometheus asks, so that counting costs nothing per frame."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def collect(self) -> Iterator[Metric]:
        for name, value in self._reporter.counters().items():
            family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield family(f"streamforge_loader_{name}", f"Loader: {name.replace('_', ' ')}.", value=value)


class Reporter:
    """Speaks and listens for one loader; nothing here waits for the broker but `open` and `close`.

    Args:
        settings: the broker, and how often to report.
        contracts: has `queue-events` and `queue-control`.
        sink: whose counters are reported.
        slot: replica name.
        metrics_port: port of metrics and readiness; 0 takes a free one, None serves none.
    """

    def __init__(
        self, settings: LoaderSettings, contracts: Contracts, sink: RawSink, *, slot: str, metrics_port: int | None
    ) -> None:
        self._sink = sink
        self._interval_s = settings.loader_report_interval_s
        self._identity = ProcessIdentity.of_this_process(LOADER_KIND, slot)
        self._metrics = ProcessMetrics(LOADER_KIND, slot)
        self._metrics.registry.register(_SinkCollector(self))
        self._server = (
            None
            if metrics_port is None
            else MetricsServer(self._metrics, port=metrics_port, host=settings.metrics_host)
        )
        self._events = EventPublisher(
            settings, contracts, self._identity, metrics_port=None if self._server is None else self._server.port
        )
        self._control = ControlListener(settings, contracts, self._identity)
        self._heard_early: list[Command] = []
        self._reconnects = 0
        self._state = ProcessState.STARTING
        self._said_at_s = 0.0
        self._said_frames = 0

    @property
    def is_paused(self) -> bool:
        """Return the desired state."""
        return self._control.paused

    def open(self, *, control_timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        """Say that the loader is there and learn the desired state.

        Raises:
            RetryableSourceError: whether it is paused could not be learned within `control_timeout_s`.
        """
        self._events.started(self._status())
        self._heard_early = self._control.wait_until_caught_up(control_timeout_s)

    def heard(self) -> list[Command]:
        """Return the commands that came since the last call."""
        early, self._heard_early = self._heard_early, []
        return [*early, *self._control.poll()]

    def answer(self, command: Command, state: ProcessState) -> None:
        """Answer a command with the state after obeying."""
        self._state = state
        self._events.answer(command, self._status())

    def tick(self, state: ProcessState, *, reconnects: int) -> None:
        """Note the state; say it when it is new or the interval is over."""
        is_new = state is not self._state
        self._state, self._reconnects = state, reconnects
        self._metrics.set_ready(state is ProcessState.RUNNING)
        now_s = time.monotonic()
        elapsed_s = now_s - self._said_at_s
        if not is_new and elapsed_s < self._interval_s:
            return
        frames = self._sink.counters.frames
        if frames > self._said_frames:
            rate = (frames - self._said_frames) / elapsed_s
            self._events.progress(self._status(), detail=f"{rate:,.0f} frames/s" if self._said_at_s else "")
        else:
            self._events.heartbeat(self._status())
        self._said_at_s, self._said_frames = now_s, frames

    def say(self, state: ProcessState) -> None:
        """Say a state at once."""
        self._state = state
        self._metrics.set_ready(False)
        self._events.heartbeat(self._status())

    def close(self, failure: BaseException | None, unsaid: int) -> None:
        """Say how it ended and let go of everything."""
        if failure is not None:
            code = failure.exit_code if isinstance(failure, StreamForgeError) else 1
            self._events.error(str(failure), exit_code=code)
        else:
            left = f"{unsaid} frames or gaps were not acknowledged; the next start's gap covers them" if unsaid else ""
            self._events.finished(detail=left)
        self._events.close()
        self._control.close()
        if self._server is not None:
            self._server.close()

    def counters(self) -> dict[str, float]:
        """Return every count by name."""
        counters = asdict(self._sink.counters)
        published: dict[str, int] = counters.pop("gaps_published")
        return {
            **counters,
            "gaps": sum(published.values()),
            **{f"gaps_{kind}": count for kind, count in published.items()},
            "reconnects": self._reconnects,
            "buffered_bytes": self._sink.buffered_bytes,
            "gaps_waiting": self._sink.gaps_waiting,
            "streams_held": self._sink.held_streams,
        }

    def _status(self) -> ProcessStatus:
        return ProcessStatus(self._state, counters=self.counters())
