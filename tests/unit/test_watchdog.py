"""The watchdog ends a process whose call does not return, and no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from streaming.watchdog import Watchdog
from tests.waiting import wait_until

LOOK_S = 0.01


class Ends:
    """Notes the exit codes that the process would have ended with."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.ended = threading.Event()

    def __call__(self, code: int) -> None:  # noqa: D102
        self.codes.append(code)
        self.ended.set()


@pytest.fixture
def ends() -> Ends:
    return Ends()


@pytest.fixture
def watchdog(ends: Ends) -> Iterator[Watchdog]:
    watchdog = Watchdog(end=ends, look_s=LOOK_S)
    yield watchdog
    watchdog.close()


def test_call_that_does_not_return_ends_the_process(watchdog: Watchdog, ends: Ends) -> None:
    with watchdog.over("send_offsets_to_transaction", 0.0):
        wait_until(ends.ended.is_set, what="the process ends")
    assert ends.codes == [1]


def test_calls_that_return_end_nothing(watchdog: Watchdog, ends: Ends) -> None:
    looks = threading.Event()
    for _ in range(5):
        with watchdog.over("commit_transaction", 60.0):
            looks.wait(2 * LOOK_S)
        looks.wait(2 * LOOK_S)
    assert not ends.codes


def test_call_that_fails_is_not_watched_any_longer(watchdog: Watchdog, ends: Ends) -> None:
    with pytest.raises(ValueError, match="no"), watchdog.over("init_transactions", 0.0):
        raise ValueError("no")
    assert not ends.ended.wait(10 * LOOK_S)
