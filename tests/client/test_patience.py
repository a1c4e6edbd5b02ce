"""The client retries as the server asks, resumes broken calls, and gives up in the end."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

import secateur
from secateur.blocking import BlockingTransport, run
from secateur.calls.connection import Connection
from secateur.calls.patience import TRIES, Patience
from secateur_proto.pruner_pb2_grpc import PrunerStub
from tests.client.both import both
from tests.conftest import eventually
from tests.contract.raw import header, kept_open, message, series
from tests.forked import ForkedProcess
from tests.storage.stored import Kept, kept

# By itself ----------------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each sleep; a thousandth of them is slept."""
    slept: list[float] = []
    sleep = time.sleep

    def short(seconds: float) -> None:
        slept.append(seconds)
        sleep(seconds / 1000)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=short)
    monkeypatch.setattr("secateur.calls.patience.time", clock)
    monkeypatch.setattr("secateur.blocking.time", clock)
    return slept


class Clock:
    """Time that passes in `sleep` alone."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def busy(seconds: float | None) -> secateur.ServerBusy:
    error = secateur.ServerBusy("busy")
    error.retry_after = seconds
    return error


Attempt = Callable[[float | None], Awaitable[object]]


def served(
    attempt: Attempt, patience: Patience, is_known: bool = True, is_safe: bool = True
) -> object:
    """Repeats an attempt as the blocking client repeats calls; no call reaches a server."""
    with grpc.insecure_channel("localhost:1") as channel:
        connection = Connection(BlockingTransport(channel, (), is_own=False))
        connection.is_known = is_known
        return run(connection.until_served(attempt, patience, is_safe))


def failing(*errors: Exception) -> Attempt:
    """An attempt that fails so often, and is then served."""
    left = list(errors)

    async def attempt(seconds: float | None) -> str:
        if left:
            raise left.pop(0)
        return "served"

    return attempt


def test_the_client_retries_after_the_delay_that_the_server_asks_for(pauses: list[float]) -> None:
    attempt = failing(busy(3), busy(0.5), *[busy(2)] * 20)
    assert served(attempt, Patience(None), is_known=False, is_safe=False) == "served"
    assert len(pauses) == 22
    assert 3 <= pauses[0] <= 4.5
    assert 0.5 <= pauses[1] <= 0.75


def test_retries_are_spread_over_time(pauses: list[float]) -> None:
    attempt = failing(*[busy(10)] * 200)
    served(attempt, Patience(None), is_known=False, is_safe=False)
    assert 10 <= min(pauses) < 11
    assert 14 < max(pauses) <= 15
    assert len({round(pause, 2) for pause in pauses}) > 50
    pauses.clear()
    gone = [secateur.Unavailable("gone")] * 3
    for _ in range(200):
        served(failing(*gone), Patience(None))
    pauses[:] = pauses[2::3]
    assert 0.2 <= min(pauses) < 0.25
    assert 0.35 < max(pauses) <= 0.4


def test_a_delay_beyond_the_timeout_is_not_waited_for(pauses: list[float]) -> None:
    with pytest.raises(secateur.ServerBusy) as error:
        served(failing(busy(2)), Patience(2))
    assert error.value.retry_after == 2
    assert pauses == []


def test_without_a_delay_from_the_server_there_is_no_retry(pauses: list[float]) -> None:
    with pytest.raises(secateur.ServerBusy):
        served(failing(busy(None)), Patience(None))
    assert pauses == []


def test_an_attempt_has_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("secateur.calls.patience.time", clock)
    monkeypatch.setattr("secateur.blocking.time", clock)
    left: list[float | None] = []

    async def attempt(seconds: float | None) -> None:
        left.append(seconds)
        if len(left) < 3:
            raise busy(0.05)

    served(attempt, Patience(1), is_known=False, is_safe=False)
    first, second, third = (seconds or 0 for seconds in left)
    assert first == 1
    assert first - 0.05 >= second
    assert second - 0.05 >= third > 0
    assert Patience(None).left() is None
    assert Patience(-1).left() == 0


def test_a_connection_that_breaks_is_tried_again_with_longer_pauses(pauses: list[float]) -> None:
    broken = [secateur.Unavailable("gone")] * (TRIES - 1)
    assert served(failing(*broken), Patience(None)) == "served"
    assert len(pauses) == TRIES - 1
    for index, pause in enumerate(pauses):
        most = min(0.1 * 2**index, 5)
        assert most / 2 <= pause <= most
    assert 25 < sum(pauses) < 60  # long enough for a server to restart


def test_a_connection_that_breaks_too_often_is_an_error(pauses: list[float]) -> None:
    last = secateur.Unavailable("last")
    broken = [secateur.Unavailable("gone")] * (TRIES - 1)
    with pytest.raises(secateur.Unavailable, match="last"):
        served(failing(*broken, last), Patience(None))
    assert len(pauses) == TRIES - 1


@pytest.mark.parametrize(("is_known", "is_safe"), [(False, True), (True, False), (False, False)])
def test_unsafe_calls_and_unknown_servers_are_not_retried(
    pauses: list[float], is_known: bool, is_safe: bool
) -> None:
    with pytest.raises(secateur.Unavailable):
        served(failing(secateur.Unavailable("")), Patience(None), is_known, is_safe)
    assert pauses == []


@pytest.mark.parametrize(
    "error",
    [
        secateur.InvalidSpec(""),
        secateur.ModelTooLarge(""),
        secateur.DeadlineExceeded(""),
        secateur.Cancelled(""),
        secateur.Unauthenticated(""),
        secateur.StoreFull(""),
        KeyError("a defect"),
    ],
)
def test_lasting_errors_are_raised_at_once(pauses: list[float], error: Exception) -> None:
    with pytest.raises(type(error)):
        served(failing(error), Patience(None))
    assert pauses == []


# With servers -------------------------------------------------------------------------------------

MODEL = {"w": np.arange(1, 101, dtype=np.float32)}
HALF = secateur.l1_unstructured("w", 0.5)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


class Restarted:
    """A server at one address, which is killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.address = free_address()
        self._folder = folder
        self._process: ForkedProcess | None = None

    def start(self) -> None:
        options = ["--address", self.address, "--metrics-address", ""]
        log = Path(os.devnull)
        self._process = ForkedProcess([*options, "--store-dir", str(self._folder)], log)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[Restarted]:
    server = Restarted(tmp_path)
    yield server
    server.kill()


