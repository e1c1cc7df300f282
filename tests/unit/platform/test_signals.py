"""Stop signals: one exception, never in the middle of a start, never in the cleanup."""

from __future__ import annotations

import os
import signal

import pytest

from streamforge.platform.signals import StopRequested, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_raises_and_later_ones_do_not(number: signal.Signals) -> None:
    with StopSignals():
        with pytest.raises(StopRequested, match=number.name):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)


def test_signal_in_a_deferred_block_raises_at_its_end() -> None:
    steps: list[str] = []
    with StopSignals() as signals:
        with pytest.raises(StopRequested):
            _start_something(signals, steps)
        assert steps == ["written down"]


def test_signal_in_the_cleanup_is_ignored_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def _start_something(signals: StopSignals, steps: list[str]) -> None:
    with signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        steps.append("written down")
