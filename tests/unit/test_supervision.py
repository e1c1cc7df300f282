"""Events and commands without a broker: nothing waits, nothing raises. Metrics and their server."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import ConfigurationError, RetryableSourceError
from streamforge.events import CommandKind, ProcessState
from streamforge.metrics import MetricsServer, ProcessMetrics
from streamforge.offsets import TopicPartition
from streamforge.settings import Settings
from streamforge.supervision import ControlListener, EventPublisher, ProcessIdentity, ProcessStatus, send_command

ITEM = TopicPartition("trades", 3)


@pytest.fixture
def contracts() -> Contracts:
    return load_contracts(Settings.model_fields["contracts_dir"].default)


@pytest.fixture
def nobody() -> Iterator[Settings]:
    """Return settings of a broker that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        yield Settings(_env_file=None, bootstrap_servers=address)  # type: ignore[call-arg]


def test_events_and_commands_without_an_answering_broker_return_at_once(nobody: Settings, contracts: Contracts) -> None:
    identity = ProcessIdentity.of_this_process("parser", "0")
    publisher = EventPublisher(nobody, contracts, identity)
    listener = ControlListener(nobody, contracts, identity)
    started_s = time.monotonic()
    publisher.started()
    for _ in range(100):
        publisher.heartbeat(ProcessStatus(ProcessState.RUNNING))
        assert listener.poll() == []
    waited_s = time.monotonic() - started_s
    assert not listener.caught_up
    publisher.close(timeout_s=0.1)
    listener.close()
    assert publisher.dropped_events == 101
    assert waited_s < 30, "the calls waited for the broker, whose timeouts are a minute and more"


def test_events_beyond_the_buffer_are_dropped_and_counted(nobody: Settings, contracts: Contracts) -> None:
    publisher = EventPublisher(nobody, contracts, ProcessIdentity.of_this_process("parser", "0"))
    for _ in range(10_050):
        publisher.heartbeat()
    assert publisher.dropped_events == 50
    publisher.close(timeout_s=0)


def test_command_that_the_broker_does_not_take_is_an_error(nobody: Settings, contracts: Contracts) -> None:
    with pytest.raises(RetryableSourceError, match="queue-control"):
        send_command(nobody, contracts, target="*", command=CommandKind.PING, issued_by="test", timeout_s=0.2)


def test_identity_names_kind_slot_and_start() -> None:
    identity = ProcessIdentity.of_this_process("writer", "2", now_ns=17)
    assert identity.process_id == "writer/2@17"


def test_metrics_are_served_with_readiness_and_liveness() -> None:
    metrics = ProcessMetrics("parser", "0")
    server = MetricsServer(metrics)
    base = f"http://127.0.0.1:{server.port}"
    try:
        assert httpx.get(f"{base}/ready").status_code == 503
        metrics.set_ready(True)
        assert httpx.get(f"{base}/ready").status_code == 200
        assert httpx.get(f"{base}/live").status_code == 200
        assert httpx.get(f"{base}/other").status_code == 404
        metrics.positions({ITEM: 12}, {ITEM: 3})
        metrics.consumed("trades", 5)
        metrics.dead_letter("bad_decimal")
        metrics.committed(0.02)
        text = httpx.get(f"{base}/metrics").text
    finally:
        server.close()
    assert 'streamforge_next_offset{partition="3",topic="trades"} 12.0' in text
    assert 'streamforge_lag_records{partition="3",topic="trades"} 3.0' in text
    assert 'streamforge_records_total{topic="trades"} 5.0' in text
    assert 'streamforge_dead_letters_total{reason="bad_decimal"} 1.0' in text
    assert "streamforge_commit_seconds_count 1.0" in text


def test_metrics_of_a_topic_partition_that_is_gone_vanish() -> None:
    metrics = ProcessMetrics("parser", "0")
    labels = {"topic": "trades", "partition": "3"}
    metrics.positions({ITEM: 12}, {ITEM: 3})
    assert metrics.registry.get_sample_value("streamforge_lag_records", labels) == 3
    metrics.positions({ITEM: 12}, {})
    assert metrics.registry.get_sample_value("streamforge_next_offset", labels) == 12
    assert metrics.registry.get_sample_value("streamforge_lag_records", labels) is None, "a lag that is not known"
    metrics.positions({}, {})
    assert metrics.registry.get_sample_value("streamforge_next_offset", labels) is None


def test_metrics_counters_have_totals_and_the_rate_since_the_last_call() -> None:
    clock = iter([0.0, 10.0, 20.0])
    metrics = ProcessMetrics("parser", "0", clock_s=lambda: next(clock))
    metrics.consumed("trades", 100)
    assert metrics.counters() == {"records": 100, "records_per_s": 10.0}
    assert metrics.counters() == {"records": 100, "records_per_s": 0.0}


def test_metrics_age_of_each_product_grows_and_is_absent_until_known() -> None:
    now_ns = 100 * 10**9
    metrics = ProcessMetrics("writer", "0", now_ns=lambda: now_ns)

    def age_s(product: str) -> float | None:
        return metrics.registry.get_sample_value("streamforge_freshness_seconds", {"product": product})

    assert age_s("trades") is None
    assert "freshness_s" not in metrics.counters()
    metrics.event_time("trades", 98 * 10**9)
    metrics.event_time("trades", 97 * 10**9)  # late rows do not make the table older
    metrics.event_time("bars", 40 * 10**9)
    assert (age_s("trades"), age_s("bars")) == (2.0, 60.0)
    now_ns += 5 * 10**9
    assert (age_s("trades"), age_s("bars")) == (7.0, 65.0)
    assert metrics.counters()["freshness_s"] == 7.0
    metrics.set_ready(True)
    metrics.rest()
    assert (age_s("trades"), metrics.ready) == (None, False)


def test_metrics_port_in_use_is_a_configuration_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=str(port)):
            MetricsServer(ProcessMetrics("parser", "0"), port=port)
