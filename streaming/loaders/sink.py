"""From frames to acknowledged records: the bounded buffer, delivery reports and published gaps.

Single-threaded by design: everything runs on the event loop's thread, delivery reports too (they are served
by `poll`). Nothing here waits for the broker but `stop`.

A frame is in one of four places: held behind a gap that the ledger has not acknowledged, in librdkafka's
queue or on its way (both count against `loader_buffer_bytes`), acknowledged, or lost and inside a gap.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import msgspec
import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from streamforge import faults
from streamforge.contracts import Contracts, TopicSettings
from streamforge.errors import ConfigurationError, PermanentSourceError
from streamforge.kafka import producer_config
from streamforge.market.gaps import GapSpan, Outbox, StreamGaps, VenueIds
from streamforge.market.records import UNKNOWN_CHANNEL, GapKind, MarketGap
from streaming.loaders.base import Channel, LoaderSettings, Stream

FRAME_OVERHEAD_BYTES = 512
"""What a waiting frame costs beside its bytes: headers, key and librdkafka's own structures (measured: 420)."""

GAPS_CONTRACT = "market-gaps"
UNKNOWN_CONTRACT = "raw-trades"
_LOW_WATER_RATIO = 0.5
_RETRY_GAPS_S = 1.0
_POLL_S = 0.02
_LIBRDKAFKA_MAX_KIB = 2_097_151
_log = structlog.get_logger(__name__)

_DETAILS = {
    GapKind.START: "Not loaded between the last raw record and the first frame of this start.",
    GapKind.RECONNECT: "Not connected between the last frame before and the first frame after.",
    GapKind.SEQUENCE: "The venue's ids jump.",
    GapKind.BUFFER_OVERFLOW: "The buffer was full because the broker did not acknowledge fast enough.",
    GapKind.BROKER_REJECTED: "The broker did not take the frames.",
}
LOADER_STEPS = (
    "loader.tail_read",
    "loader.before_gap",
    "loader.gap_handed_over",
    "loader.gap_acked",
    "loader.frames_released",
)
"""Kill points in the order in which a loader passes them: its start, then the gap before its first frames."""

Headers = list[tuple[str, str | bytes | None]]


class Frame(NamedTuple):
    """A frame as it goes to Kafka."""

    value: bytes
    ids: VenueIds | None
    ts_receive_ns: int
    headers: Headers


class Route:
    """Where the frames of one stream go, and the state of its gaps."""

    __slots__ = ("channel", "gaps", "headers", "ids_of", "instrument", "key", "outbox", "topic")

    def __init__(self, stream: Stream, venue: str, topic: str) -> None:
        self.instrument = stream.instrument
        self.channel = stream.channel.name
        self.ids_of = stream.channel.ids_of
        self.topic = topic
        self.key = stream.instrument.encode()
        self.headers = (("venue", venue.encode()), ("channel", self.channel.encode()))
        self.gaps = StreamGaps()
        self.outbox: Outbox[Frame] = Outbox()


@dataclass(slots=True)
class SinkCounters:
    """What the sink has done since the start."""

    frames: int = 0
    size_bytes: int = 0
    unknown_frames: int = 0
    refused_subscriptions: int = 0
    acked: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    rejected: int = 0
    gaps_published: dict[str, int] = field(default_factory=dict)
    gaps_acked: int = 0


