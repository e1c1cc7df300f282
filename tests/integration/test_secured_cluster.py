"""Any other cluster: address and security settings, nothing else changes. Here one that asks for a password."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from streamforge import broker
from streamforge.broker import BrokerState
from streamforge.contracts import load_contracts
from streamforge.errors import StreamForgeError
from streamforge.processes import choose_free_port
from streamforge.settings import Settings
from streamforge.supervision import topic_of
from streamforge.topics import create_topics
from tests.conftest import with_partitions
from tests.writer_support import (
    PARTITIONS,
    TRADE_TOPICS,
    produce,
    running_writer,
    table_identities,
    topic_identities,
    trades,
    wait_for_landed,
    writer_settings,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Run a broker with a second listener, which wants user and password; return settings for that one."""
    port = choose_free_port()
    plain = broker.kafka_properties

    def with_password(**places: Any) -> dict[str, str]:
        found, protocols = plain(**places), "listener.security.protocol.map"
        listener = f",SASL_PLAINTEXT://127.0.0.1:{port}"
        login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
        return found | {
            "listeners": found["listeners"] + listener,
            "advertised.listeners": found["advertised.listeners"] + listener,
            protocols: f"{found[protocols]},SASL_PLAINTEXT:SASL_PLAINTEXT",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": f'{login} user_forge="right";',
        }

    monkeypatch.setattr(broker, "kafka_properties", with_password)
    embedded = Settings(_env_file=None, home=tmp_path / "broker")  # type: ignore[call-arg]
    broker.start(embedded)
    try:
        yield Settings(
            _env_file=None,  # type: ignore[call-arg]
            home=tmp_path / "home",
            bootstrap_servers=f"127.0.0.1:{port}",
            security_protocol="SASL_PLAINTEXT",
            sasl_mechanism="PLAIN",
            sasl_username="forge",
            sasl_password=SecretStr("right"),
        )
    finally:
        broker.stop(embedded)


def test_line_runs_on_a_cluster_that_asks_for_a_password(secured: Settings) -> None:
    contracts = with_partitions(load_contracts(secured.contracts_dir), TRADE_TOPICS, PARTITIONS)
    assert broker.status(secured).state is BrokerState.EXTERNAL, "what `up`, `status` and `doctor` ask first"
    create_topics(secured, contracts, TRADE_TOPICS)
    security = {name: getattr(secured, name) for name in Settings.model_fields if name.startswith(("sasl", "secur"))}
    settings = writer_settings(secured, **security)
    topic = topic_of(contracts, "trades").name
    produce(settings, topic, trades(10))
    with running_writer(settings, contracts) as writer:
        wait_for_landed(settings, contracts, topic, writer=writer)
    assert table_identities(settings, contracts) == topic_identities(settings, topic)

    wrong = secured.model_copy(update={"sasl_password": SecretStr("wrong")})
    with pytest.raises(StreamForgeError):
        create_topics(wrong, contracts, TRADE_TOPICS)
    assert broker.status(wrong).state is BrokerState.UNREACHABLE
