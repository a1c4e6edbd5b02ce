"""Start, health, reflection and shutdown of a real server."""

import ctypes
import platform
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import Mock

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import secateur
from secateur_proto import pruner_pb2, pruner_pb2_grpc
from secateur_proto.framing import file_header
from secateur_server.app import App
from secateur_server.config import read_config
from secateur_server.operate.health import Health
from secateur_server.startup import CannotStart
from tests.conftest import (
    RunningServer,
    eventually,
    inner_server,
    run_server,
    start_server,
    stop_server,
)
from tests.contract.raw import (
    OWN_CONNECTION,
    Failure,
    check_failed,
    entry,
    failure,
    file,
    header,
    message,
    series,
)
from tests.operate.test_metrics import sample
from tests.processes import thread_ids
from tests.storage.proxy import proxy

SERVICE = "secateur.v1.Pruner"
MIB = 1 << 20


@pytest.mark.parametrize("service", ["", SERVICE, "secateur.v1.Checkpoints", "liveness"])
def test_health_is_serving(channel: grpc.Channel, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=300)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_shows_the_service_and_its_messages(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert SERVICE in database.get_services()
    file = database.FindFileContainingSymbol(SERVICE)
    assert [method.name for method in file.service[0].method] == [
        "Prune",
        "Report",
        "Plan",
        "Finalize",
        "GetServerInfo",
    ]


def test_sigterm_finishes_running_requests_and_refuses_new_ones() -> None:
    server = start_server("--drain-timeout", "300")
    file = file_header([("w", "F32", (2,))]) + np.array([0, 1], np.float32).tobytes()
    rest = threading.Event()

    def slow_request() -> Iterator[pruner_pb2.ReportRequest]:
        header = pruner_pb2.ReportHeader(data_bytes=len(file))
        yield pruner_pb2.ReportRequest(header=header, data=file[:20])
        rest.wait()
        yield pruner_pb2.ReportRequest(data=file[20:])

    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        call = pruner_pb2_grpc.PrunerStub(channel).Report.future(slow_request())
        eventually(lambda: running_calls(server), True)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert list(watch) == []  # the server ends a watch, which would delay its own end
        with secateur.Client(server.address) as late:
            eventually(lambda: is_refused(late), True)
        rest.set()
        assert call.result(timeout=300).report.zeros == 1
    stop_server(server)


def test_watcher_is_told_of_a_drain_between_two_answers() -> None:
    health = Health([SERVICE])
    health.serve()
    answers = health.Watch(health_pb2.HealthCheckRequest(), Mock(grpc.ServicerContext))
    assert next(answers).status == health_pb2.HealthCheckResponse.SERVING
    health.drain()
    assert [answer.status for answer in answers] == [health_pb2.HealthCheckResponse.NOT_SERVING]


def test_draining_server_is_alive_and_not_ready() -> None:
    """A liveness probe must not fail during the drain, or an orchestrator would kill the server."""
    server = start_server()
    ended = threading.Event()

    def silent() -> Iterator[pruner_pb2.ReportRequest]:
        ended.wait()
        yield from ()

    with ExitStack() as opened:
        channel = opened.enter_context(grpc.insecure_channel(server.address))
        health = health_pb2_grpc.HealthStub(channel)
        running = pruner_pb2_grpc.PrunerStub(channel).Report.future(silent())
        eventually(lambda: running_calls(server), True)
        liveness = health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
        assert next(liveness).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        rest = [answer.status for answer in liveness]
        assert set(rest) <= {health_pb2.HealthCheckResponse.SERVING}
        for _ in range(3):
            assert asked_anew(server, "liveness") == health_pb2.HealthCheckResponse.SERVING
        assert asked_anew(server, "") == health_pb2.HealthCheckResponse.NOT_SERVING
        for refused in (channel, opened.enter_context(grpc.insecure_channel(server.address))):
            found = failure(pruner_pb2_grpc.PrunerStub(refused).Report, silent(), timeout=300)
            check_failed(found, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        late = opened.enter_context(secateur.Client(server.address, timeout=300))
        with pytest.raises(secateur.Unavailable, match="the server is shutting down") as refusal:
            late.report({"w": np.zeros(1)})
        assert sample(server, "secateur_rejected_requests_total", reason="SHUTTING_DOWN") >= 3
        assert server.process.poll() is None
        ended.set()
        assert running.exception(timeout=300) is not None  # an empty stream is refused
    assert str(refusal.value.request_id) in stop_server(server)


def asked_anew(server: RunningServer, service: str) -> Any:
    """Returns the health of a service, over a new connection."""
    with grpc.insecure_channel(server.address, [OWN_CONNECTION]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(request, timeout=300, wait_for_ready=True).status


def is_refused(client: secateur.Client) -> bool:
    try:
        client.report({"w": np.zeros(1)})
    except secateur.Unavailable:
        return True
    return False


WHY = "call: the server shut down after --drain-timeout, 0.2 seconds; send it again"


def cut_off() -> tuple[Failure | None, BaseException | None]:
    """Makes two calls that outlast the drain timeout. Returns how they end.

    The first one waits for messages. The second one, of a client, waits for memory.
    """
    never = threading.Event()

    def endless_request() -> Iterator[pruner_pb2.ReportRequest]:
        yield pruner_pb2.ReportRequest(header=pruner_pb2.ReportHeader(data_bytes=MIB))
        never.wait()

    with ThreadPoolExecutor() as pool:
        with inner_server("--drain-timeout", "0.2", "--memory-limit", "1MiB") as server:
            channel = grpc.insecure_channel(server.address)
            silent = pruner_pb2_grpc.PrunerStub(channel).Report.future(endless_request())
            eventually(lambda: sample(server, "secateur_model_bytes"), MIB)
            client = secateur.Client(server.address, timeout=300)
            half = secateur.l1_unstructured("w", 0.5)
            queued = pool.submit(client.prune, {"w": np.zeros(1)}, half)
            eventually(lambda: sample(server, "secateur_requests_waiting"), 1)
        found = failure(silent.result, timeout=300), queued.exception(timeout=300)
    never.set()
    client.close()
    channel.close()
    return found


def endings(caplog: pytest.LogCaptureFixture) -> set[tuple[str, str, str]]:
    """Returns code, reason and error of the calls that a server in this process has logged."""
    calls = [record.__dict__["call"] for record in caplog.records if "call" in record.__dict__]
    return {(call["code"], call["reason"], call["error"]) for call in calls}


def test_a_call_that_outlasts_the_drain_timeout_ends_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found, error = cut_off()
    assert found is not None
    assert (found.code.name, found.reason, found.message) == ("UNAVAILABLE", "SHUTTING_DOWN", WHY)
    assert isinstance(error, secateur.Unavailable)
    assert (str(error), error.reason) == (WHY, "SHUTTING_DOWN")
    assert endings(caplog) == {("Unavailable", "SHUTTING_DOWN", WHY)}


def test_call_that_grpc_cancels_at_shutdown_counts_as_cut_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur_server.app.CUT_OFF_SECONDS", 0.05)
    error = cut_off()[1]
    assert isinstance(error, secateur.Unavailable)
    assert "the server shut down" in str(error)
    eventually(lambda: endings(caplog), {("Unavailable", "SHUTTING_DOWN", WHY)})


def test_untaken_answer_at_shutdown_is_logged_as_cut_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC blocks its handler, and delivers no status after data that was not read."""
    monkeypatch.setattr("secateur_server.app.CUT_OFF_SECONDS", 0.1)
    data = file({"w": entry("F32", [16 * MIB], 0, 64 * MIB)}, bytes(64 * MIB))
    requests = [message("Finalize", header=header("Finalize", len(data)))]
    requests += [message("Finalize", data=data[at : at + MIB]) for at in range(0, len(data), MIB)]
    with inner_server("--drain-timeout", "0.2") as server:
        channel = grpc.insecure_channel(server.address)
        unread = pruner_pb2_grpc.PrunerStub(channel).Finalize(iter(requests))
        assert next(unread).HasField("result")
    eventually(lambda: endings(caplog), {("Unavailable", "SHUTTING_DOWN", WHY)})
    unread.cancel()
    channel.close()


def running_calls(server: RunningServer) -> bool:
    return sample(server, "secateur_requests_in_flight") == 1


def test_server_raises_its_limit_of_open_files(server: RunningServer) -> None:
    """The fixture starts it with half of the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_second_server_at_the_same_address_reports_it(server: RunningServer) -> None:
    ended = run_server("--address", server.address, "--metrics-address", "")
    assert ended.returncode == 1
    line = f"secateur-server: cannot listen at {server.address}: Address already in use\n"
    assert line in ended.stderr
    options = ["--address", "127.0.0.1:0", "--metrics-address", server.metrics_address]
    with pytest.raises(CannotStart, match=f"cannot serve metrics at {server.metrics_address}"):
        App(read_config(options, {}))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "gpu", "'gpu' is not one of auto, cpu, cuda, cuda:N"),
        ("--device", "cuda:99", "'cuda:99': torch"),
        (
            "--max-model-bytes",
            "1XB",
            "'1XB' is not a number of bytes, such as 1048576, 512MiB or 5GB",
        ),
        ("--max-model-bytes", "0", "'0' is not a number of bytes"),
        ("--drain-timeout", "-1", "'-1' is not a time in seconds"),
        ("--drain-timeout", "nan", "'nan' is not a time in seconds"),
    ],
)
def test_a_wrong_option_is_named(
    capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read_config([f"{option}={value}"], {})
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_command_line_overrides_variables() -> None:
    ended = run_server(SECATEUR_DEVICE="gpu")
    assert ended.returncode == 2
    assert "argument --device: 'gpu' is not one of" in ended.stderr
    config = read_config(["--device", "cpu"], {"SECATEUR_DEVICE": "gpu"})
    assert config.device.type == "cpu"


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5GiB", 5 << 30), ("300MB", 3 * 10**8), ("1KB", 1000), ("7", 7)],
)
def test_sizes_have_binary_and_decimal_units(text: str, size: int) -> None:
    assert read_config(["--max-model-bytes", text], {}).max_model_bytes == size


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of tgkill is x86-64's")
def test_signal_to_any_thread_stops_the_server() -> None:
    """The system may deliver a signal to any thread."""
    running = start_server()
    tgkill = 234
    pid = running.process.pid
    other = next(thread for thread in thread_ids(pid) if thread != pid)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(tgkill, pid, other, signal.SIGTERM) == 0
    assert running.process.wait(timeout=300) == 0
    shutil.rmtree(running.log.parent)


