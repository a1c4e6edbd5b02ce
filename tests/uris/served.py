"""A server with folders or URIs that it opens, and calls that name them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from safetensors.torch import save_file
from torch import Tensor

import secateur
from secateur_proto import pruner_pb2 as pb
from tests.conftest import RunningServer, inner_server, start_server, stop_server
from tests.contract.raw import Failure, failure, header, message, send

# The key of the servers under test.
SECRET = "not-to-be-told"

FORMS = ("masks", "reparametrized", "dense")


@dataclass(frozen=True)
class Served:
    """A server, and connections to it."""

    server: RunningServer
    channel: grpc.Channel
    client: secateur.Client

    def read(self, uri: str, rpc: str = "Report") -> Failure | None:
        """How a call on a source fails."""
        return failure(send, self.channel, rpc, [message(rpc, header=header(rpc, 0, uri=uri))])

    def write(self, source: str, destination: str, **fields: Any) -> Failure | None:
        """How a Prune to a destination fails."""
        fields = {"uri": source, "destination_uri": destination, "output": pb.OUTPUT_DENSE} | fields
        first = message("Prune", header=header("Prune", 0, **fields))
        return failure(send, self.channel, "Prune", [first])


@contextmanager
def serving(*options: str) -> Iterator[Served]:
    """A server in a process of its own, in which no request may find a defect."""
    server = start_server(*options)
    try:
        with connected(server) as served:
            yield served
    finally:
        logged = stop_server(server)
    assert "Traceback" not in logged, logged


@contextmanager
def serving_here(*options: str) -> Iterator[Served]:
    """A server in this process."""
    with inner_server(*options) as server, connected(server) as served:
        yield served


@contextmanager
def connected(server: RunningServer) -> Iterator[Served]:
    """Connections to a server."""
    with (
        grpc.insecure_channel(server.address) as channel,
        secateur.Client(channel=channel, timeout=300) as client,
    ):
        yield Served(server, channel, client)


def check(found: Failure | None, status: str, reason: str, *parts: str) -> None:
    """A call failed as it should, and says why."""
    assert found is not None, "the call succeeded"
    assert (found.code.name, found.reason) == (status, reason), found
    missing = [part for part in parts if part not in found.message]
    assert not missing, f"{missing} not in {found.message!r}"


def check_refused(found: Failure | None) -> None:
    check(found, "PERMISSION_DENIED", "URI_NOT_ALLOWED")


def weights(*shapes: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors w0, w1 and so on."""
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A file of tensors."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    return path


MODEL = weights((64, 32), (32,), (9, 7, 5))
HALF = secateur.global_unstructured("*", 0.5)
