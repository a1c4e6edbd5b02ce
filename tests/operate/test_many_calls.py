"""More calls than the server accepts: each is served, or gets a retry delay."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

import secateur
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.operate.authentication import Authenticator
from tests.conftest import PATIENCE, RunningServer, eventually, inner_server
from tests.contract.raw import (
    OWN_CONNECTION,
    entry,
    file,
    header,
    message,
    open_streams,
    series,
)

DATA = file({"w": entry("F32", [2], 0, 8)}, b"\0" * 8)


@pytest.fixture(scope="module")
def busy() -> Iterator[RunningServer]:
    with inner_server() as running:
        yield running


def two_connections(server: RunningServer, opened: ExitStack) -> list[grpc.Channel]:
    """Opens two channels with their own connections."""
    made = (grpc.insecure_channel(server.address, [OWN_CONNECTION]) for _ in range(2))
    return [opened.enter_context(channel) for channel in made]


def whole_call(channel: grpc.Channel) -> Any:
    request = message("Report", header=header("Report", len(DATA)), data=DATA)
    return PrunerStub(channel).Report.future(iter([request]), timeout=PATIENCE)


def has_retry_delay(call: Any) -> bool:
    """Whether a call failed with RESOURCE_EXHAUSTED and a retry delay."""
    status, retry = rpc_status.from_call(call), RetryInfo()
    details = status.details if status else ()
    is_exhausted = call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return is_exhausted and any(detail.Unpack(retry) for detail in details)


def wait_until_accepted(channel: grpc.Channel) -> None:
    """Waits until gRPC has accepted all earlier calls: it answers an unknown method itself."""
    unknown: Any = channel.unary_unary("/no.Service/Method")
    call = unknown.future(b"", timeout=PATIENCE)
    assert call.exception() is not None
    assert call.code() == grpc.StatusCode.UNIMPLEMENTED


def test_all_calls_of_one_connection_are_served(busy: RunningServer) -> None:
    with grpc.insecure_channel(busy.address) as channel:
        calls = [whole_call(channel) for _ in range(200)]
        assert {call.exception(PATIENCE) for call in calls} == {None}


def test_calls_without_a_thread_get_a_retry_delay(
    busy: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More calls arrive than the server has threads, before the first of them is authenticated."""
    all_have_arrived, authenticate = threading.Event(), Authenticator.authenticate

    def slow_authenticate(self: Authenticator, metadata: Any) -> Any:
        all_have_arrived.wait(PATIENCE)
        return authenticate(self, metadata)

    monkeypatch.setattr(Authenticator, "authenticate", slow_authenticate)
    with ExitStack() as opened:
        opened.callback(all_have_arrived.set)
        channels = two_connections(busy, opened)
        calls = [whole_call(channel) for channel in channels for _ in range(120)]
        for channel in channels:
            wait_until_accepted(channel)
        all_have_arrived.set()
        failed = [call for call in calls if call.exception(PATIENCE)]
        assert 0 < len(failed) < len(calls)
        assert {call.details() for call in failed if not has_retry_delay(call)} == set()


def test_client_retries_after_a_full_server(busy: RunningServer) -> None:
    first = message("Report", header=header("Report", 1000), data=b"\x10")

    def rejected() -> float:
        return series(busy, "secateur_rejected_requests_total", reason="QUEUE_FULL")

    with ExitStack() as opened, secateur.Client(busy.address, timeout=PATIENCE) as client:
        stream = opened.enter_context(open_streams())
        silent = [
            PrunerStub(channel).Report.future(stream([first]), timeout=PATIENCE)
            for channel in two_connections(busy, opened)
            for _ in range(80)
        ]
        eventually(lambda: any(call.done() for call in silent), True)
        reports: list[secateur.Report] = []
        caller = threading.Thread(
            target=lambda: reports.append(client.report({"w": np.ones(3, np.float32)}))
        )
        before = rejected()
        caller.start()
        eventually(lambda: rejected() > before, True)
        for call in silent:
            call.cancel()
        caller.join()
        assert reports[0].total == 3
