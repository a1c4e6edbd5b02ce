"""The tensors that a call works on, and how they are read from the call's data."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from secateur_server.errors import InvalidStateDict, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Stored
from secateur_server.state_dict.shards import stored_of
from secateur_server.state_dict.state_dict import StateDict, values_of, without_extras
from secateur_server.storage.records import StoredFile
from secateur_server.wire.reader import ByteStream, read_header, read_tensors


class Extras(NamedTuple):
    """Scores and masks that a call sends beside a checkpoint or a URI.

    Attributes:
        stored: Their descriptions.
        values: The arrays, but for those of dtypes that torch does not have.
    """

    stored: Mapping[str, Stored]
    values: Mapping[str, Tensor]


NO_EXTRAS = Extras({}, {})


@dataclass(frozen=True)
class Incoming:
    """The tensors that a call works on.

    Attributes:
        state_dict: Its headers are known; `read` fills in the data.
        size: Bytes of all files.
        read: Reads the data of the parameters of some names; None reads all.
        digest: Returns the hex BLAKE3 of a single file once it is read, or an empty text.
        check_unchanged: To be called after the data was used. Raises if a file has changed.
        files: The stored files, of which a new checkpoint can be made.
    """

    state_dict: StateDict
    size: int
    read: Callable[[Collection[str] | None], None]
    digest: Callable[[], str]
    check_unchanged: Callable[[], None] = lambda: None
    files: tuple[StoredFile, ...] = ()


def open_stream(
    context: RequestContext, stream: ByteStream, extras: Collection[str], device: torch.device
) -> Incoming:
    """Reads the header of the file that a call sends.

    Args:
        context: The request.
        stream: The file.
        extras: The names of its tensors that are scores or masks.
        device: Where the tensors are allocated.

    Raises:
        RequestError: MalformedFile, WrongLength, InvalidPair, RequestTooLarge or QueueFull.
    """
    header = read_header(context, stream)
    state_dict = without_extras(header, extras)

    def read(names: Collection[str] | None) -> None:
        tensors = read_tensors(stream, header, device)
        values = {name: values_of(tensors.pop(name)) for name in state_dict.catalog.extras}
        state_dict.fill(context, tensors, values, {})

    return Incoming(state_dict, stream.announced, read, stream.digest)


def read_extras(context: RequestContext, stream: ByteStream, extras: Collection[str]) -> Extras:
    """Reads the scores and masks that a call sends beside a checkpoint or a URI.

    Args:
        context: The request.
        stream: A file of them.
        extras: The names that the spec uses.

    Raises:
        InvalidStateDict: The file has another tensor.
        RequestError: MalformedFile, WrongLength, RequestTooLarge or QueueFull.
    """
    header = read_header(context, stream)
    for entry in header.entries:
        if entry.name not in extras:
            raise InvalidStateDict(
                f"data[{quote(entry.name)}]",
                "the spec does not use it as scores or a mask; send only tensors that it names",
            )
    read = read_tensors(stream, header, torch.device("cpu")).items()
    values = ((name, tensor.values()) for name, tensor in read)
    return Extras(stored_of(header.entries), {n: v for n, v in values if v is not None})
