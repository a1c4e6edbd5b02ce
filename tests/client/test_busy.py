"""Every method of the client at a server that has no place for its call, or no memory."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.numpy

import secateur
from secateur.aio.transport import AsyncTransport
from secateur.calls.patience import MOST_RESENDS
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.errors import OutOfMemory
from secateur_server.operate.authentication import Authenticator
from tests.client.both import both
from tests.conftest import PATIENCE, RunningServer, eventually, inner_server
from tests.contract.raw import header, message, series

MODEL = {"w": np.arange(1, 101, dtype=np.float32)}
LARGE = {"w": np.ones(1 << 19, np.float32)}
HALF = secateur.l1_unstructured("w", 0.5)


@dataclass(frozen=True)
class Given:
    """Sources of calls.  file: a model that the server may open."""

    file: Path
    stored: secateur.Checkpoint
    unwanted: secateur.Checkpoint

    @property
    def target(self) -> Path:
        return self.file.with_name("downloaded.safetensors")


Call = Callable[[secateur.Client, Given], object]
# Each with the method of the service that it calls first.
CALLS: dict[str, tuple[str, Call]] = {
    "prune": ("Prune", lambda client, given: client.prune(MODEL, HALF)),
    "prune large": ("Prune", lambda client, given: client.prune(LARGE, HALF, "dense")),
    "prune stored": ("Prune", lambda client, given: client.prune(given.stored, HALF, keep=True)),
    "prune, keep": ("QueryUpload", lambda client, given: client.prune(MODEL, HALF, keep=True)),
    "report": ("Report", lambda client, given: client.report(MODEL)),
    "plan": ("Plan", lambda client, given: client.plan(MODEL, HALF)),
    "sensitivity": ("Plan", lambda client, given: client.sensitivity(MODEL, "w")),
    "finalize": ("Finalize", lambda client, given: client.finalize(MODEL)),
    "upload": ("QueryUpload", lambda client, given: client.upload(MODEL)),
    "upload URI": ("Upload", lambda client, given: client.upload(f"file://{given.file}")),
    "download": ("Download", lambda client, given: client.download(given.stored, given.target)),
    "checkpoint": ("Get", lambda client, given: client.checkpoint(given.stored.name)),
    "checkpoints": ("List", lambda client, given: list(client.checkpoints())),
    "server info": ("GetServerInfo", lambda client, given: client.server_info()),
    "delete": ("Delete", lambda client, given: client.delete(given.unwanted)),
}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = time.sleep
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: sleep(seconds / 10))
    monkeypatch.setattr("secateur.calls.patience.time", clock)
    monkeypatch.setattr("secateur.blocking.time", clock)
    wait = asyncio.sleep

    async def short(self: AsyncTransport, seconds: float) -> None:
        await wait(seconds / 10)

    monkeypatch.setattr(AsyncTransport, "sleep", short)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server that takes 65 calls at once."""
    with inner_server("--queue-size", "1", "--allow-path", "/") as running:
        yield running


@pytest.fixture(scope="module")
def given(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Given:
    file = tmp_path_factory.mktemp("busy") / "model.safetensors"
    safetensors.numpy.save_file(MODEL, file)
    with secateur.Client(server.address, timeout=PATIENCE) as client:
        return Given(file, client.upload(MODEL), client.upload(LARGE))


@contextmanager
def all_places_taken(server: RunningServer) -> Iterator[None]:
    """Silent calls hold all places of the server during the block."""
    ended = threading.Event()

    def messages() -> Iterator[Any]:
        yield message("Report", header=header("Report", 1000), data=b"\x10")
        ended.wait(PATIENCE)

    with grpc.insecure_channel(server.address) as channel:
        stub = PrunerStub(channel)
        calls = [stub.Report.future(messages(), timeout=PATIENCE) for _ in range(66)]
        try:
            eventually(lambda: any(call.done() for call in calls), True)
            yield
        finally:
            ended.set()
            for call in calls:
                call.cancel()


def refused(server: RunningServer, method: str) -> float:
    labels = {"grpc_method": method, "grpc_code": "ResourceExhausted"}
    return series(server, "grpc_server_handled_total", **labels)


@both
def test_every_method_is_served_when_a_place_is_free_again(
    server: RunningServer, given: Given, kind: type[secateur.Client]
) -> None:
    with secateur.Client(server.address, timeout=PATIENCE) as other:
        given = replace(given, unwanted=other.upload(LARGE))  # each test deletes one
    methods = {method for method, _ in CALLS.values()}
    before = {method: refused(server, method) for method in methods}
    with (
        kind(server.address, timeout=PATIENCE) as client,
        ThreadPoolExecutor(len(CALLS)) as pool,
    ):
        with all_places_taken(server):
            running = [pool.submit(call, client, given) for _, call in CALLS.values()]
            eventually(lambda: all(refused(server, m) > before[m] for m in methods), True)
            assert [call.exception() for call in running if call.done()] == []
        for call in running:
            call.result(PATIENCE)


@pytest.fixture(params=[None, 0.0625])
def delay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """Every call to the server finds no memory. Returns the delay that callers are told."""

    def fail(self: Authenticator, metadata: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(OutOfMemory, "retry_after", request.param)
    monkeypatch.setattr(Authenticator, "authenticate", fail)
    told: float | None = request.param
    return told


@both
@pytest.mark.parametrize("name", CALLS)
def test_resends_to_a_server_without_memory_end(
    server: RunningServer, given: Given, delay: float | None, name: str, kind: type[secateur.Client]
) -> None:
    method, call = CALLS[name]
    before = refused(server, method)
    with (
        kind(server.address) as client,
        pytest.raises(secateur.ServerBusy, match="out of memory") as error,
    ):
        call(client, given)
    assert (error.value.reason, error.value.retry_after) == ("OUT_OF_MEMORY", delay)
    assert refused(server, method) - before == (1 if delay is None else 1 + MOST_RESENDS)
