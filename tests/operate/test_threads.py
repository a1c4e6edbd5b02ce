"""A server that gets no more threads or files from the system: real limits, set while it runs."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import grpc._server
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import secateur
from secateur_proto import pruner_pb2, pruner_pb2_grpc
from secateur_server.__main__ import DEAD_STATUS
from secateur_server.app import App
from secateur_server.config import read_config
from secateur_server.operate.metrics_server import MAX_CONNECTIONS
from tests.conftest import (
    PATIENCE,
    RunningServer,
    eventually,
    inner_server,
    start_command,
    stop_server,
)
from tests.contract.raw import series
from tests.operate.test_metrics import sample

PIDS = Path("/sys/fs/cgroup/pids")
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
IS_ROOT = os.geteuid() == 0
needs_a_limit = pytest.mark.skipif(
    IS_ROOT and not os.access(PIDS / "cgroup.procs", os.W_OK),
    reason="root has no limit of threads here but that of a control group, version 1",
)


@contextmanager
def control_group() -> Iterator[Path]:
    group = PIDS / f"secateur-{uuid.uuid4().hex}"
    group.mkdir()
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (PIDS / "cgroup.procs").write_text(pid)
        group.rmdir()


@contextmanager
def no_more_threads(pid: int) -> Iterator[None]:
    """In the block the system refuses each thread that the process starts."""
    if not IS_ROOT:
        before = resource.prlimit(pid, resource.RLIMIT_NPROC, (1, -1))
        yield
        resource.prlimit(pid, resource.RLIMIT_NPROC, before)
        return
    with control_group() as group:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield


def threads_of(server: RunningServer) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


def is_serving(server: RunningServer) -> bool:
    """Of a new connection."""
    with grpc.insecure_channel(server.address, OWN_CONNECTION) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def silent_sockets(address: str, count: int) -> Iterator[None]:
    """Connections, some of which may still wait for a server that accepts no more."""
    host, _, port = address.rpartition(":")
    with ExitStack() as opened:
        for _ in range(count):
            connection = opened.enter_context(socket.socket())
            connection.setblocking(False)
            assert connection.connect_ex((host, int(port))) in (0, errno.EINPROGRESS)
        yield


@contextmanager
def silent_calls(address: str, count: int) -> Iterator[None]:
    """Some of them the server refuses."""
    over = threading.Event()

    def nothing() -> Iterator[pruner_pb2.ReportRequest]:
        over.wait()
        yield from ()

    with ExitStack() as opened:
        channels = [
            opened.enter_context(grpc.insecure_channel(address, OWN_CONNECTION))
            for _ in range(count // 20)
        ]
        opened.callback(over.set)
        stubs = [pruner_pb2_grpc.PrunerStub(channel) for channel in channels]
        calls = [stub.Report.future(nothing()) for stub in stubs for _ in range(20)]
        yield
        del calls


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    """A server for the tests that starve one; the last of them ends it."""
    started = start_command()
    yield started
    if started.process.poll() is None:
        stop_server(started)


def refused(server: RunningServer) -> float:
    return series(server, "secateur_rejected_requests_total", reason="QUEUE_FULL")


def is_scraped(server: RunningServer) -> bool:
    """Whether one scrape is answered. On a busy machine its request may come after its grace."""
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer:
            return bool(answer.status == 200)
    except ConnectionError:
        return False


def cpu_seconds(server: RunningServer) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def few_files(server: RunningServer, more: int) -> Iterator[None]:
    """In the block the process may open so many files more."""
    pid = server.process.pid
    now = len(os.listdir(f"/proc/{pid}/fd"))
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (now + more, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_scrapers_take_no_descriptors_from_grpc(
    running: RunningServer,
) -> None:
    with few_files(running, MAX_CONNECTIONS + 8):
        with silent_sockets(running.metrics_address, 100):
            assert is_serving(running)
        with silent_sockets(running.address, 100), silent_sockets(running.metrics_address, 100):
            begun = cpu_seconds(running)
            threading.Event().wait(1)
            assert cpu_seconds(running) - begun < 0.3  # a loop that spins takes all of it
    assert is_serving(running)
    assert sample(running, "secateur_requests_in_flight") == 0


@needs_a_limit
def test_a_server_serves_and_ends_without_a_new_thread(running: RunningServer) -> None:
    before = threads_of(running)
    large = {"w": np.random.default_rng(0).standard_normal((1500, 1500), np.float32)}
    with no_more_threads(running.process.pid):
        assert all(is_serving(running) for _ in range(4))
        with silent_sockets(running.metrics_address, 400):
            with silent_calls(running.address, 200):
                eventually(lambda: refused(running) >= 72, True)  # all above 128
                assert is_serving(running)
            with secateur.Client(running.address, timeout=PATIENCE) as client:
                report = client.prune(large, secateur.l1_unstructured("w", 0.5)).report
            assert report.zeros == 1500 * 750
        assert threads_of(running) <= before
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
    assert "Traceback" not in running.log.read_text()


@needs_a_limit
def test_server_reports_too_few_threads_at_its_start() -> None:
    command = [sys.executable, "-m", "secateur_server", "--address", "127.0.0.1:0"]
    command += ["--metrics-address", ""]
    with ExitStack() as opened:
        limit = 'ulimit -u 300; exec "$@"'
        if IS_ROOT:
            group = opened.enter_context(control_group())
            (group / "pids.max").write_text("100")
            limit = f'echo $$ >{group}/cgroup.procs; exec "$@"'
        shell = ["sh", "-c", limit, "sh", *command]
        ended = subprocess.run(shell, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    assert ended.stderr.endswith(
        "secateur-server: the system refuses to start more threads: raise its limit (TasksMax= of "
        "systemd, pids.max of the control group, ulimit -u), or lower --queue-size\n"
    )


def test_silent_scrapers_have_a_limited_number_of_connections() -> None:
    """Each new connection replaces the oldest one, and a scraper is answered."""
    with inner_server() as running:
        before = len(os.listdir("/proc/self/fd"))
        with silent_sockets(running.metrics_address, 200):
            eventually(lambda: is_scraped(running), True)
            eventually(
                lambda: len(os.listdir("/proc/self/fd")) - before - 200 <= MAX_CONNECTIONS, True
            )


_DYING = """
import time, runpy, grpc._server
def _serve(state):
    time.sleep(0.5)
    raise MemoryError
grpc._server._serve = _serve
runpy.run_module("secateur_server", run_name="__main__")
"""


def test_process_exits_when_its_serving_loop_ends() -> None:
    command = [sys.executable, "-c", _DYING, "--address", "127.0.0.1:0", "--metrics-address", ""]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == DEAD_STATUS
    assert "gRPC's serving loop has ended: the server cannot answer calls any more" in ended.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_embedded_server_whose_serving_loop_ends_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over, died = threading.Event(), threading.Event()

    def _serve(state: object) -> None:  # the name by which the loop is found
        over.wait()
        raise MemoryError

    monkeypatch.setattr(grpc._server, "_serve", _serve)
    options = ["--address", "127.0.0.1:0", "--metrics-address", "", "--drain-timeout", "0.01"]
    app = App(read_config(options, {}), is_warm=False, died=died.set)
    over.set()
    assert died.wait(PATIENCE)
    app.stop()
