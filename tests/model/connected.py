"""The real code, connected to the model for as long as a search takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.model import clients, seams, writers


@contextmanager
def connected() -> Iterator[pytest.MonkeyPatch]:
    """Connect catalog, writer and clients, and return the patch, on top of which a bug can be planted."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (seams, writers, clients):
            module.connect(patch)
        yield patch
