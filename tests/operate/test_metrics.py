"""The metrics of a real server."""

import urllib.request
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import secateur
from secateur_proto import pruner_pb2, pruner_pb2_grpc
from tests.conftest import RunningServer, eventually, inner_server
from tests.contract.raw import kept_open, samples

MODEL = {"w": np.arange(1, 9, dtype=np.float32).reshape(2, 4)}
HALF = secateur.l1_unstructured("w", 0.5)


@pytest.fixture
def own_server() -> Iterator[RunningServer]:
    """A server whose metrics begin at zero."""
    with inner_server() as running:
        yield running


def sample(server: RunningServer, name: str, **labels: str) -> float:
    """Returns the value of the only series with these labels."""
    values = samples(server, name, **labels)
    assert len(values) == 1, f"{name} {labels}: {values}"
    return values[0]


def test_call_is_counted_with_its_time_and_bytes(own_server: RunningServer) -> None:
    with secateur.Client(own_server.address) as client:
        client.prune(MODEL, HALF)
    method = {"grpc_service": "secateur.v1.Pruner", "grpc_method": "Prune"}
    assert sample(own_server, "grpc_server_started_total", **method) == 1
    assert sample(own_server, "grpc_server_handled_total", grpc_code="OK", **method) == 1
    assert sample(own_server, "grpc_server_handling_seconds_count", **method) == 1
    assert sample(own_server, "secateur_pruned_elements_total") == 4
    assert sample(own_server, "secateur_received_bytes_total") > MODEL["w"].nbytes
    assert sample(own_server, "secateur_sent_bytes_total") > 0
    assert sample(own_server, "secateur_model_bytes") == 0
    assert sample(own_server, "secateur_requests_in_flight") == 0
    assert sample(own_server, "secateur_build_info", version="0.1.0") == 1


def test_all_codes_of_all_methods_exist_before_the_first_call(own_server: RunningServer) -> None:
    """Otherwise Prometheus would miss the increase when the first call fails."""
    service = "secateur.v1.Pruner"
    for method in ("Prune", "Report", "Plan", "Finalize"):
        labels = {"grpc_service": service, "grpc_method": method}
        for code in ("OK", "Canceled", "DeadlineExceeded", "Unavailable", "Internal", "DataLoss"):
            assert sample(own_server, "grpc_server_handled_total", grpc_code=code, **labels) == 0
        assert sample(own_server, "grpc_server_msg_sent_total", **labels) == 0


def test_messages_are_counted_both_ways(own_server: RunningServer) -> None:
    """The request has three chunks of 1 MiB after the first message, and the answer one message."""
    model = {"w": np.ones((3 << 20) // 4, np.float32)}
    with secateur.Client(own_server.address) as client:
        client.report(model)
    method = {"grpc_service": "secateur.v1.Pruner", "grpc_method": "Report"}
    assert sample(own_server, "grpc_server_msg_received_total", **method) >= 3
    assert sample(own_server, "grpc_server_msg_sent_total", **method) == 1


def test_elements_pruned_before_are_not_counted_again(own_server: RunningServer) -> None:
    with secateur.Client(own_server.address) as client:
        pairs = client.prune(MODEL, HALF).state_dict("reparametrized")
        client.prune(pairs, HALF)
    assert sample(own_server, "secateur_pruned_elements_total") == 4 + 2


def test_error_is_counted_by_its_code_in_gos_spelling(own_server: RunningServer) -> None:
    with secateur.Client(own_server.address) as client, pytest.raises(secateur.InvalidSpec):
        client.prune(MODEL, secateur.l1_unstructured("v", 0.5))
    labels = {"grpc_code": "InvalidArgument", "grpc_method": "Prune"}
    assert sample(own_server, "grpc_server_handled_total", **labels) == 1


def test_a_model_is_held_while_its_call_runs(own_server: RunningServer) -> None:
    """The call sends only the first bytes of a file."""
    header = pruner_pb2.ReportHeader(data_bytes=12345)
    request = pruner_pb2.ReportRequest(header=header, data=b"\x64")
    with grpc.insecure_channel(own_server.address) as channel, kept_open([request]) as messages:
        call = pruner_pb2_grpc.PrunerStub(channel).Report.future(messages)
        eventually(lambda: sample(own_server, "secateur_model_bytes"), 12345)
        assert sample(own_server, "secateur_requests_in_flight") == 1
        call.cancel()
        eventually(lambda: sample(own_server, "secateur_model_bytes"), 0)
    code = {"grpc_code": "Canceled", "grpc_method": "Report"}
    eventually(lambda: sample(own_server, "grpc_server_handled_total", **code), 1)


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=abc", "text/plain; version=1..2", ";;=,q=x"]
)
def test_scrape_with_an_unreadable_accept_header_is_answered(
    server: RunningServer, accept: str
) -> None:
    address = f"http://{server.metrics_address}/metrics"
    request = urllib.request.Request(address, headers={"Accept": accept})
    with urllib.request.urlopen(request) as answer:
        assert b"secateur_build_info" in answer.read()
