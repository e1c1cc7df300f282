"""The loader process: connections, new listings, commands and reports around one sink.

A paused loader leaves its connections and keeps its process; on `resume` it connects again and its gap says
what it did not hear. A stopping loader leaves its connections, waits a bounded time for acknowledgements
and publishes gaps for what it could not hand over.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import stamina
import structlog

from streamforge import faults
from streamforge.contracts import Contracts
from streamforge.errors import ConfigurationError, RetryableSourceError, SourceError
from streamforge.events import Command, CommandKind, ProcessState
from streamforge.kafka import admin_client, describe_topics
from streaming.loaders.base import Channel, LoaderSettings, Stream
from streaming.loaders.plan import LoadRequest, choose_channels, choose_listings, streams_of
from streaming.loaders.reporting import Reporter
from streaming.loaders.session import Session
from streaming.loaders.sink import GAPS_CONTRACT, UNKNOWN_CONTRACT, RawSink, topic_name
from streaming.loaders.tail import Tail, read_tail

HEALTHY_AFTER_S = 10.0
"""A connection that lived so long ended for a reason of its own: the next attempt comes without a wait."""

_POLL_S = 0.005
_CONTROL_S = 0.2
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_log = structlog.get_logger(__name__)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a loader did, when it has stopped."""

    counters: dict[str, float]
    unsaid: int
    wall_s: float


async def load(
    settings: LoaderSettings,
    contracts: Contracts,
    request: LoadRequest,
    *,
    stop_signals: Sequence[signal.Signals] = STOP_SIGNALS,
) -> LoadReport:
    """Load until told to stop, by signal, command, duration or number of frames.

    `stop_signals` has to be empty outside of the main thread.

    Raises:
        ConfigurationError: a symbol, channel or topic does not exist.
        SourceError: broker or venue cannot be reached at the start, or the producer cannot go on.
    """
    channels = choose_channels(request)
    streams = await plan(request)
    await _when_broker_answers(settings, lambda: _check_topics(settings, contracts, channels))
    tail = await _when_broker_answers(
        settings, lambda: read_tail(settings, contracts, channels, settings.loader_tail_records)
    )
    faults.step("loader.tail_read")
    loader = Loader(settings, contracts, request, channels, tail)
    loop = asyncio.get_running_loop()
    for name in stop_signals:
        loop.add_signal_handler(name, loader.stop)
    try:
        return await loader.run(streams)
    finally:
        for name in stop_signals:
            loop.remove_signal_handler(name)


async def plan(request: LoadRequest) -> list[Stream]:
    """Return the streams that would be subscribed.

    Raises:
        ConfigurationError: a symbol or channel does not exist.
        SourceError: the venue does not say what it lists.
    """
    channels = choose_channels(request)
    listings = await request.venue.listings(request.rest_url)
    return streams_of(request.venue, choose_listings(request, listings), channels)


