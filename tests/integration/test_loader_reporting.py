"""What a loader says at its ends: the exit code that it really has, and that it does not begin without its orders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streamforge.contracts import Contracts
from streamforge.errors import ConfigurationError, RetryableSourceError, StreamForgeError
from streamforge.events import EventKind, ProcessState
from streamforge.settings import Settings
from streamforge.supervision import read_process_states
from streaming.loaders.base import LoaderSettings
from streaming.loaders.reporting import Reporter
from streaming.loaders.sink import RawSink
from tests.conftest import MakeTopics
from tests.loader_support import LOADER_CONTRACTS

pytestmark = pytest.mark.integration


@pytest.fixture
def contracts(make_topics: MakeTopics) -> Contracts:
    return make_topics(*LOADER_CONTRACTS)


@pytest.fixture
def reporter(platform: Settings, contracts: Contracts) -> Iterator[Reporter]:
    known = platform.model_dump(include={"home", "topic_prefix", "bootstrap_servers"})
    settings = LoaderSettings(_env_file=None, **known)  # type: ignore[call-arg]
    sink = RawSink(settings, contracts, "SIM", {"raw-trades"})
    yield Reporter(settings, contracts, sink, slot="0", metrics_port=None)
    sink.stop()


@pytest.mark.parametrize(
    ("failure", "exit_code"),
    [(ConfigurationError("a setting is wrong"), 2), (RetryableSourceError("the broker is away"), 1), (OSError(), 1)],
)
def test_error_event_has_the_exit_code_that_the_process_ends_with(
    platform: Settings, contracts: Contracts, reporter: Reporter, failure: Exception, exit_code: int
) -> None:
    reporter.open()
    reporter.close(failure, 0)
    [event] = read_process_states(platform, contracts).values()
    assert (event.event, event.state, event.exit_code) == (EventKind.ERROR, ProcessState.FAILED, exit_code)
    assert event.detail == str(failure)


def test_loader_that_cannot_learn_whether_it_is_paused_does_not_begin(reporter: Reporter) -> None:
    with pytest.raises(StreamForgeError, match="queue-control was not read to its end within 0 s") as caught:
        reporter.open(control_timeout_s=0)
    assert caught.value.exit_code == 1
    reporter.close(caught.value, 0)
