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
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.records import Record
from secateur_server.storage.store import Store
from tests.conftest import RunningServer, eventually, inner_server, start_server, stop_server
from tests.contract.raw import TIMEOUT, bearer, kept_open, series

# The block of a file system, and the size of the record of a small checkpoint.
DISK_BLOCK = 4096

# The sums of a blob have 32 bytes for each block of this size.
BLOCK = 1 << 20

OWNER = "a" * 32

Message = TypeVar("Message")


@contextmanager
def store_server(folder: Path, *options: str) -> Iterator[RunningServer]:
    """Runs a server in its own process, with its store in `folder`."""
    running = start_server("--store-dir", str(folder), *options)
    try:
        yield running
    finally:
        logged = stop_server(running)
    assert "Traceback" not in logged, logged


def inner_store_server(folder: Path, *options: str) -> AbstractContextManager[RunningServer]:
    """Runs a server in this process, with its store in `folder`."""
    return inner_server("--store-dir", str(folder), *options)


@dataclass(frozen=True)
class Kept:
    """A running server, the folder of its store, and connections to it."""

    server: RunningServer
    folder: Path
    client: secateur.Client
    channel: grpc.Channel


@contextmanager
def kept(folder: Path, *options: str, of_its_own: bool = False) -> Iterator[Kept]:
    """Runs a server with a store in `folder`.

    Args:
        folder: Of the store.
        options: Of the server.
        of_its_own: Whether it runs in its own process.
    """
    start = store_server if of_its_own else inner_store_server
    with (
        start(folder, *options) as server,
        secateur.Client(server.address, timeout=300) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield Kept(server, folder, client, channel)


def model(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Makes a model of `count` random floats in two tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(count // 2, generator=generator).view(2, -1),
        "b": torch.randn(count - count // 2, generator=generator),
    }


def file_of(tensors: Mapping[str, Tensor]) -> bytes:
    """Writes tensors as the file that the client uploads."""
    return safetensors.torch.save(dict(tensors), {"format": "pt"})


def downloaded(
    client: secateur.Client, checkpoint: secateur.Checkpoint, folder: Path, output: Any = "dense"
) -> dict[str, Tensor]:
    """Downloads a checkpoint to a file, and returns its tensors."""
    path = folder / "downloaded.safetensors"
    client.download(checkpoint, path, output=output)
    tensors = safetensors.torch.load(path.read_bytes())
    path.unlink()
    return tensors


def received(server: RunningServer) -> int:
    """Returns the bytes of models that a server has received."""
    return int(series(server, "secateur_received_bytes_total"))


# Files of a store -----------------------------------------------------------------------------


def on_disk(folder: Path) -> dict[str, int]:
    """Returns the size of each file of a store except its lock."""
    files = (path for path in folder.rglob("*") if path.is_file())
    sizes = {}
    for path in files:
        try:
            sizes[str(path.relative_to(folder))] = path.stat().st_size
        except FileNotFoundError:  # it was renamed or removed meanwhile
            continue
    sizes.pop("lock", None)
    return sizes


def blobs(folder: Path) -> dict[str, int]:
    """Returns the digests and sizes of the blobs of a store."""
    paths = (folder / "blobs").iterdir()
    return {path.name: path.stat().st_size for path in paths if path.suffix != ".sums"}


def in_blocks(size: int) -> int:
    """Returns the bytes of whole blocks for a file of `size` bytes."""
    return (size + DISK_BLOCK - 1) // DISK_BLOCK * DISK_BLOCK


def counted(folder: Path) -> int:
    """Returns the bytes of a store as the server counts them.

    Those are whole blocks of each file, and a block for the folder of each owner.
    """
    owners = len(list((folder / "checkpoints").iterdir()))
    return sum(in_blocks(size) for size in on_disk(folder).values()) + owners * DISK_BLOCK


def check_tidy(folder: Path, records: int, digests: Iterable[str]) -> None:
    """Checks that a store has `records` records, these blobs with their sums, and nothing else."""
    names = set(on_disk(folder))
    found = {name for name in names if name.startswith("checkpoints/") and name.endswith(".json")}
    assert len(found) == records, found
    expected = {f"blobs/{digest}{suffix}" for digest in digests for suffix in ("", ".sums")}
    assert names - found == expected


# Raw calls ------------------------------------------------------------------------------------


def digest_of(data: bytes) -> str:
    """Returns the BLAKE3 in hex."""
    return blake3(data).hexdigest()


def file_message(
    data: bytes, filename: str = "model.safetensors", **fields: Any
) -> checkpoint_pb2.File:
    """Describes a file for an upload or a query."""
    known = {"size_bytes": len(data), "blake3": digest_of(data), **fields}
    return checkpoint_pb2.File(filename=filename, **known)


def upload_file(file: checkpoint_pb2.File, offset: int = 0) -> checkpoints_pb2.UploadFile:
    """Describes a file of an upload."""
    return checkpoints_pb2.UploadFile(file=file, offset=offset)


def upload_requests(
    files: Iterable[checkpoints_pb2.UploadFile], data: bytes = b""
) -> Iterator[checkpoints_pb2.UploadRequest]:
    """Makes the messages of an Upload."""
    header = checkpoints_pb2.UploadHeader(files=files)
    yield checkpoints_pb2.UploadRequest(header=header)
    for piece in cut([data]):
        yield checkpoints_pb2.UploadRequest(data=bytes(piece))


def send_upload(
    channel: grpc.Channel, requests: Iterable[checkpoints_pb2.UploadRequest], name: str = ""
) -> checkpoint_pb2.Checkpoint:
    """Makes an Upload of any messages, which may raise grpc.RpcError."""
    stub = CheckpointsStub(channel)
    return stub.Upload(iter(requests), timeout=TIMEOUT, metadata=bearer(name))


def committed(channel: grpc.Channel, file: checkpoint_pb2.File, name: str = "") -> int:
    """Returns how many bytes of a file the server has, by QueryUpload."""
    request = checkpoints_pb2.QueryUploadRequest(files=[file])
    answer = CheckpointsStub(channel).QueryUpload(request, timeout=TIMEOUT, metadata=bearer(name))
    (size,) = answer.committed_sizes
    return size


@contextmanager
def sending(store: Kept, data: bytes, count: int, name: str = "") -> Iterator[grpc.Call]:
    """Begins an upload that sends only its first `count` bytes while the block runs."""
    message = file_message(data)
    with kept_open(upload_requests([upload_file(message)], data[:count])) as messages:
        call = CheckpointsStub(store.channel).Upload.future(messages, metadata=bearer(name))
        eventually(lambda: committed(store.channel, message, name), count)
        try:
            yield call
        finally:
            call.cancel()


def leave_unfinished(store: Kept, data: bytes, count: int, name: str = "") -> None:
    """Makes an upload that breaks after `count` bytes."""
    with sending(store, data, count, name):
        pass


def create(
    store: Store,
    data: bytes,
    count: int = 1,
    *,
    owner: str = OWNER,
    name: str = "a",
    quota: int | None = None,
) -> Record:
    """Creates a checkpoint of `count` files with the same data and name."""
    upload = store.uploads.begin(owner, len(data), quota=quota)
    try:
        store.uploads.write(upload, data)
        file = store.uploads.finish(RequestContext(), upload, name)
        return store.create(RequestContext(), owner, count * (file,), quota=quota)
    finally:
        store.uploads.leave(upload)