class RawSink:
    """Hands frames to Kafka and publishes what may be missing.

    Args:
        settings: the broker, and how much may wait for it.
        contracts: topics of the channels and of the gaps.
        venue: label of the venue in headers and gaps.
        raw_contract_ids: contracts of the raw topics that frames go to.
        clock_ns: wall clock, nanoseconds since 1970 UTC.
    """

    def __init__(
        self,
        settings: LoaderSettings,
        contracts: Contracts,
        venue: str,
        raw_contract_ids: Iterable[str],
        *,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.counters = SinkCounters()
        self.buffered_bytes = 0
        self.is_overflowing = False
        self.fatal: PermanentSourceError | None = None
        self._venue = venue
        self._clock_ns = clock_ns
        self._bound_bytes = settings.loader_buffer_bytes
        self._low_bytes = int(settings.loader_buffer_bytes * _LOW_WATER_RATIO)
        self._stop_deadline_s = settings.loader_stop_deadline_s
        self._contracts = contracts
        self._gaps_topic = topic_name(contracts, GAPS_CONTRACT)
        self._routes: dict[tuple[str, str], Route] = {}
        self._unsettled: set[Route] = set()
        self._gaps_to_retry: list[tuple[Route, MarketGap]] = []
        self._gaps_in_flight = 0
        self._retry_gaps_at_s = 0.0
        raw_ids = {UNKNOWN_CONTRACT, *raw_contract_ids}
        self._producer = Producer(
            _raw_producer_config(settings, contracts, raw_ids), logger=logging.getLogger("librdkafka")
        )
        unknown = Channel(UNKNOWN_CHANNEL, UNKNOWN_CONTRACT, None)
        self.unknown = self.route(Stream(b"", "", f"UNKNOWN.{venue}", unknown))
        self.unknown.gaps = StreamGaps(fresh=None)

    @property
    def gaps_waiting(self) -> int:
        """Return how many published gaps the broker has not acknowledged."""
        return self._gaps_in_flight + len(self._gaps_to_retry)

    @property
    def held_streams(self) -> int:
        """Return how many streams wait for the acknowledgement of a gap."""
        return sum(route.outbox.is_waiting for route in self._routes.values())

    def route(self, stream: Stream) -> Route:
        """Return the route of `stream`, made on first use."""
        known = self._routes.get((stream.instrument, stream.channel.name))
        if known is None:
            known = Route(stream, self._venue, topic_name(self._contracts, stream.channel.contract_id))
            self._routes[(stream.instrument, stream.channel.name)] = known
        return known

    def interrupted(self, routes: Iterable[Route]) -> None:
        """Note that nobody listened to `routes` until their next frame."""
        for route in routes:
            route.gaps.interrupted()

    def received(self, route: Route, value: bytes, connection_id: bytes, sequence: int) -> None:
        """Take in one frame: hand it on, hold it behind its gap, or drop it where there is no room."""
        ts_ns = self._clock_ns()
        ids = route.ids_of(value) if route.ids_of is not None else None
        counters = self.counters
        counters.frames += 1
        counters.size_bytes += len(value)
        size_bytes = len(value) + FRAME_OVERHEAD_BYTES
        if self.is_overflowing or self.buffered_bytes + size_bytes > self._bound_bytes:
            self._drop(route, ids, len(value), ts_ns)
            return
        self.buffered_bytes += size_bytes
        span = route.gaps.frame(ids, ts_ns)
        if span is not None:
            self._gap(route, replace(span, connection_id=connection_id.decode()))
        headers: Headers = [
            *route.headers,
            ("connection_id", connection_id),
            ("sequence_in_connection", b"%d" % sequence),
            ("ts_receive_ns", b"%d" % ts_ns),
        ]
        if route.outbox.is_waiting:
            route.outbox.hold(Frame(value, ids, ts_ns, headers))
        else:
            self._produce(route, value, ids, ts_ns, headers)

    def publish(self, route: Route, span: GapSpan) -> None:
        """Publish a gap that was found elsewhere than in the frames; frames wait behind it."""
        self._gap(route, span)

    def poll(self) -> None:
        """Serve delivery reports, publish the gaps that follow from them; returns at once."""
        self._producer.poll(0)
        if self.is_overflowing and self.buffered_bytes <= self._low_bytes:
            self.is_overflowing = False
            _log.info("buffer_has_room", buffered_bytes=self.buffered_bytes, dropped=self.counters.dropped)
        if self._unsettled and not self.is_overflowing:
            self._settle()
        if self._gaps_to_retry and time.monotonic() >= self._retry_gaps_at_s:
            retry, self._gaps_to_retry = self._gaps_to_retry, []
            for route, gap in retry:
                self._produce_gap(route, gap, holds=False)

    def stop(self) -> int:
        """Wait for acknowledgements, give up what is left, publish its gaps; return frames and gaps left unsaid.

        Takes at most twice the stop deadline. What is left unsaid is said by the next start: its gap begins at
        the last record that raw has.
        """
        self._drain()
        if self.buffered_bytes:
            self._give_up_held()
            self._producer.purge()
            self._producer.poll(0)
        self.is_overflowing = False
        now_ns = self._clock_ns()
        for route in self._routes.values():
            for span in route.gaps.stopped(now_ns):
                self._gap(route, span)
        self._drain()
        left = len(self._producer) + len(self._gaps_to_retry)
        self._producer.purge()
        self._producer.poll(0)
        return left

    def _drain(self) -> None:
        deadline_s = time.monotonic() + self._stop_deadline_s
        while (self.buffered_bytes or self.gaps_waiting) and time.monotonic() < deadline_s:
            self._producer.poll(_POLL_S)
            self.poll()

    def _give_up_held(self) -> None:
        for route in self._routes.values():
            if route.outbox.is_waiting:
                for frame in route.outbox.give_up():
                    self._rejected(route, frame.ids, len(frame.value), frame.ts_receive_ns)

    def _drop(self, route: Route, ids: VenueIds | None, size_bytes: int, ts_ns: int) -> None:
        if not self.is_overflowing:
            self.is_overflowing = True
            _log.warning("buffer_full", buffered_bytes=self.buffered_bytes, bound_bytes=self._bound_bytes)
        self.counters.dropped += 1
        self.counters.dropped_bytes += size_bytes
        route.gaps.drop(ids, size_bytes, ts_ns)
        self._unsettled.add(route)

    def _settle(self) -> None:
        routes, self._unsettled = self._unsettled, set()
        for route in routes:
            for span in (route.gaps.overflow_ended(), route.gaps.take_rejected()):
                if span is not None:
                    self._gap(route, span)

    def _produce(self, route: Route, value: bytes, ids: VenueIds | None, ts_ns: int, headers: Headers) -> None:
        try:
            self._producer.produce(
                route.topic,
                value,
                route.key,
                # The report of a failed record has no headers, so it cannot tell its stream and time itself.
                on_delivery=partial(self._delivered, route, ts_ns),
                headers=headers,
            )
        except (KafkaException, BufferError) as error:
            self._rejected(route, ids, len(value), ts_ns)
            self._note(error.args[0] if isinstance(error, KafkaException) else None)

    def _delivered(self, route: Route, ts_ns: int, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self.counters.acked += 1
            self.buffered_bytes -= len(message) + FRAME_OVERHEAD_BYTES
            return
        value = message.value() or b""
        payload = value if isinstance(value, bytes) else value.encode()
        ids = route.ids_of(payload) if route.ids_of is not None else None
        self._rejected(route, ids, len(payload), ts_ns)
        self._note(error)

    def _rejected(self, route: Route, ids: VenueIds | None, size_bytes: int, ts_ns: int) -> None:
        self.buffered_bytes -= size_bytes + FRAME_OVERHEAD_BYTES
        self.counters.rejected += 1
        route.gaps.reject(ids, size_bytes, ts_ns)
        self._unsettled.add(route)

    def _note(self, error: KafkaError | None) -> None:
        if error is not None and error.fatal():
            self.fatal = PermanentSourceError(
                f"the Kafka producer cannot go on: {error.str()}. A new process can; its start gap says what is missing"
            )

    def _gap(self, route: Route, span: GapSpan) -> None:
        faults.step("loader.before_gap")
        now = route.outbox.gap(span)
        if now is not None:
            self._produce_gap(route, self._record(route, now), holds=True)

    def _record(self, route: Route, span: GapSpan) -> MarketGap:
        published = self.counters.gaps_published
        published[span.kind] = published.get(span.kind, 0) + 1
        return MarketGap(
            gap_id=uuid.uuid4().hex,
            kind=span.kind,
            venue=self._venue,
            channel=route.channel,
            instrument=route.instrument,
            ts_start_ns=span.ts_start_ns,
            ts_end_ns=span.ts_end_ns,
            id_before=None if span.id_before is None else str(span.id_before),
            id_after=None if span.id_after is None else str(span.id_after),
            connection_id=span.connection_id,
            records_dropped=span.records_dropped,
            bytes_dropped=span.bytes_dropped,
            detail=_DETAILS[span.kind],
            ts_detected_ns=self._clock_ns(),
        )

    def _produce_gap(self, route: Route, gap: MarketGap, *, holds: bool) -> None:
        """Hand a gap to Kafka; `holds` says that the frames behind it wait for it."""
        try:
            self._producer.produce(
                self._gaps_topic,
                msgspec.json.encode(gap),
                route.key,
                on_delivery=partial(self._gap_delivered, route, gap, holds),
            )
            self._gaps_in_flight += 1
            faults.step("loader.gap_handed_over")
        except (KafkaException, BufferError) as error:
            self._note(error.args[0] if isinstance(error, KafkaException) else None)
            self._gap_failed(route, gap, holds, str(error))

    def _gap_delivered(
        self, route: Route, gap: MarketGap, holds: bool, error: KafkaError | None, _message: Message
    ) -> None:
        self._gaps_in_flight -= 1
        if error is not None:
            self._note(error)
            self._gap_failed(route, gap, holds, error.str())
            return
        self.counters.gaps_acked += 1
        faults.step("loader.gap_acked")
        if holds:
            self._release(route)
            faults.step("loader.frames_released")

    def _gap_failed(self, route: Route, gap: MarketGap, holds: bool, reason: str) -> None:
        """Keep the gap for another try, and let the frames go: raw is worth more than the order of the ledger."""
        _log.error("gap_not_taken", reason=reason, instrument=gap.instrument, channel=gap.channel, kind=gap.kind)
        self._gaps_to_retry.append((route, gap))
        self._retry_gaps_at_s = time.monotonic() + _RETRY_GAPS_S
        if holds:
            self._release(route)

    def _release(self, route: Route) -> None:
        frames, span = route.outbox.acknowledged()
        for frame in frames:
            self._produce(route, *frame)
        if span is not None:
            self._produce_gap(route, self._record(route, span), holds=True)


def topic_name(contracts: Contracts, contract_id: str) -> str:
    """Return the name of the topic of `contract_id`.

    Raises:
        ConfigurationError: the contract has no topic.
    """
    return _topic(contracts, contract_id).name


def _topic(contracts: Contracts, contract_id: str) -> TopicSettings:
    topic = contracts[contract_id].topic
    if topic is None:
        msg = f"contract {contract_id} ({contracts[contract_id].path}) has no topic; a loader needs it"
        raise ConfigurationError(msg)
    return topic


def _raw_producer_config(settings: LoaderSettings, contracts: Contracts, raw_ids: Iterable[str]) -> dict[str, Any]:
    """Return a configuration in which our own bound is the only one: librdkafka's queue is larger."""
    largest = max(_topic(contracts, contract_id).max_message_bytes for contract_id in raw_ids)
    extra: dict[str, Any] = {
        "queue.buffering.max.messages": 0,
        "queue.buffering.max.kbytes": min(2 * settings.loader_buffer_bytes // 1024 + 65_536, _LIBRDKAFKA_MAX_KIB),
        "message.max.bytes": largest,
        "message.timeout.ms": int(settings.loader_delivery_timeout_s * 1000),
    }
    return producer_config(settings, **extra)
