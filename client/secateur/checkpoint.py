"""Models that the server keeps, and those that it opens by itself."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from secateur.errors import SecateurError
from secateur.tensors import is_text
from secateur_proto import checkpoint_pb2 as pb


@dataclass(frozen=True)
class File:
    """A file of a checkpoint.  blake3: of its content, in hexadecimal."""

    filename: str
    size_bytes: int
    blake3: str


@dataclass(frozen=True)
class Checkpoint:
    """A model that the server keeps, with the masks of its pruning. It never changes.

    expire_time: when it goes unless it is used; None is never.  files: the weights as they were
    uploaded.  size_bytes: of them.  mask_bytes: of the masks beside them.
    """

    name: str
    create_time: datetime
    expire_time: datetime | None
    files: tuple[File, ...]
    size_bytes: int
    mask_bytes: int


def decode_checkpoint(message: pb.Checkpoint) -> Checkpoint:
    """A checkpoint from the wire."""
    return Checkpoint(
        name=message.name,
        create_time=message.create_time.ToDatetime(UTC),
        expire_time=message.expire_time.ToDatetime(UTC)
        if message.HasField("expire_time")
        else None,
        files=tuple(File(f.filename, f.size_bytes, f.blake3) for f in message.files),
        size_bytes=message.size_bytes,
        mask_bytes=message.mask_bytes,
    )


def name_of(checkpoint: Any) -> str:
    """The name of a checkpoint, which may be given by its name.  Errors: SecateurError."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.name
    if is_text(checkpoint):
        return str(checkpoint)
    given = repr(checkpoint) if isinstance(checkpoint, str) else type(checkpoint).__name__
    raise SecateurError(f"a checkpoint, or the name of one, is needed, not {given}")


def uri_of(destination: Any) -> str:
    """Where the server is to write; empty for None.  Errors: SecateurError."""
    if destination is None:
        return ""
    if isinstance(destination, str) and "://" in destination:
        return destination
    raise SecateurError(
        f"destination={destination!r} is no URI, as file:///models/out.safetensors is; "
        "to write a file here there is the result's save()"
    )


def place_of(source: Any) -> dict[str, str]:
    """The field of a header that names a source on the server; none for one in this process."""
    if isinstance(source, Checkpoint):
        return {"checkpoint": source.name}
    if isinstance(source, str) and "://" in source:
        return {"uri": source}
    return {}
