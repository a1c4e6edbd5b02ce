"""The memory of a server: the model, its packed masks, and little more."""

import threading

import pytest
import torch

import secateur
from secateur_server.runtime import memory as runtime_memory
from tests.conftest import start_server, stop_server
from tests.processes import memory


def test_a_prune_needs_the_model_and_a_seventh_of_it() -> None:
    """With one tensor, so that no other buffer may be as large as a tensor."""
    weights = torch.randn(50_000_000, generator=torch.Generator().manual_seed(0))
    server = start_server()
    try:
        with secateur.Client(server.address, timeout=300) as client:
            spec = secateur.l1_unstructured("w", 0.5)
            client.prune({"w": weights[:5_000_000]}, spec)  # loads libraries, compiles kernels
            before = memory(server.process.pid, "VmRSS")
            report = client.prune({"w": weights}, spec, progress=False).report
        assert report.zeros == 25_000_000
        grown = memory(server.process.pid, "VmHWM") - before
        assert grown < 1.15 * weights.nbytes + (32 << 20)  # for messages in gRPC
    finally:
        stop_server(server)


def test_threads_keep_no_memory_of_the_calls_that_they_served() -> None:
    """A server has hundreds of threads, and each of them serves calls."""
    weights = torch.randn(250_000, generator=torch.Generator().manual_seed(0))
    specs = [
        secateur.l1_unstructured("w", 0.5),
        secateur.random_unstructured("w", 0.5),
        secateur.lamp("w", 0.5),
    ]
    server = start_server()
    try:
        with secateur.Client(server.address, timeout=300) as client:

            def grown(calls: int) -> int:
                before = memory(server.process.pid, "VmRSS")
                for index in range(calls):
                    client.prune({"w": weights}, specs[index % 3], progress=False)
                return memory(server.process.pid, "VmRSS") - before

            grown(30)
            assert grown(240) < 40 * weights.nbytes  # of 240 calls in as many threads
    finally:
        stop_server(server)


def test_the_thread_that_returns_memory_ends_whenever_it_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also at the moment in which it has just checked whether it is closed."""
    monkeypatch.setattr(runtime_memory, "DELAY_SECONDS", 0.0)
    trimmer = runtime_memory.Trimmer()

    class Closed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            is_closed = super().wait(timeout)
            if not is_closed:
                self.set()
                trimmer._has_ended.set()
            return is_closed

    trimmer._is_closed = Closed()
    trimmer.request_ended()
    trimmer._thread.join(60)
    assert not trimmer._thread.is_alive()
