"""A method has one deadline, however many calls to the server it makes."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

import secateur
from tests.client.test_busy import CALLS, HALF, Call, Given
from tests.client.test_busy import given as given
from tests.client.test_busy import server as server
from tests.conftest import PATIENCE, RunningServer

TIMEOUT = 1000.0


class Line(
    grpc.UnaryUnaryClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """A slow line, on which each call costs `cost` seconds of a clock that else stands still.

    Attributes:
        calls: Each call's method, and when by the clock it is to have ended.
    """

    def __init__(self, cost: float) -> None:
        self.now, self.cost = 0.0, cost
        self.calls: list[tuple[str, float]] = []

    def monotonic(self) -> float:
        return self.now

    def _pass(self, call: Callable[..., Any], details: Any, request: Any) -> Any:
        self.calls.append((details.method.rpartition("/")[2], self.now + details.timeout))
        self.now += self.cost
        return call(details, request)

    of_any: Any = _pass
    intercept_unary_unary = intercept_stream_unary = of_any
    intercept_unary_stream = intercept_stream_stream = of_any


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    made = Line(cost=10.0)
    clock = SimpleNamespace(monotonic=made.monotonic, sleep=lambda seconds: None)
    monkeypatch.setattr("secateur.calls.patience.time", clock)
    monkeypatch.setattr("secateur.blocking.time", clock)
    return made


@pytest.fixture
def client(server: RunningServer, line: Line) -> Iterator[secateur.Client]:
    with grpc.insecure_channel(server.address) as channel:
        slow = grpc.intercept_channel(channel, line)
        yield secateur.Client(channel=slow, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def square(server: RunningServer) -> secateur.Checkpoint:
    with secateur.Client(server.address, timeout=PATIENCE) as other:
        return other.upload({"w": np.ones((4, 4), np.float32)})


# All but "delete", since each deletion needs a checkpoint of its own.
METHODS: dict[str, Call] = {
    **{name: call for name, (_, call) in CALLS.items() if name != "delete"},
    "prune a file, keep": lambda client, given: client.prune(given.file, HALF, keep=True),
}


@pytest.mark.parametrize("method", METHODS)
def test_all_calls_of_a_method_have_one_deadline(
    client: secateur.Client, line: Line, given: Given, method: str
) -> None:
    METHODS[method](client, given)
    assert {end for _, end in line.calls} == {TIMEOUT}, line.calls


def test_a_sensitivity_that_asks_for_the_names_first_has_one_deadline(
    client: secateur.Client, line: Line, square: secateur.Checkpoint
) -> None:
    client.sensitivity(square)
    assert line.calls == [("Report", TIMEOUT), ("Plan", TIMEOUT)]


def test_a_kept_prune_that_is_late_leaves_nothing_on_the_server(
    client: secateur.Client, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its upload took all of the time: a moment more is for its removal."""
    monkeypatch.setattr("secateur.calls.pruning.TIDY_SECONDS", PATIENCE)  # the machine may be busy
    before = list(client.checkpoints())
    line.calls.clear()
    line.now, line.cost = 0.0, 0.5 * TIMEOUT
    with pytest.raises(secateur.DeadlineExceeded):
        client.prune({"w": np.arange(50, dtype=np.float32)}, HALF, keep=True)
    assert line.calls == [
        *(("QueryUpload", TIMEOUT), ("Upload", TIMEOUT), ("Prune", TIMEOUT)),
        ("Delete", 1.5 * TIMEOUT + PATIENCE),
    ]
    assert list(client.checkpoints()) == before