@both
def test_calls_survive_a_restart_of_the_server(
    restarted: Restarted, kind: type[secateur.Client]
) -> None:
    large = {"w": np.random.default_rng(0).standard_normal(1 << 20, np.float32)}
    done = {"small": 0, "large": 0}
    ended = threading.Event()

    def loop(client: secateur.Client, kind: str) -> None:
        while not ended.is_set():
            if kind == "small":
                assert client.prune(MODEL, HALF).report.zeros == 50
            else:
                assert client.prune(large, HALF, output="dense").report.zeros == 1 << 19
            done[kind] += 1

    restarted.start()
    with kind(restarted.address, timeout=300) as client, ThreadPoolExecutor() as pool:
        client.wait_until_ready()
        client.prune(MODEL, HALF)
        loops = [pool.submit(loop, client, kind) for kind in done]
        try:
            eventually(lambda: all(count > 1 for count in done.values()), True)
            restarted.kill()
            before = dict(done)
            restarted.start()
            eventually(lambda: all(done[kind] > before[kind] + 1 for kind in done), True)
        finally:
            ended.set()
        for running in loops:
            running.result()


@both
def test_wait_until_ready_finds_a_server_that_starts_later(
    restarted: Restarted, kind: type[secateur.Client]
) -> None:
    with kind(restarted.address, timeout=300) as client:
        threading.Timer(0.5, restarted.start).start()
        client.wait_until_ready(60)
        assert client.prune(MODEL, HALF).report.zeros == 50


def test_a_server_that_never_answered_is_an_error_at_once(pauses: list[float]) -> None:
    with secateur.Client(free_address(), timeout=300) as client:
        for call in (
            lambda: client.prune(MODEL, HALF),
            lambda: client.report(MODEL),
            lambda: client.upload(MODEL),
            lambda: client.checkpoint("checkpoints/x"),
        ):
            with pytest.raises(secateur.Unavailable):
                call()
        assert pauses == []
        begun = time.monotonic()
        with pytest.raises(secateur.Unavailable, match=r"no server answers after 0\.3 seconds"):
            client.wait_until_ready(0.3)
        assert time.monotonic() - begun >= 0.3


