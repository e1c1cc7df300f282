"""The embedded broker: starts once, keeps its data, says why it died, leaves others alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition
from confluent_kafka.admin import AdminClient

from streamforge import broker
from streamforge.broker import BrokerState
from streamforge.errors import ConfigurationError, PermanentSourceError
from streamforge.kafka_server import class_path
from streamforge.processes import LOOPBACK, ProcessRecord
from streamforge.settings import Settings
from tests.kafka_records import create_topic
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

# Long only when something is wrong: machines of tests are slow and shared.
_WITHIN_S = 120.0


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    found = Settings(_env_file=None, home=tmp_path / "home")  # type: ignore[call-arg]
    yield found
    broker.stop(found, deadline_s=5.0)


def _write(address: str | None, value: bytes) -> None:
    assert address is not None
    admin = AdminClient({"bootstrap.servers": address})
    create_topic(admin, "kept", 1)
    producer = Producer({"bootstrap.servers": address, "acks": "all"})
    producer.produce("kept", value)
    assert producer.flush(30) == 0


def _read(address: str | None) -> bytes | None:
    consumer = Consumer({"bootstrap.servers": address, "group.id": "reader", "auto.offset.reset": "earliest"})
    try:
        consumer.assign([KafkaTopicPartition("kept", 0, 0)])
        message = wait_until(lambda: consumer.poll(0.5), timeout_s=_WITHIN_S, what="the record that was written before")
        assert message.error() is None
        return message.value()
    finally:
        consumer.close()


def test_start_is_idempotent_and_restart_keeps_address_and_data(settings: Settings) -> None:
    first = broker.start(settings)
    assert first.state is BrokerState.RUNNING
    assert broker.start(settings).pid == first.pid
    _write(first.address, b"before the restart")
    assert broker.stop(settings).state is BrokerState.STOPPED
    assert first.pid is not None
    assert not psutil.pid_exists(first.pid)
    assert broker.status(settings).state is BrokerState.STOPPED
    second = broker.start(settings)
    assert (second.address, second.cluster_id) == (first.address, first.cluster_id)
    assert _read(second.address) == b"before the restart"


def test_killed_broker_is_reported_and_comes_back_with_its_data(settings: Settings) -> None:
    first = broker.start(settings)
    _write(first.address, b"before the kill")
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    died = wait_until(
        lambda: found if (found := broker.status(settings)).state is BrokerState.DIED else None, what="it is seen dead"
    )
    assert any("started" in line.lower() for line in died.log_tail)
    second = broker.start(settings)
    assert (second.address, second.cluster_id) == (first.address, first.cluster_id)
    assert _read(second.address) == b"before the kill"


def test_two_starts_at_once_give_one_broker(settings: Settings) -> None:
    code = (
        "import sys; from streamforge import broker; from streamforge.settings import Settings; "
        "print(broker.start(Settings(_env_file=None, home=sys.argv[1])).pid)"
    )

    def start() -> str:
        command = [sys.executable, "-c", code, str(settings.home)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(2) as pool:
        pids = {future.result() for future in [pool.submit(start), pool.submit(start)]}
    assert pids == {f"{broker.status(settings).pid}\n"}


def test_death_during_start_is_reported_with_its_log(settings: Settings) -> None:
    data = settings.home_path / "broker" / "data"
    data.mkdir(parents=True)
    (data / "meta.properties").write_text("version=1\ncluster.id=another\nnode.id=77\n", encoding="utf-8")
    with pytest.raises(PermanentSourceError, match=r"died during its start[\s\S]*77[\s\S]*broker start"):
        broker.start(settings)
    assert broker.status(settings).state is BrokerState.DIED


def test_taken_port_and_reused_pid_belong_to_others(settings: Settings) -> None:
    first = broker.start(settings)
    broker.stop(settings)
    assert first.address is not None
    port = int(first.address.rpartition(":")[2])
    # The pid file of an ended broker whose pid is now someone else's: ours, who must survive this.
    stranger = ProcessRecord(os.getpid(), psutil.Process().create_time() - 3600.0)
    stranger.write(settings.home_path / "broker" / "broker.pid")
    with socket.create_server((LOOPBACK, port)):
        second = broker.start(settings)
        assert second.address != first.address
        assert any(str(port) in note for note in second.notes)
        assert second.cluster_id == first.cluster_id


def test_external_cluster_is_left_alone(settings: Settings) -> None:
    external = settings.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})
    for action in (broker.start, broker.stop, broker.run):
        with pytest.raises(ConfigurationError, match="external cluster"):
            action(external)
    assert broker.status(external, timeout_s=0.5).state is BrokerState.UNREACHABLE


def test_run_becomes_the_broker_and_obeys_signals(settings: Settings) -> None:
    environment = os.environ | {"STREAMFORGE_HOME": str(settings.home)}
    command = [sys.executable, "-m", "cli", "broker", "run"]
    with subprocess.Popen(command, env=environment) as process:
        found = wait_until(
            lambda: status if (status := broker.status(settings)).state is BrokerState.RUNNING else None,
            timeout_s=_WITHIN_S,
            what="the broker in the foreground answers",
        )
        assert found.pid == process.pid
        with pytest.raises(PermanentSourceError, match="runs already"):
            broker.run(settings)
        process.terminate()
        assert process.wait(_WITHIN_S) in (0, 143)


def test_class_path_is_found_again_without_network_java_or_mvn(monkeypatch: pytest.MonkeyPatch) -> None:
    jars = class_path()

    def no_network(*_: object) -> None:
        pytest.fail("the class path was resolved again")

    monkeypatch.setattr("jgo.resolve", no_network)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert class_path() == jars
    assert any("kafka-clients-4.4.0.jar" in jar for jar in jars)
