"""How an error of ours ends a step: with its message, for the person who looks at the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import dagster as dg

from streamforge.errors import (
    CommitConflictError,
    CommitError,
    CommitUnknownError,
    RetryableSourceError,
    StreamForgeError,
)
from streamforge.lakehouse.catalog import CATALOG_ERRORS

_WORTH_A_RETRY = (RetryableSourceError, CommitConflictError, CommitUnknownError)


@contextmanager
def clear_failures() -> Iterator[None]:
    """Turn an error of ours into a failure of the step that says the same; only a passing one is retried."""
    try:
        yield
    except StreamForgeError as error:
        raise _failure([error]) from None


@contextmanager
def others_first(what: str, failed: list[StreamForgeError], log: logging.Logger) -> Iterator[None]:
    """Put off an error of ours, or of a table's storage, until the others were done: `fail_of` raises it then."""
    try:
        yield
    except StreamForgeError as error:
        log.error("%s: %s", what, error)  # noqa: TRY400 - its message is for a person
        failed.append(error)
    except CATALOG_ERRORS as error:
        text = f"{what} cannot be read or written: {type(error).__name__}: {error}. Mend the storage and run it again"
        log.error(text)  # noqa: TRY400
        failed.append(CommitError(text))


def fail_of(failed: Sequence[StreamForgeError]) -> None:
    """Fail the step for all that failed, if any; it is retried where one of them may pass."""
    if failed:
        raise _failure(failed)


def _failure(errors: Sequence[StreamForgeError]) -> dg.Failure:
    return dg.Failure(
        description="; ".join(map(str, errors)),
        metadata={"error": ", ".join(dict.fromkeys(type(each).__name__ for each in errors))},
        allow_retries=any(isinstance(each, _WORTH_A_RETRY) for each in errors),
    )
