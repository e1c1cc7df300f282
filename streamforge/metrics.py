"""Prometheus metrics of one process, and the small HTTP server that serves them with its readiness.

Routes: `/metrics` (Prometheus text), `/ready` (200 when the process does its work, 503 when not yet or no
longer), `/live` (200 while the server answers). It listens on the loopback interface unless told otherwise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from streamforge.errors import ConfigurationError
from streamforge.offsets import TopicPartition

LOOPBACK = "127.0.0.1"

_PREFIX = "streamforge_"
_COMMIT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_POSITION_LABELS = ("topic", "partition")


class ProcessMetrics:
    """The metrics of one process, in a registry of its own (so that tests and threads can have several).

    Args:
        kind: what the process runs; a label of every metric's process.
        slot: its replica name.
        clock_s: monotonic seconds, for rates.
        now_ns: wall clock, nanoseconds since 1970 UTC, for ages.
    """

    def __init__(
        self,
        kind: str,
        slot: str,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.registry = CollectorRegistry()
        self.note = ""
        """What the process says of itself beside the figures, in its events."""
        self._clock_s = clock_s
        self._now_ns = now_ns
        self._event_times_ns: dict[str, int] = {}
        self._since_s = clock_s()
        self._records_before = 0.0
        self._records = 0.0
        self._totals: dict[str, float] = {}
        self._ready = threading.Event()
        self._held: set[TopicPartition] = set()
        info = Gauge(_PREFIX + "process", "1 while the process runs.", ("kind", "slot"), registry=self.registry)
        info.labels(kind, slot).set(1)
        self._next_offset = self._gauge("next_offset", "Durable next_offset of each topic-partition.", _POSITION_LABELS)
        self._lag = self._gauge("lag_records", "End offset minus next_offset, in records.", _POSITION_LABELS)
        self.registry.register(_Freshness(self))
        self._consumed = self._counter("records", "Records taken in.", ("topic",))
        self._written = self._counter("outputs", "Records or rows written.", ("product",))
        self._conflicts = self._counter("commit_conflicts", "Commits that did not land because of another.")
        self._dead_letters = self._counter("dead_letters", "Records that were refused.", ("reason",))
        self._duplicates = self._counter("duplicates_dropped", "Venue duplicates that were dropped.")
        self._removed = self._counter(
            "retention_gap_offsets", "Offsets passed because retention had removed them.", ("topic",)
        )
        self._skipped = self._counter("skipped", "Records that need no output.", ("reason",))
        self._commit_time = Histogram(
            _PREFIX + "commit_seconds",
            "Time of one commit.",
            registry=self.registry,
            buckets=_COMMIT_BUCKETS_S,
        )

    @property
    def ready(self) -> bool:
        """Return whether the process does its work."""
        return self._ready.is_set()

    def set_ready(self, ready: bool) -> None:
        """Say whether the process does its work."""
        if ready:
            self._ready.set()
        else:
            self._ready.clear()

    def rest(self) -> None:
        """Say that nothing is held any more: not ready, and the age of no product is ours to tell."""
        self._ready.clear()
        self._event_times_ns = {}

    def consumed(self, topic: str, records: int) -> None:
        """Count records taken in."""
        self._consumed.labels(topic).inc(records)
        self._records += records
        self._add("records", records)

    def written(self, product: str, count: int) -> None:
        """Count records or rows written to `product`."""
        self._written.labels(product).inc(count)
        self._add("outputs", count)

    def committed(self, duration_s: float) -> None:
        """Record one commit."""
        self._commit_time.observe(duration_s)
        self._add("commits", 1)

    def conflict(self) -> None:
        """Count a commit that did not land because of another."""
        self._conflicts.inc()
        self._add("commit_conflicts", 1)

    def dead_letter(self, reason: str, count: int = 1) -> None:
        """Count refused records by reason."""
        self._dead_letters.labels(reason).inc(count)
        self._add("dead_letters", count)

    def duplicates(self, count: int) -> None:
        """Count venue duplicates that were dropped."""
        self._duplicates.inc(count)
        self._add("duplicates_dropped", count)

    def skipped(self, reason: str, count: int) -> None:
        """Count records that need no output, by reason."""
        self._skipped.labels(reason).inc(count)
        self._add("skipped", count)

    def retention_gap(self, topic: str, offsets: int) -> None:
        """Count offsets of `topic` that were passed because retention had removed them."""
        self._removed.labels(topic).inc(offsets)
        self._add("retention_gap_offsets", offsets)

    def event_time(self, product: str, ts_event_ns: int) -> None:
        """Note an event time of `product` that was made durable; the latest one counts."""
        self._event_times_ns[product] = max(ts_event_ns, self._event_times_ns.get(product, ts_event_ns))

    def freshness_s(self) -> dict[str, float]:
        """Return by product the age of its latest durable event time in seconds, which grows while nothing comes."""
        now_ns = self._now_ns()
        return {product: (now_ns - latest_ns) / 1e9 for product, latest_ns in self._event_times_ns.copy().items()}

    def freshness_quantiles(self, p50_s: float, p99_s: float) -> None:
        """Say in events how old rows were when they became durable, over the life of the process."""
        self._totals["freshness_p50_s"], self._totals["freshness_p99_s"] = p50_s, p99_s

    def positions(self, positions: Mapping[TopicPartition, int], lag: Mapping[TopicPartition, int]) -> None:
        """Set durable positions and lag; topic-partitions that are no longer held vanish, an unknown lag is absent."""
        for gauge, values in ((self._next_offset, positions), (self._lag, lag)):
            for item in self._held - values.keys():
                gauge.remove(item.topic, str(item.partition))
            for item, value in values.items():
                gauge.labels(item.topic, str(item.partition)).set(value)
        self._held = set(positions)

    def counters(self) -> dict[str, float]:
        """Return totals by metric name, the age of the latest event time, and the rate since the last call.

        This is what a process event carries; the age is that of the freshest product.
        """
        now_s = self._clock_s()
        elapsed_s = now_s - self._since_s
        rate = (self._records - self._records_before) / elapsed_s if elapsed_s > 0 else 0.0
        self._since_s, self._records_before = now_s, self._records
        ages_s = self.freshness_s()
        latest = {"freshness_s": min(ages_s.values())} if ages_s else {}
        return {**self._totals, **latest, "records_per_s": round(rate, 1)}

    def _add(self, name: str, count: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + count

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(_PREFIX + name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self.registry)


class _Freshness(Collector):
    """Computes ages when Prometheus asks, so that they grow while nothing comes; a product not seen yet has none."""

    def __init__(self, metrics: ProcessMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        text = "Now minus the latest event time made durable."
        family = GaugeMetricFamily(_PREFIX + "freshness_seconds", text, labels=["product"])
        for product, age_s in self._metrics.freshness_s().items():
            family.add_metric([product], age_s)
        yield family


class MetricsServer:
    """Serves one process's metrics and readiness from a thread of its own.

    Args:
        metrics: what to serve.
        port: port to listen on; 0 takes a free one, `port` then says which.
        host: interface to listen on.

    Raises:
        ConfigurationError: the port cannot be listened on.
    """

    def __init__(self, metrics: ProcessMetrics, *, port: int = 0, host: str = LOOPBACK) -> None:
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(metrics))
        except (OSError, OverflowError) as error:
            msg = f"metrics cannot be served on {host}:{port}: {error}. Choose another port, or 0 for a free one"
            raise ConfigurationError(msg) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(metrics: ProcessMetrics) -> type[BaseHTTPRequestHandler]:
    class Handler(MetricsHandler):
        registry = metrics.registry

        def do_GET(self) -> None:  # noqa: N802 - http.server calls it so
            path = self.path.partition("?")[0]
            if path == "/metrics":
                super().do_GET()
            elif path == "/live":
                self._say(HTTPStatus.OK, "live")
            elif path == "/ready":
                ready = metrics.ready
                self._say(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, "ready" if ready else "not ready")
            else:
                self._say(HTTPStatus.NOT_FOUND, "routes: /metrics /ready /live")

        def _say(self, status: HTTPStatus, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
