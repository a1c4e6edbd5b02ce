"""A server for one test, whose metrics begin at zero and whose log has only its own calls."""

from collections.abc import Iterator

import pytest

from tests.conftest import RunningServer, start_server, stop_server


@pytest.fixture
def own_server() -> Iterator[RunningServer]:
    running = start_server()
    yield running
    if running.log.exists():  # a test that wants the log has stopped it
        stop_server(running)
