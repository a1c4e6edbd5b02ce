"""Calls that end in the middle leave nothing behind."""

from collections.abc import Iterator

import grpc
import pytest
import safetensors.torch
import torch

from secateur_proto import pruner_pb2 as pb
from secateur_proto.framing import cut
from secateur_proto.pruner_pb2_grpc import PrunerStub
from tests.conftest import RunningServer, eventually
from tests.contract.raw import check_serves, failure, header, kept_open, message, send, series

# Channels to one address share a connection, and closing one of them would close none.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]

BIG = safetensors.torch.save({"w": torch.randn(8 << 20)})
PIECES = [bytes(piece) for piece in cut([BIG])]


@pytest.fixture(autouse=True)
def _the_server_goes_on(server: RunningServer, channel: grpc.Channel) -> Iterator[None]:
    yield
    check_serves(server, channel)


def half_of_an_upload() -> list[pb.PruneRequest]:
    first = message("Prune", header=header("Prune", len(BIG)), data=PIECES[0])
    return [first, *(message("Prune", data=piece) for piece in PIECES[1 : len(PIECES) // 2])]


def held(server: RunningServer) -> float:
    return series(server, "secateur_model_bytes")


def canceled(server: RunningServer) -> float:
    labels = {"grpc_method": "Prune", "grpc_code": "Canceled"}
    return series(server, "grpc_server_handled_total", **labels)


def test_cancelled_upload_leaves_nothing(server: RunningServer, channel: grpc.Channel) -> None:
    before = canceled(server)
    with kept_open(half_of_an_upload()) as messages:
        call = PrunerStub(channel).Prune(messages, timeout=300)
        eventually(lambda: held(server), float(len(BIG)))
        call.cancel()
        eventually(lambda: held(server), 0.0)
    eventually(lambda: canceled(server), before + 1)


def test_disconnected_upload_leaves_nothing(server: RunningServer) -> None:
    before = canceled(server)
    with kept_open(half_of_an_upload()) as messages:
        channel = grpc.insecure_channel(server.address, OWN_CONNECTION)
        call = PrunerStub(channel).Prune(messages, timeout=300)
        eventually(lambda: held(server), float(len(BIG)))
        channel.close()
        eventually(lambda: held(server), 0.0)
        assert call.code() == grpc.StatusCode.CANCELLED
    eventually(lambda: canceled(server), before + 1)


def test_call_cancelled_during_its_answer_leaves_nothing(
    server: RunningServer, channel: grpc.Channel
) -> None:
    before = canceled(server)
    first = message("Prune", header=header("Prune", len(BIG), output=pb.OUTPUT_DENSE))
    rest = (message("Prune", data=piece) for piece in PIECES)
    call = PrunerStub(channel).Prune(iter([first, *rest]), timeout=300)
    assert next(call).result.data_bytes == len(BIG)
    call.cancel()
    eventually(lambda: held(server), 0.0)
    eventually(lambda: canceled(server), before + 1)


def test_deadline_during_the_upload_is_reported(
    server: RunningServer, channel: grpc.Channel
) -> None:
    started = series(server, "grpc_server_started_total", grpc_method="Prune")
    with kept_open(half_of_an_upload()) as messages:
        found = failure(send, channel, "Prune", messages, timeout=1)
        assert found is not None
        assert found.code == grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: held(server), 0.0)
    assert series(server, "grpc_server_started_total", grpc_method="Prune") == started + 1
