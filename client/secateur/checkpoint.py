"""Models on the server: checkpoints, and those at URIs that the server opens."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from secateur.decoding import decoded
from secateur.display.notebook import html_of
from secateur.errors import SecateurError
from secateur.tables import Table, listed
from secateur.tensors import is_text
from secateur_proto import checkpoint_pb2 as pb

# Names of files that a notebook shows.
_SHOWN = 3
_TIME = "%Y-%m-%d %H:%M:%S %Z"


@dataclass(frozen=True)
class File:
    """A file of a checkpoint.

    Attributes:
        filename: Its name when it was uploaded.
        size_bytes: The size of its content.
        blake3: Digest of its content, in hexadecimal.
    """

    filename: str
    size_bytes: int
    blake3: str


@dataclass(frozen=True)
class Checkpoint:
    """A model that the server keeps, with the masks of its pruning. It never changes.

    Attributes:
        name: "checkpoints/...".
        create_time: When it was made.
        expire_time: When the server deletes it unless it is used; None is never.
        files: The weights as they were uploaded.
        size_bytes: The size of all files.
        mask_bytes: The size of the masks beside them.
    """

    name: str
    create_time: datetime
    expire_time: datetime | None
    files: tuple[File, ...]
    size_bytes: int
    mask_bytes: int

    def _repr_html_(self) -> str:
        expires = f"{self.expire_time:{_TIME}}" if self.expire_time else "never"
        rows = [
            ("checkpoint", self.name),
            ("created", f"{self.create_time:{_TIME}}"),
            ("expires", expires),
            ("files", listed([file.filename for file in self.files], _SHOWN)),
            ("bytes", f"{self.size_bytes:,}, and {self.mask_bytes:,} of masks"),
        ]
        return html_of(Table(rows, left=2))


def decode_checkpoint(message: pb.Checkpoint) -> Checkpoint:
    """Decodes a checkpoint."""
    expires = message.HasField("expire_time")
    return decoded(
        Checkpoint,
        message,
        create_time=message.create_time.ToDatetime(UTC),
        expire_time=message.expire_time.ToDatetime(UTC) if expires else None,
        files=tuple(decoded(File, file) for file in message.files),
    )


def name_of(checkpoint: Any) -> str:
    """Returns the name of a checkpoint, which may be given by its name.

    Raises:
        SecateurError: It is neither.
    """
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.name
    if is_text(checkpoint):
        return str(checkpoint)
    given = repr(checkpoint) if isinstance(checkpoint, str) else type(checkpoint).__name__
    raise SecateurError(f"a checkpoint, or the name of one, is needed, not {given}")


def uri_of(destination: Any) -> str:
    """Returns the URI to which the server writes; empty for None.

    Raises:
        SecateurError: It is not a URI.
    """
    if destination is None:
        return ""
    if isinstance(destination, str) and "://" in destination:
        return destination
    raise SecateurError(
        f"destination={destination!r} is not a URI such as file:///models/out.safetensors; "
        "to write a local file, call the result's save()"
    )


def place_of(source: Any) -> dict[str, str]:
    """Returns the field of a header that names a source on the server; empty for one here."""
    if isinstance(source, Checkpoint):
        return {"checkpoint": source.name}
    if isinstance(source, str) and "://" in source:
        return {"uri": source}
    return {}