class Line:
    """Carries bytes to and from a server, and can drop those of each direction.

    up, down: Whether bytes to the server, and from it, are carried.
    """

    def __init__(self, target: str) -> None:
        self.up = self.down = True
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                caller, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._ends += [caller, server]
                for ends in ((caller, server, "up"), (server, caller, "down")):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if getattr(self, way):
                    target.sendall(data)
            if getattr(self, way):  # the other side does not see the end either
                target.shutdown(socket.SHUT_WR)

    def refuse(self) -> None:
        """Takes no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut(self) -> None:
        """Breaks all connections; new ones work."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.up = self.down = True


@contextlib.contextmanager
def line_to(address: str) -> Iterator[Line]:
    line = Line(address)
    try:
        yield line
    finally:
        line.refuse()
        line.cut()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with kept(tmp_path_factory.mktemp("patience")) as running:
        yield running


def prunes_served(store: Kept) -> float:
    return series(store.server, "grpc_server_handled_total", grpc_method="Prune", grpc_code="OK")


@both
def test_a_lost_answer_does_not_keep_a_result_twice(
    store: Kept, kind: type[secateur.Client]
) -> None:
    """Only the server knows that the call succeeded."""
    uploaded = store.client.upload(MODEL)
    before = len(list(store.client.checkpoints()))
    with (
        line_to(store.server.address) as line,
        kind(line.address, timeout=300) as client,
        ThreadPoolExecutor() as pool,
    ):
        assert client.report(uploaded).total == 100  # the server is known
        line.down = False
        answer = pool.submit(client.prune, uploaded, HALF, keep=True)
        eventually(lambda: len(list(store.client.checkpoints())), before + 1)
        line.cut()
        with pytest.raises(secateur.Unavailable):
            answer.result()
    eventually(lambda: series(store.server, "secateur_requests_in_flight"), 0.0)
    assert len(list(store.client.checkpoints())) == before + 1


@both
@pytest.mark.parametrize("output", ["masks", "dense"])
def test_calls_that_change_nothing_are_repeated_after_a_lost_answer(
    store: Kept, output: Any, kind: type[secateur.Client]
) -> None:
    with (
        line_to(store.server.address) as line,
        kind(line.address, timeout=300) as client,
        ThreadPoolExecutor() as pool,
    ):
        client.report(MODEL)
        line.down, before = False, prunes_served(store)
        answer = pool.submit(client.prune, MODEL, HALF, output)
        eventually(lambda: prunes_served(store), before + 1)
        line.cut()
        assert answer.result().report.zeros == 50
        assert prunes_served(store) == before + 2


# A whole minute: of keepalive, which asks after 30 s, and waits for 20 s.
SILENT_SECONDS = 50


@pytest.mark.slow
def test_a_silent_server_is_detected(store: Kept) -> None:
    with line_to(store.server.address) as line, secateur.Client(line.address) as client:
        client.wait_until_ready()
        line.up = line.down = False
        begun = time.monotonic()
        threading.Timer(5, line.refuse).start()
        with pytest.raises(secateur.Unavailable):
            client.report(MODEL)
        took = time.monotonic() - begun
    print(f"a silent server was noticed after {took:.1f} s")
    assert SILENT_SECONDS - 25 < took < SILENT_SECONDS + 10


@pytest.mark.slow
def test_a_silent_caller_is_detected_and_holds_nothing(store: Kept) -> None:
    """Its connection is never closed."""
    size = 1 << 20
    own = [("grpc.use_local_subchannel_pool", 1)]
    with line_to(store.server.address) as line, grpc.insecure_channel(line.address, own) as channel:
        first = message("Prune", header=header("Prune", size), data=b"\x10")
        with kept_open([first]) as messages:
            call = PrunerStub(channel).Prune(messages, timeout=600)
            eventually(lambda: series(store.server, "secateur_model_bytes"), float(size))
            line.up = line.down = False
            begun = time.monotonic()
            # The idle timeout, of 60 s, is not what ends it.
            eventually(lambda: series(store.server, "secateur_model_bytes"), 0.0)
            took = time.monotonic() - begun
            call.cancel()
    print(f"a silent caller was noticed after {took:.1f} s")
    assert took > SILENT_SECONDS - 25
    eventually(lambda: series(store.server, "secateur_requests_in_flight"), 0.0)
    assert series(store.server, "secateur_rejected_requests_total", reason="IDLE_TIMEOUT") == 0