def test_connection_ends_at_its_age_and_running_calls_do_not() -> None:
    """Later calls of the same channel get a new connection."""
    states: list[grpc.ChannelConnectivity] = []
    with (
        inner_server("--max-connection-age", "0.2") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        channel.subscribe(states.append)
        stub = health_pb2_grpc.HealthStub(channel)
        running = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(running).status == health_pb2.HealthCheckResponse.SERVING
        eventually(lambda: states[-1:], [grpc.ChannelConnectivity.IDLE])
        assert running.is_active()
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=300)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        running.cancel()


def test_a_new_replica_behind_a_balancer_gets_calls_of_an_old_client() -> None:
    """A balancer assigns connections, not calls: only a new connection reaches the new server."""
    options = ("--max-connection-age", "0.2")
    with (
        inner_server(*options) as old,
        inner_server(*options) as new,
        proxy(old.address) as balancer,
        grpc.insecure_channel(balancer.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        check = partial(stub.Check, health_pb2.HealthCheckRequest(), timeout=300)
        check(wait_for_ready=True)
        balancer.target = new.address

        def has_moved() -> bool:
            check(wait_for_ready=True)
            served = series(new, "grpc_server_handled_total", grpc_service="grpc.health.v1.Health")
            return served > 0

        eventually(has_moved, True)


def test_a_call_that_outlasts_the_grace_of_its_connection_is_cut_off() -> None:
    options = ("--max-connection-age", "0.1", "--max-connection-age-grace", "0.1")
    with inner_server(*options) as server, grpc.insecure_channel(server.address) as channel:
        running = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.RpcError) as ended:
            list(running)
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
