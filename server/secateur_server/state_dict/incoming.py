"""The tensors that a call works on, and how they are read from the call's data."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from secateur_server.errors import InvalidStateDict, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Stored
from secateur_server.state_dict.shards import stored_of
from secateur_server.state_dict.state_dict import StateDict, values_of, without_extras
from secateur_server.storage.records import StoredFile
from secateur_server.wire.header import Entry, Header
from secateur_server.wire.reader import ByteStream, read_tensors, read_values

# Bytes for each byte of a Gram matrix's triangle: the matrix, its damped copy, and its factor in
# float64 or twice in float32. Each of them is twice the triangle, or four times.
OF_STREAMED = 8


# Tensors as they arrive, each with its name. The next one is received when it is asked for.
Streamed = Iterator[tuple[str, Tensor]]


class Extras(NamedTuple):
    """What a call sends beside a checkpoint or a URI.

    Attributes:
        stored: Descriptions of all of it.
        values: Scores and masks, but for those of dtypes that torch does not have.
        streamed: Gram matrices.
    """

    stored: Mapping[str, Stored]
    values: Mapping[str, Tensor]
    streamed: Streamed = iter(())


NO_EXTRAS = Extras({}, {})


@dataclass(frozen=True)
class Incoming:
    """The tensors that a call works on.

    Attributes:
        state_dict: Its headers are known; `read` fills in the data.
        size: Bytes of all files.
        read: Reads the data of the parameters of some names; None reads all.
        streamed: Gram matrices, which arrive after `read`. The digest is known after the last one.
        digest: Returns the hex BLAKE3 of a single file once it is read, or an empty text.
        check_unchanged: To be called after the data was used. Raises if a file has changed.
        files: The stored files, of which a new checkpoint can be made.
    """

    state_dict: StateDict
    size: int
    read: Callable[[Collection[str] | None], None]
    digest: Callable[[], str]
    streamed: Streamed
    check_unchanged: Callable[[], None] = lambda: None
    files: tuple[StoredFile, ...] = ()


def open_stream(
    context: RequestContext,
    stream: ByteStream,
    header: Header,
    extras: Collection[str],
    streamed: Collection[str],
    device: torch.device,
) -> Incoming:
    """Makes a state_dict of the file that a call sends.

    Args:
        context: The request.
        stream: The file, at the end of its header.
        header: Of the file.
        extras: The names of its tensors that are scores or masks.
        streamed: The names of its tensors that are used as they arrive.
        device: Where the tensors are allocated.

    Raises:
        RequestError: InvalidStateDict, InvalidPair, RequestTooLarge or QueueFull.
    """
    held, later = _divided(header, streamed)
    state_dict = without_extras(header, {*extras, *streamed})

    def read(names: Collection[str] | None) -> None:
        tensors = read_tensors(stream, held, device, is_all=not later)
        own = [name for name in state_dict.catalog.extras if name in tensors]
        values = {name: values_of(tensors.pop(name)) for name in own}
        state_dict.fill(context, tensors, values, {})

    arriving = _arriving(stream, later)
    return Incoming(state_dict, stream.announced, read, stream.digest, arriving)


def read_extras(
    context: RequestContext,
    stream: ByteStream,
    header: Header,
    extras: Collection[str],
    streamed: Collection[str],
) -> Extras:
    """Reads the scores and masks that a call sends beside a checkpoint or a URI.

    Args:
        context: The request.
        stream: A file of them, at the end of its header.
        header: Of the file.
        extras: The names that the spec uses.
        streamed: The names of tensors that are used as they arrive.

    Raises:
        InvalidStateDict: The file has another tensor.
        RequestError: WrongLength, RequestTooLarge or QueueFull.
    """
    for entry in context.each(header.entries):
        if entry.name not in extras and entry.name not in streamed:
            raise InvalidStateDict(
                f"data[{quote(entry.name)}]",
                "the spec does not use it as scores or a mask; send only tensors that it names",
            )
    held, later = _divided(header, streamed)
    read = read_tensors(stream, held, torch.device("cpu"), is_all=not later).items()
    values = ((name, tensor.values()) for name, tensor in read)
    return Extras(
        stored_of(header.entries),
        {n: v for n, v in values if v is not None},
        _arriving(stream, later),
    )


def held_bytes(header: Header, streamed: Collection[str]) -> int:
    """The most bytes of a file that are held at once if some tensors are used as they arrive.

    Of these only the largest counts, with what is made of it.
    """
    sizes = {entry.name: entry.end - entry.begin for entry in header.entries}
    held = sum(size for name, size in sizes.items() if name not in streamed)
    return held + OF_STREAMED * max((sizes[n] for n in streamed if n in sizes), default=0)


def _divided(header: Header, streamed: Collection[str]) -> tuple[Header, list[Entry]]:
    """The header of all tensors that are held, and the others in the order of their data.

    Raises:
        InvalidStateDict: One that is used as it arrives is not behind all others.
    """
    if not streamed:
        return header, []
    held = [entry for entry in header.entries if entry.name not in streamed]
    later = sorted((e for e in header.entries if e.name in streamed), key=attrgetter("begin"))
    last = max(held, key=attrgetter("end"), default=None)
    if last and later and later[0].begin < last.end:
        raise InvalidStateDict(
            f"data[{quote(later[0].name)}]",
            f"is a Gram matrix and lies before {quote(last.name)}; send these last",
        )
    return Header(held, header.metadata), later


def _arriving(stream: ByteStream, entries: Sequence[Entry]) -> Streamed:
    for entry in entries:
        yield entry.name, read_values(stream, entry)
    if entries:
        stream.finish()
