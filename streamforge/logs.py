"""Structured logs: for people on a terminal, JSON lines everywhere else, always on standard error.

Standard output belongs to a command's result. Times are UTC. Secrets never get out: `SecretStr` values,
values under a telling key and passwords inside URLs are masked before anything is rendered.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import structlog
from pydantic import SecretBytes, SecretStr
from structlog.typing import EventDict, Processor, WrappedLogger

from streamforge.errors import ConfigurationError
from streamforge.settings import Settings

_MASK = "***"
# Libraries that log every request at the level at which we log what people should see; botocore, at debug, what it
# signs too, session tokens among it.
_CHATTY = ("httpx", "httpcore", "boto3", "botocore")
_TELLING_KEY = re.compile(r"passw|secret|token|api_?key|credential|authorization|jaas", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"://[^/\s@]+@")


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Write to whatever standard error is at the moment, as tests and runners replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure(settings: Settings) -> None:
    """Send every log of this process, structlog's and the standard library's, where `settings` say.

    Calling it again replaces what the last call set up.

    Raises:
        ConfigurationError: the log file cannot be written.
    """
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        # Loggers are made at import, before this call: a cached one would keep what was set up then.
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if getattr(handler, "is_streamforge", False)]:
        root.removeHandler(old)
        old.close()
    _add(root, _StderrHandler(), as_json=not sys.stderr.isatty())
    if settings.log_file is not None:
        try:
            settings.log_file.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(settings.log_file, encoding="utf-8")
        except OSError as error:
            msg = f"the log file cannot be written: {error}. Set STREAMFORGE_LOG_FILE to another file"
            raise ConfigurationError(msg) from error
        _add(root, handler, as_json=True)
    root.setLevel(settings.log_level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Return `event` without anything that looks like a secret."""
    return {key: _masked(key, value) for key, value in event.items()}


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        # Before the mask: a traceback's text may hold a URL with a password.
        structlog.processors.format_exc_info,
        mask_secrets,
    ]


def _add(root: logging.Logger, handler: logging.Handler, *, as_json: bool) -> None:
    renderer: Processor = structlog.processors.JSONRenderer(default=str) if as_json else structlog.dev.ConsoleRenderer()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(),
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    handler.is_streamforge = True  # type: ignore[attr-defined]
    root.addHandler(handler)


def _masked(key: str, value: Any) -> Any:
    if isinstance(value, SecretStr | SecretBytes) or (_TELLING_KEY.search(key) and value is not None):
        return _MASK
    if isinstance(value, str):
        return _PASSWORD_IN_URL.sub(f"://{_MASK}@", value)
    if isinstance(value, Mapping):
        return {name: _masked(str(name), item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked("", item) for item in value]
    return value
