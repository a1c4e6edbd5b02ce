"""A server with its own store, the content of its disk, and calls that the client never makes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import safetensors.torch
import torch
from blake3 import blake3
from torch import Tensor

import secateur
from secateur_proto import checkpoint_pb2, checkpoints_pb2
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_proto.framing import cut
from tests.conftest import RunningServer, inner_server, start_server, stop_server
from tests.contract.raw import TIMEOUT, series

# What a file system gives to a file at once, and the record of a small checkpoint takes.
DISK_BLOCK = 4096

# The sums of a blob have 32 bytes for each of these.
BLOCK = 1 << 20

Message = TypeVar("Message")


@contextmanager
def store_server(folder: Path, *options: str) -> Iterator[RunningServer]:
    """A server that keeps its checkpoints in `folder`."""
    running = start_server("--store-dir", str(folder), *options)
    try:
        yield running
    finally:
        logged = stop_server(running)
    assert "Traceback" not in logged, logged


def inner_store_server(folder: Path, *options: str) -> AbstractContextManager[RunningServer]:
    """A server in this process that keeps its checkpoints in `folder`."""
    return inner_server("--store-dir", str(folder), *options)


@dataclass(frozen=True)
class Kept:
    """A running server, its folder, and callers of it."""

    server: RunningServer
    folder: Path
    client: secateur.Client
    channel: grpc.Channel


@contextmanager
def kept(folder: Path, *options: str, of_its_own: bool = False) -> Iterator[Kept]:
    """A server with a folder, a client and a channel.  of_its_own: in a process."""
    start = store_server if of_its_own else inner_store_server
    with (
        start(folder, *options) as server,
        secateur.Client(server.address, timeout=300) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield Kept(server, folder, client, channel)


def model(count: int, seed: int = 0) -> dict[str, Tensor]:
    """A model of `count` random floats in two tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(count // 2, generator=generator).view(2, -1),
        "b": torch.randn(count - count // 2, generator=generator),
    }


def file_of(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as a safetensors file."""
    return safetensors.torch.save(dict(tensors))


def downloaded(
    client: secateur.Client, checkpoint: secateur.Checkpoint, folder: Path, output: str = "dense"
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, read from the file that a download wrote."""
    path = folder / "downloaded.safetensors"
    client.download(checkpoint, path, output=output)
    tensors = safetensors.torch.load(path.read_bytes())
    path.unlink()
    return tensors


def received(server: RunningServer) -> int:
    """Bytes of models that a server has received."""
    return int(series(server, "secateur_received_bytes_total"))


# What lies on the disk ------------------------------------------------------------------------


def on_disk(folder: Path) -> dict[str, int]:
    """The size of each file of a store, but for its lock."""
    files = (path for path in folder.rglob("*") if path.is_file())
    sizes = {}
    for path in files:
        try:
            sizes[str(path.relative_to(folder))] = path.stat().st_size
        except FileNotFoundError:  # it was on its way
            continue
    sizes.pop("lock", None)
    return sizes


def blobs(folder: Path) -> dict[str, int]:
    """Digest and size of the blobs of a store."""
    paths = (folder / "blobs").iterdir()
    return {path.name: path.stat().st_size for path in paths if path.suffix != ".sums"}


def in_blocks(size: int) -> int:
    """What a file of `size` bytes takes on disk: whole blocks."""
    return (size + DISK_BLOCK - 1) // DISK_BLOCK * DISK_BLOCK


def counted(folder: Path) -> int:
    """The bytes of a store as it counts them: whole blocks of each file."""
    return sum(in_blocks(size) for size in on_disk(folder).values())


def check_tidy(folder: Path, records: int, digests: Iterable[str]) -> None:
    """There are so many records, these blobs with their sums, and nothing else."""
    names = set(on_disk(folder))
    found = {name for name in names if name.startswith("checkpoints/") and name.endswith(".json")}
    assert len(found) == records, found
    expected = {f"blobs/{digest}{suffix}" for digest in digests for suffix in ("", ".sums")}
    assert names - found == expected


# Raw calls ------------------------------------------------------------------------------------


def token(name: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a caller with a token; empty is none."""
    return (("authorization", f"Bearer {name}"),) if name else ()


def digest_of(data: bytes) -> str:
    """Hex BLAKE3."""
    return blake3(data).hexdigest()


def file_message(
    data: bytes, filename: str = "model.safetensors", **fields: Any
) -> checkpoint_pb2.File:
    """What an upload or a query says of a file."""
    known = {"size_bytes": len(data), "blake3": digest_of(data), **fields}
    return checkpoint_pb2.File(filename=filename, **known)


def upload_file(file: checkpoint_pb2.File, offset: int = 0) -> checkpoints_pb2.UploadFile:
    """A file of an upload."""
    return checkpoints_pb2.UploadFile(file=file, offset=offset)


def upload_requests(
    files: Iterable[checkpoints_pb2.UploadFile], data: bytes = b""
) -> Iterator[checkpoints_pb2.UploadRequest]:
    """The messages of an Upload."""
    header = checkpoints_pb2.UploadHeader(files=files)
    yield checkpoints_pb2.UploadRequest(header=header)
    for piece in cut([data]):
        yield checkpoints_pb2.UploadRequest(data=bytes(piece))


def send_upload(
    channel: grpc.Channel, requests: Iterable[checkpoints_pb2.UploadRequest], name: str = ""
) -> checkpoint_pb2.Checkpoint:
    """Makes an Upload of any messages.  Errors: grpc.RpcError."""
    stub = CheckpointsStub(channel)
    return stub.Upload(iter(requests), timeout=TIMEOUT, metadata=token(name))


def committed(channel: grpc.Channel, file: checkpoint_pb2.File, name: str = "") -> int:
    """What a QueryUpload says of a file."""
    request = checkpoints_pb2.QueryUploadRequest(files=[file])
    answer = CheckpointsStub(channel).QueryUpload(request, timeout=TIMEOUT, metadata=token(name))
    (size,) = answer.committed_sizes
    return size
