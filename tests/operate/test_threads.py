"""A server without further threads or files: real limits of the system, set while it runs."""

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
from secateur_proto import pruner_pb2_grpc
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
from tests.contract.raw import OWN_CONNECTION, open_streams, series
from tests.operate.test_metrics import sample
from tests.processes import cpu_seconds, open_files, thread_ids

PIDS = Path("/sys/fs/cgroup/pids")
IS_ROOT = os.geteuid() == 0
needs_a_limit = pytest.mark.skipif(
    IS_ROOT and not os.access(PIDS / "cgroup.procs", os.W_OK),
    reason="for root only a control group of version 1 limits threads",
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
    """In the block the process cannot start threads."""
    if not IS_ROOT:
        before = resource.prlimit(pid, resource.RLIMIT_NPROC, (1, -1))
        yield
        resource.prlimit(pid, resource.RLIMIT_NPROC, before)
        return
    with control_group() as group:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield


def is_serving(server: RunningServer) -> bool:
    """Whether the server answers a health check over a new connection."""
    with grpc.insecure_channel(server.address, [OWN_CONNECTION]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def silent_sockets(address: str, count: int) -> Iterator[None]:
    """Opens connections, some of which the server may not accept."""
    host, _, port = address.rpartition(":")
    with ExitStack() as opened:
        for _ in range(count):
            connection = opened.enter_context(socket.socket())
            connection.setblocking(False)
            assert connection.connect_ex((host, int(port))) in (0, errno.EINPROGRESS)
        yield


@contextmanager
def silent_calls(address: str, count: int) -> Iterator[None]:
    """Makes calls that send nothing. The server refuses some of them."""
    with ExitStack() as opened:
        channels = [
            opened.enter_context(grpc.insecure_channel(address, [OWN_CONNECTION]))
            for _ in range(count // 20)
        ]
        silent = opened.enter_context(open_streams())
        stubs = [pruner_pb2_grpc.PrunerStub(channel) for channel in channels]
        calls = [stub.Report.future(silent()) for stub in stubs for _ in range(20)]
        yield
        del calls


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    """A server that tests deprive of threads and files. The last of them stops it."""
    started = start_command()
    yield started
    if started.process.poll() is None:
        stop_server(started)


def refused(server: RunningServer) -> float:
    return series(server, "secateur_rejected_requests_total", reason="QUEUE_FULL")


def is_scraped(server: RunningServer) -> bool:
    """Whether a scrape is answered. On a busy machine the server may close the connection first."""
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer:
            return bool(answer.status == 200)
    except ConnectionError:
        return False


@contextmanager
def few_files(server: RunningServer, more: int) -> Iterator[None]:
    """In the block the process may open only `more` further files."""
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files(pid) + more, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_scrapers_take_no_descriptors_from_grpc(
    running: RunningServer,
) -> None:
    with few_files(running, MAX_CONNECTIONS + 8):
        with silent_sockets(running.metrics_address, 100):
            assert is_serving(running)
        with silent_sockets(running.address, 100), silent_sockets(running.metrics_address, 100):
            begin = cpu_seconds(running.process.pid)
            threading.Event().wait(1)
            # A busy loop would use all of the second.
            assert cpu_seconds(running.process.pid) - begin < 0.3
    assert is_serving(running)
    assert sample(running, "secateur_requests_in_flight") == 0


@needs_a_limit
def test_a_server_serves_and_ends_without_a_new_thread(running: RunningServer) -> None:
    before = len(thread_ids(running.process.pid))
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
        assert len(thread_ids(running.process.pid)) <= before
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
        before = open_files(os.getpid())
        with silent_sockets(running.metrics_address, 200):
            eventually(lambda: is_scraped(running), True)
            eventually(lambda: open_files(os.getpid()) - before - 200 <= MAX_CONNECTIONS, True)


_DYING = """
import time, runpy, grpc._server, secateur_server.app
def _serve(state):
    time.sleep(0.5)
    raise MemoryError
grpc._server._serve = _serve
secateur_server.app.warm_up = lambda *arguments: None
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
