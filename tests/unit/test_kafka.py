"""Client configuration from settings: every security setting reaches librdkafka, and nothing else changes."""

from __future__ import annotations

from streamforge.kafka import client_config, consumer_config, producer_config, reader_config
from streamforge.settings import Settings

SECURED = {
    "security.protocol": "SASL_SSL",
    "sasl.mechanism": "SCRAM-SHA-512",
    "sasl.username": "streamforge",
    "sasl.password": "not-to-be-seen",
    "ssl.ca.location": "ca.pem",
    "ssl.certificate.location": "client.pem",
    "ssl.key.location": "client.key",
    "ssl.key.password": "a secret of the key",
}


def _settings(**values: object) -> Settings:
    return Settings(_env_file=None, bootstrap_servers="kafka:9093", **values)  # type: ignore[call-arg, arg-type]


def _secured() -> Settings:
    fields = {key.replace(".", "_"): value for key, value in SECURED.items()}
    return _settings(**fields)


def test_every_security_setting_reaches_every_kind_of_client() -> None:
    settings = _secured()
    assert client_config(settings) == {"bootstrap.servers": "kafka:9093", **SECURED}
    for config in (
        consumer_config(settings, group="g", slot="0"),
        producer_config(settings),
        reader_config(settings),
    ):
        assert config.items() >= SECURED.items()


def test_every_security_field_of_the_settings_is_used() -> None:
    fields = {name for name in Settings.model_fields if name.startswith(("sasl_", "ssl_", "security_"))}
    assert {name.replace("_", ".") for name in fields} == SECURED.keys()


def test_without_security_settings_only_address_and_protocol_are_set() -> None:
    assert client_config(_settings()) == {"bootstrap.servers": "kafka:9093", "security.protocol": "PLAINTEXT"}


def test_secrets_are_not_shown() -> None:
    shown = repr(_secured())
    assert SECURED["sasl.username"] in shown
    assert SECURED["sasl.password"] not in shown
