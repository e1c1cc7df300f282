"""Settings: built once at an entry point and passed down; nothing else reads the environment.

Every field can be set by `STREAMFORGE_<FIELD>` in the environment or in a `.env` file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from streamforge.errors import ConfigurationError
from streamforge.market.bars import BarRules
from streamforge.market.dedupe import MAX_INTERVALS
from streamforge.market.parsing import ParserLimits

_PACKAGE = Path(__file__).resolve().parent
_CONTRACTS = next(
    (folder for folder in (_PACKAGE.parent / "contracts", _PACKAGE / "_contracts") if folder.is_dir()),
    Path("contracts"),
)


S = TypeVar("S", bound="Settings")


class Settings(BaseSettings):
    """What every StreamForge process needs to find its broker, catalog and files."""

    model_config = SettingsConfigDict(
        env_prefix="STREAMFORGE_", env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True
    )

    home: Path = Field(
        Path(".streamforge"), description="Folder for everything the platform writes: broker data, tables, logs, pids."
    )
    contracts_dir: Path = Field(_CONTRACTS, description="Folder of the contract files.")
    bootstrap_servers: str | None = Field(
        None, description="Kafka brokers as host:port,host:port. Unset: the embedded broker of `home`."
    )
    topic_prefix: str = Field(
        "",
        pattern=r"^[a-zA-Z0-9._-]*$",
        description="Prefix of every topic, group and transactional id of this platform.",
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="Kafka security.protocol."
    )
    sasl_mechanism: str | None = Field(None, description="Kafka sasl.mechanism, for instance SCRAM-SHA-512.")
    sasl_username: str | None = Field(None, description="Kafka SASL user.")
    sasl_password: SecretStr | None = Field(None, description="Kafka SASL password.")
    ssl_ca_location: Path | None = Field(None, description="File with the CA that signed the brokers' certificates.")
    ssl_certificate_location: Path | None = Field(None, description="File with the client's certificate (mutual TLS).")
    ssl_key_location: Path | None = Field(None, description="File with the client's private key (mutual TLS).")
    ssl_key_password: SecretStr | None = Field(None, description="Password of the client's private key.")
    replication_factor: int = Field(1, ge=1, description="Replicas of each topic that StreamForge creates.")
    catalog_name: str = Field("streamforge", description="Name of the Iceberg catalog; Spark must use the same one.")
    catalog_uri: str | None = Field(
        None, description="SQLAlchemy or REST URI of the Iceberg catalog. Unset: SQLite under `home`."
    )
    catalog_type: Literal["sql", "rest"] = Field("sql", description="Kind of Iceberg catalog.")
    catalog_signing_name: str | None = Field(
        None,
        description="AWS service name that requests to a REST catalog are signed for (SigV4), for instance s3tables or "
        "glue. Unset: not signed.",
    )
    warehouse: str | None = Field(None, description="Where table files lie, a URI. Unset: a folder under `home`.")
    s3_endpoint: str | None = Field(
        None, pattern=r"^https?://", description="URL of an S3 object store other than AWS. Unset: AWS."
    )
    s3_region: str | None = Field(
        None, description="Region of the object store, and of the REST catalog where its requests are signed."
    )
    s3_access_key_id: SecretStr | None = Field(
        None,
        description="S3 access key, for the REST catalog's signature too. Unset: AWS's own search for credentials.",
    )
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret that belongs to the S3 access key.")
    s3_session_token: SecretStr | None = Field(None, description="Session token of temporary S3 credentials.")
    namespace: str = Field("market", description="Iceberg namespace of the tables.")
    spark_master: str = Field(
        "local[*]", description="Spark master. local[*]: on this machine, on all cores, loopback only."
    )
    spark_driver_memory: str = Field("1g", description="Heap of Spark's driver, which in local mode does the work too.")
    spark_options: dict[str, str] = Field(
        {},
        description="Further Spark properties as a JSON object; they win over ours. "
        "A cluster needs its memory, cores and S3 keys here.",
    )
    dagster: bool = Field(True, description="Whether `up` runs Dagster too: its UI, schedules, sensors and runs.")
    mlflow_uri: str | None = Field(
        None, description="MLflow tracking and registry URI. Unset: SQLite and a folder under `home`."
    )
    recordings_dir: Path | None = Field(
        None, description="Folder with recorded market data (has ws_binance/). Unset: the synthetic market is used."
    )
    parser_max_event_ahead_s: float = Field(
        60.0,
        gt=0,
        description="An event time further than this after receipt is a dead letter, seconds; "
        "parser, replay and verify must have the same.",
    )
    parser_max_id_intervals: int = Field(
        MAX_INTERVALS, ge=1, description="Intervals of seen trade ids that the parser keeps for each instrument."
    )
    processor_accept_retention_gap: bool = Field(
        False,
        description="Go on at the log start where Kafka has removed what a processor (parser, bars, inference) still "
        "needed; what was removed is recorded in the table pipeline_gaps and counted.",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        description="Address that metrics and readiness are served on; 0.0.0.0 where another host asks, as in a pod.",
    )
    bars_out_of_orderness_s: float = Field(
        1.0,
        ge=0,
        description="How far the watermark of bars stays behind the latest event time, seconds; "
        "the bars processor and a backfill of bars must have the same.",
    )
    bars_allowed_lateness_s: float = Field(
        300.0,
        ge=0,
        description="How long after its close a bar is corrected by late trades, seconds of watermark; "
        "the bars processor and a backfill of bars must have the same.",
    )
    kill_at: str | None = Field(
        None,
        description="Tests only: SIGKILL this process at a step, step:N for its Nth passage; with !stop it is stopped.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_file: Path | None = Field(
        None, description="File that also gets the log, as JSON lines; one process a file. Unset: standard error only."
    )

    @property
    def home_path(self) -> Path:
        """Return `home` as an absolute path."""
        return self.home.expanduser().resolve()

    @property
    def resolved_catalog_uri(self) -> str:
        """Return the catalog URI, with the embedded default filled in."""
        return self.catalog_uri or f"sqlite:///{self.home_path / 'catalog.db'}"

    @property
    def resolved_warehouse(self) -> str:
        """Return the warehouse URI, with the embedded default filled in."""
        return self.warehouse or f"file://{self.home_path / 'warehouse'}"

    @property
    def bar_rules(self) -> BarRules:
        """Return what is late for a bar, for whoever makes bars: the processor, a backfill."""
        return BarRules(
            out_of_orderness_ns=int(self.bars_out_of_orderness_s * 1e9),
            allowed_lateness_ns=int(self.bars_allowed_lateness_s * 1e9),
        )

    @property
    def parser_limits(self) -> ParserLimits:
        """Return the bounds of what is believed, for whoever parses raw records: the parser, a replay, verify."""
        return ParserLimits(
            max_event_ahead_ns=int(self.parser_max_event_ahead_s * 1e9),
            max_id_intervals=self.parser_max_id_intervals,
        )


def load_settings(**overrides: object) -> Settings:
    """Build the settings from the environment, `.env` and `overrides`.

    Raises:
        ConfigurationError: a value is missing or wrong; the message names each field and its variable.
    """
    return build_settings(Settings, **overrides)


def build_settings(kind: type[S], **overrides: object) -> S:
    """Build the settings of one kind of process, as `load_settings` does.

    Raises:
        ConfigurationError: a value is missing or wrong; the message names each field and its variable.
    """
    try:
        return kind(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(
            f"STREAMFORGE_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
            for item in error.errors(include_url=False)
        )
        msg = f"settings are wrong: {problems}. Set the variable or the argument and try again"
        raise ConfigurationError(msg) from error
    except (SettingsError, UnicodeDecodeError) as error:
        # What is written as JSON (a list, a mapping) and is none, or an `.env` file that is no text.
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        msg = f'settings are wrong: {error}{cause}. Lists and mappings are JSON, such as ["trades", "bars"]'
        raise ConfigurationError(msg) from error


def make_folder(folder: Path) -> None:
    """Make a folder below `home`, with those above it, where it is absent.

    Raises:
        ConfigurationError: it cannot be made; says which setting leads there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"the folder {folder} cannot be made: {error.strerror}. Set STREAMFORGE_HOME to one that you may write to"
        raise ConfigurationError(msg) from error
