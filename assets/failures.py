"""How an error of ours ends a step: with its message, for the person who looks at the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from streamforge.errors import CommitConflictError, CommitUnknownError, RetryableSourceError, StreamForgeError

_WORTH_A_RETRY = (RetryableSourceError, CommitConflictError, CommitUnknownError)


@contextmanager
def clear_failures() -> Iterator[None]:
    """Turn an error of ours into a failure of the step that says the same; only a passing one is retried."""
    try:
        yield
    except StreamForgeError as error:
        raise dg.Failure(
            description=str(error),
            metadata={"error": type(error).__name__},
            allow_retries=isinstance(error, _WORTH_A_RETRY),
        ) from None
