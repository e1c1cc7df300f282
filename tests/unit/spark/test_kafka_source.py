"""A task's records: several ranges out of one stream, whatever the batches; and what Kafka's Java client is told."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from streamforge.errors import ConfigurationError
from streamforge.offsets import OffsetRange
from streamforge.settings import Settings
from streamforge.spark.kafka_source import RecordStream, client_options, read_options

_ROOT = Path(__file__).resolve().parents[3]
_TYPE = pa.schema(
    [
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
    ]
)


def _batch(offsets: list[int]) -> pa.RecordBatch:
    rows = [
        {"partition": 3, "offset": n, "key": b"k", "value": str(n).encode(), "headers": [("venue", b"SIM")]}
        for n in offsets
    ]
    return pa.RecordBatch.from_pylist(rows, schema=_TYPE)


@given(
    offsets=st.sets(st.integers(0, 60)),
    cuts=st.sets(st.integers(0, 60)),
    bounds=st.lists(st.integers(0, 61), max_size=8, unique=True).map(sorted),
)
def test_stream_gives_each_range_its_records_once_whatever_the_batches(
    offsets: set[int], cuts: set[int], bounds: list[int]
) -> None:
    ordered = sorted(offsets)
    edges = [0, *sorted(cuts), 61]
    batches = [_batch([n for n in ordered if a <= n < b]) for a, b in pairwise(edges)]
    ranges = [OffsetRange("t", 3, a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False)]
    stream = RecordStream(batches)
    assert stream.partition() == (3 if ordered else None)
    found = [[message.offset() for part in stream.read(each) for message in part] for each in ranges]
    assert found == [[n for n in ordered if each.start <= n < each.end] for each in ranges]


def test_stream_gives_records_with_the_methods_of_a_message() -> None:
    ((message,),) = RecordStream([_batch([7])]).read(OffsetRange("t", 3, 0, 10))
    assert (message.partition(), message.offset(), message.key(), message.value()) == (3, 7, b"k", b"7")
    assert message.headers() == [("venue", b"SIM")]
    bare = pa.RecordBatch.from_pylist([{"partition": 3, "offset": 8}], schema=_TYPE)
    ((message,),) = RecordStream([bare]).read(OffsetRange("t", 3, 0, 10))
    assert (message.key(), message.value(), message.headers()) == (None, None, None)


@pytest.mark.parametrize(
    ("mechanism", "module"), [("SCRAM-SHA-512", "scram.ScramLoginModule"), ("PLAIN", "plain.PlainLoginModule")]
)
def test_client_options_translate_credentials_for_java(mechanism: str, module: str) -> None:
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        bootstrap_servers="broker:9093",
        security_protocol="SASL_SSL",
        sasl_mechanism=mechanism,
        sasl_username="me",
        sasl_password=SecretStr('a"b'),
        ssl_ca_location=Path("/ca.pem"),
    )
    options = client_options(settings)
    assert options["kafka.security.protocol"] == "SASL_SSL"
    assert options["kafka.sasl.jaas.config"] == (
        f'org.apache.kafka.common.security.{module} required username="me" password="a\\"b";'
    )
    assert options["kafka.ssl.truststore.type"] == "PEM"
    assert options["kafka.ssl.truststore.location"] == "/ca.pem"


def test_a_read_takes_committed_records_only_and_fails_on_lost_ones() -> None:
    ranges = [OffsetRange("t", 3, 5, 9), OffsetRange("t", 3, 20, 30), OffsetRange("t", 11, 0, 4)]
    settings = Settings(_env_file=None, bootstrap_servers="broker:9092")  # type: ignore[call-arg]
    options = read_options(settings, ranges)
    assert options["failOnDataLoss"] == "true"
    assert options["kafka.isolation.level"] == "read_committed"
    assert {name: json.loads(options[name]) for name in ("assign", "startingOffsets", "endingOffsets")} == {
        "assign": {"t": [3, 11]},
        "startingOffsets": {"t": {"3": 5, "11": 0}},
        "endingOffsets": {"t": {"3": 30, "11": 4}},
    }


def test_every_kafka_read_of_spark_has_these_options() -> None:
    packages = ("streamforge", "streaming", "assets", "orchestration", "cli", "dbt")
    sources = [path.read_text("utf-8") for package in packages for path in (_ROOT / package).rglob("*.py")]
    reads = [rest for text in sources for rest in re.split(r"""(?i)format\(\s*["']kafka["']\s*\)""", text)[1:]]
    assert len(reads) == 1, "another read has to take its options from read_options too"
    assert reads[0].startswith(".options(**read_options(settings, ranges)).load()")


def test_client_certificate_is_refused_with_the_way_out(tmp_path: Path) -> None:
    settings = Settings(
        _env_file=None, bootstrap_servers="kafka:9093", ssl_certificate_location=tmp_path / "client.pem"
    )  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match=r"CERTIFICATE.*--engine local"):
        client_options(settings)