class Loader:
    """One loader process.

    Args:
        settings: the process's settings.
        contracts: topics.
        request: what to load.
        channels: its channels.
        tail: where raw and the ledger ended.
    """

    def __init__(
        self,
        settings: LoaderSettings,
        contracts: Contracts,
        request: LoadRequest,
        channels: Sequence[Channel],
        tail: Tail,
    ) -> None:
        self._settings = settings
        self._request = request
        self._channels = channels
        self._tail = tail
        self._url = request.venue.websocket_url(request.websocket_url)
        self._sink = RawSink(settings, contracts, request.venue.label, {item.contract_id for item in channels})
        self._sessions: dict[Session, asyncio.Task[None] | None] = {}
        self._known: set[str] = set()
        self._is_started = False
        self._stop = asyncio.Event()
        self._reporter = Reporter(settings, contracts, self._sink, slot=request.slot, metrics_port=request.metrics_port)

    async def run(self, streams: Sequence[Stream]) -> LoadReport:
        """Load `streams` until told to stop; return what was done.

        Raises:
            SourceError: the producer cannot go on.
        """
        started_s = time.monotonic()
        try:
            await asyncio.to_thread(self._reporter.open)
        except RetryableSourceError as error:
            self._reporter.close(error, self._sink.stop())
            raise
        await self._add_streams(streams)
        work = [self._serve_sink(), self._obey()]
        if self._request.symbols is None:
            work.append(self._watch_listings())
        tasks = [self._spawn(item) for item in work]
        await self._stop.wait()
        failures = [*await _cancel(tasks), *await self._disconnect()]
        self._reporter.say(ProcessState.STOPPING)
        unsaid = self._sink.stop()
        failure = next(iter(failures), self._sink.fatal)
        counters = self._reporter.counters()
        self._reporter.close(failure, unsaid)
        if failure is not None:
            raise failure
        return LoadReport(counters, unsaid, time.monotonic() - started_s)

    def stop(self) -> None:
        """Ask it to stop."""
        self._stop.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside; where it ends otherwise than by cancelling, the loader stops."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: None if done.cancelled() else self._stop.set())
        return task

    async def _serve_sink(self) -> None:
        deadline_s = None if self._request.duration_s is None else time.monotonic() + self._request.duration_s
        max_frames = self._request.max_frames
        while self._sink.fatal is None:
            self._sink.poll()
            if deadline_s is not None and time.monotonic() >= deadline_s:
                return
            if max_frames is not None and self._sink.counters.frames >= max_frames:
                return
            await asyncio.sleep(_POLL_S)

    async def _obey(self) -> None:
        """Hear commands, keep the desired state, say how it goes."""
        is_paused = True
        self._is_started = True
        while True:
            commands = self._reporter.heard()
            if self._reporter.is_paused != is_paused:
                is_paused = self._reporter.is_paused
                if is_paused:
                    for failure in await self._disconnect():
                        raise failure
                else:
                    self._connect()
            self._answer(commands)
            self._reporter.tick(self._state(), reconnects=self._reconnects())
            await asyncio.sleep(_CONTROL_S)

    def _answer(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if command.command is CommandKind.STOP:
                self._stop.set()
            if command.command is not CommandKind.FAULT:
                self._reporter.answer(command, self._state())

    def _state(self) -> ProcessState:
        if self._stop.is_set():
            return ProcessState.STOPPING
        if self._reporter.is_paused:
            return ProcessState.PAUSED
        is_connected = all(session.is_connected for session in self._sessions)
        return ProcessState.RUNNING if is_connected else ProcessState.STARTING

    def _reconnects(self) -> int:
        return sum(max(session.connects - 1, 0) for session in self._sessions)

    def _connect(self) -> None:
        for session, task in self._sessions.items():
            if task is None:
                self._sessions[session] = self._spawn(self._keep_connected(session))

    async def _disconnect(self) -> list[BaseException]:
        tasks = [task for task in self._sessions.values() if task is not None]
        self._sessions = dict.fromkeys(self._sessions)
        return await _cancel(tasks)

    async def _keep_connected(self, session: Session) -> None:
        settings = self._settings
        while True:
            async for attempt in stamina.retry_context(
                on=RetryableSourceError,
                attempts=None,
                timeout=None,
                wait_initial=settings.loader_backoff_initial_s,
                wait_max=settings.loader_backoff_max_s,
                wait_jitter=settings.loader_backoff_initial_s,
            ):
                with attempt:
                    began_s = time.monotonic()
                    try:
                        await session.run_once()
                    except RetryableSourceError as error:
                        _log.warning("disconnected", reason=str(error), attempt=attempt.num)
                        if time.monotonic() - began_s < HEALTHY_AFTER_S:
                            raise

    async def _watch_listings(self) -> None:
        while True:
            await asyncio.sleep(self._settings.loader_listing_interval_s)
            try:
                listings = await self._request.venue.listings(self._request.rest_url)
            except SourceError as error:
                _log.warning("listings_not_read", reason=str(error))
                continue
            new = [item for item in choose_listings(self._request, listings) if item.symbol not in self._known]
            if new:
                _log.info("listed", symbols=[item.symbol for item in new])
                await self._add_streams(streams_of(self._request.venue, new, self._channels))

    async def _add_streams(self, streams: Sequence[Stream]) -> None:
        """Spread `streams` over the connections that have room, and over new ones."""
        left = list(streams)
        for stream in left:
            self._known.add(stream.symbol)
            self._restore(stream)
        for session in [*self._sessions]:
            taken, left = left[: session.room], left[session.room :]
            await session.add(taken)
        while left:
            session = Session(self._settings, self._request.venue, self._sink, self._url)
            taken, left = left[: session.room], left[session.room :]
            await session.add(taken)
            self._sessions[session] = None
        if self._is_started and not self._reporter.is_paused:
            self._connect()

    def _restore(self, stream: Stream) -> None:
        key = (stream.instrument, stream.channel.name)
        route = self._sink.route(stream)
        route.gaps = self._tail.streams.get(key, route.gaps)
        for hole in self._tail.holes.get(key, ()):
            self._sink.publish(route, hole)


def _check_topics(settings: LoaderSettings, contracts: Contracts, channels: Sequence[Channel]) -> None:
    ids = {UNKNOWN_CONTRACT, GAPS_CONTRACT, *(channel.contract_id for channel in channels)}
    names = {topic_name(contracts, contract_id) for contract_id in ids}
    missing = sorted(names - describe_topics(admin_client(settings), names).keys())
    if missing:
        msg = f"topics {', '.join(missing)} do not exist. Create them with `streamforge topics create`"
        raise ConfigurationError(msg)


async def _when_broker_answers(settings: LoaderSettings, ask: Callable[[], T]) -> T:
    """Return what `ask` returns, asked again while the broker is away, for `loader_broker_wait_s` at most."""
    async for attempt in stamina.retry_context(
        on=RetryableSourceError, attempts=None, timeout=settings.loader_broker_wait_s, wait_initial=0.2, wait_max=5.0
    ):
        with attempt:
            return await asyncio.to_thread(ask)
    raise AssertionError


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> list[BaseException]:
    """End `tasks`; return what made any of them fail before."""
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [item for item in results if item is not None and not isinstance(item, asyncio.CancelledError)]
