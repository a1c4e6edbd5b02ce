"""The log lines and request ids of a server."""

import json
import logging
import os
import pty
import re
import signal
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RequestInfo
from grpc_status import rpc_status

import secateur
from secateur_proto import pruner_pb2, pruner_pb2_grpc
from secateur_proto.framing import file_header
from secateur_server.operate.metrics import STAGES
from tests.conftest import RunningServer, inner_server, stop_server
from tests.forked import ForkedProcess

MODEL = {"w": np.arange(1, 9, dtype=np.float32).reshape(2, 4)}
HALF = secateur.l1_unstructured("w", 0.5)


def requests(logged: str) -> list[dict[str, object]]:
    """Parses the lines of a log, all of them JSON, and returns those of requests."""
    lines = [json.loads(line) for line in logged.splitlines()]
    return [line for line in lines if "rpc" in line]


def report(address: str, metadata: tuple[tuple[str, str], ...] = ()) -> grpc.Call:
    """Makes a Report, and returns the call, which has succeeded."""
    data = file_header([("w", "F32", (8,))]) + MODEL["w"].tobytes()
    header = pruner_pb2.ReportHeader(data_bytes=len(data))
    with grpc.insecure_channel(address) as channel:
        rpc = pruner_pb2_grpc.PrunerStub(channel).Report
        messages = iter([pruner_pb2.ReportRequest(header=header, data=data)])
        call = rpc.future(messages, metadata=metadata, timeout=300)
        call.result()
    assert isinstance(call, grpc.Call)
    return call


def test_request_is_logged_as_one_line_of_json(own_server: RunningServer) -> None:
    with secateur.Client(own_server.address) as client:
        client.prune(MODEL, HALF)
    (line,) = requests(stop_server(own_server))
    assert (line["rpc"], line["code"], line["level"]) == ("secateur.v1.Pruner/Prune", "OK", "INFO")
    assert (line["elements"], line["pruned"], line["sparsity"]) == (8, 4, 0.5)
    received, sent, seconds = line["received_bytes"], line["sent_bytes"], line["seconds"]
    assert isinstance(received, int)
    assert isinstance(sent, int)
    assert isinstance(seconds, float)
    assert received > MODEL["w"].nbytes
    assert sent > 0
    stages = line["stage_seconds"]
    assert isinstance(stages, dict)
    assert {"receive", "score", "select", "encode"} <= set(stages) <= set(STAGES)
    assert 0 < sum(stages.values()) < seconds
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", str(line["time"]))


def test_ipv6_peer_is_logged_with_brackets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "secateur_server")
    with inner_server("--address", "[::1]:0") as running:
        report(running.address)
    (peer,) = (record.call["peer"] for record in caplog.records if hasattr(record, "call"))
    assert peer.startswith("ipv6:[::1]:")


def test_failed_request_is_logged_without_weights_and_tokens(
    own_server: RunningServer,
) -> None:
    secret = "a-token-that-is-never-logged"
    weights = {"w": np.full((2, 4), 123.456789, np.float32)}
    with secateur.Client(own_server.address, token=secret) as client:
        client.prune(weights, HALF)
        with pytest.raises(secateur.InvalidSpec) as raised:
            client.prune(weights, secateur.l1_unstructured("v\nlevel=ERROR", 0.5))
    logged = stop_server(own_server)
    served, failed = requests(logged)
    assert (failed["code"], failed["reason"]) == ("InvalidArgument", "INVALID_SPEC")
    assert failed["error"] == str(raised.value)
    assert failed["id"] == raised.value.request_id
    assert "reason" not in served
    assert secret not in logged
    assert "123.45" not in logged


def test_call_has_the_request_id_of_its_caller(own_server: RunningServer) -> None:
    call = report(own_server.address, (("x-request-id", "job-7/step.3"),))
    assert dict(call.trailing_metadata())["x-request-id"] == "job-7/step.3"
    assert [line["id"] for line in requests(stop_server(own_server))] == ["job-7/step.3"]


@pytest.mark.parametrize("given", ["", "x" * 129, 'a" level="ERROR', "two words"])
def test_invalid_request_id_is_replaced(server: RunningServer, given: str) -> None:
    call = report(server.address, (("x-request-id", given),))
    found = dict(call.trailing_metadata())["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", str(found))


def test_error_has_the_request_id_in_details_and_metadata(channel: grpc.Channel) -> None:
    stub = pruner_pb2_grpc.PrunerStub(channel)
    with pytest.raises(grpc.RpcError) as raised:
        stub.Report(iter([pruner_pb2.ReportRequest()]), metadata=(("x-request-id", "mine"),))
    call = raised.value
    assert isinstance(call, grpc.Call)
    status = rpc_status.from_call(call)
    info = RequestInfo()
    assert status is not None
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.request_id == "mine"
    assert dict(call.trailing_metadata())["x-request-id"] == "mine"


def test_probes_are_not_logged(own_server: RunningServer) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(own_server.address) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert requests(stop_server(own_server)) == []


def test_terminal_gets_text_lines() -> None:
    ours, theirs = pty.openpty()
    options = ["--address", "127.0.0.1:0", "--metrics-address", ""]
    server = ForkedProcess(options, log=Path(os.ttyname(theirs)))
    shown = ""
    while not (found := re.search(r"serving gRPC at ([\d.:]+) on", shown)):
        shown += os.read(ours, 4096).decode()
    with secateur.Client(found[1]) as client:
        client.prune(MODEL, HALF)
    while "sparsity" not in shown:
        shown += os.read(ours, 4096).decode()
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    os.close(theirs)
    os.close(ours)
    assert re.search(r"INFO secateur.v1.Pruner/Prune OK id=\"\w+\" seconds=\d+\.\d+", shown)
    assert "{" not in shown.splitlines()[0]
