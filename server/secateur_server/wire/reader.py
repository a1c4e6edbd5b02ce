"""Reads a safetensors file as it arrives, cut anywhere, straight into the tensors' memory."""

from collections.abc import Iterator

import torch
from blake3 import blake3

from secateur_server.devices import passes_of
from secateur_server.devices.dtypes import TORCH_DTYPES
from secateur_server.devices.keys import BITS
from secateur_server.devices.looks import Look, seen_of
from secateur_server.devices.passes import Passes
from secateur_server.errors import TooShort, WrongLength
from secateur_server.runtime.context import RequestContext
from secateur_server.wire.header import Entry, Header, header_length, parse_header
from secateur_server.wire.tensors import WireTensor


class ByteStream:
    """The bytes of `chunks` as one stream that holds exactly `announced` bytes.

    is_hashed: whether `digest` will be asked for.
    """

    def __init__(
        self, chunks: Iterator[bytes | memoryview], announced: int, is_hashed: bool = True
    ) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self.announced = announced
        self._received = 0
        self._digest = blake3() if is_hashed else None

    def take(self, count: int) -> bytearray:
        """The next `count` bytes. Memory grows as they arrive, not by the word of `count`."""
        taken = bytearray()
        while len(taken) < count:
            taken += self._next(count - len(taken))
        return taken

    def at_hand(self, count: int) -> memoryview | None:
        """The next `count` bytes, if they have arrived in one piece."""
        if not 0 < count <= len(self._rest):
            return None
        return self._next(count)

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes, as they come."""
        while count:
            piece = self._next(count)
            yield piece
            count -= len(piece)

    def finish(self) -> None:
        """Checks that nothing is left.  Errors: WrongLength."""
        for chunk in self._chunks:
            self._count(chunk)

    def digest(self) -> str:
        """The hex BLAKE3 of what has arrived."""
        assert self._digest is not None, "it was not to be hashed"
        return self._digest.hexdigest()

    def _next(self, most: int) -> memoryview:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise TooShort(
                    "data", f"{self.announced} bytes are announced, {self._received} arrived"
                )
            self._count(chunk)
            self._rest = memoryview(chunk)
        piece, self._rest = self._rest[:most], self._rest[most:]
        return piece

    def _count(self, chunk: bytes | memoryview) -> None:
        self._received += len(chunk)
        if self._received > self.announced:
            raise WrongLength(
                "data", f"{self.announced} bytes are announced, {self._received} or more arrived"
            )
        if self._digest:
            self._digest.update(chunk)


def read_header(context: RequestContext, stream: ByteStream) -> Header:
    """Reads the head of a safetensors file.  Errors: MalformedFile, WrongLength."""
    length = header_length(context, bytes(stream.take(8)), stream.announced)
    return parse_header(context, bytes(stream.take(length)), stream.announced - 8 - length)


def read_tensors(stream: ByteStream, header: Header, device: torch.device) -> dict[str, WireTensor]:
    """Reads the rest of the file to `device`.

    A tensor's memory is allocated when its turn comes.
    Returns: the tensors in the header's order.  Errors: WrongLength.
    """
    passes = passes_of(device)
    in_order = sorted(header.entries, key=lambda entry: (entry.begin, entry.end))
    read = {entry.name: _read_tensor(stream, entry, passes) for entry in in_order}
    stream.finish()
    return {entry.name: read[entry.name] for entry in header.entries}


def _read_tensor(stream: ByteStream, entry: Entry, passes: Passes) -> WireTensor:
    size, dtype = entry.end - entry.begin, TORCH_DTYPES.get(entry.dtype)
    if (at_hand := stream.at_hand(size)) is not None:
        data = passes.landed(at_hand)
        if dtype not in BITS:
            return WireTensor(entry.dtype, entry.shape, data)
        look = Look(size // dtype.itemsize, *passes.extremes(data.view(dtype)))
        return WireTensor(entry.dtype, entry.shape, data, seen_of([look]))
    data = passes.room(size)
    looks: list[Look] = []
    begin = seen = 0
    for piece in stream.pieces(len(data)):
        passes.land(piece, data[begin : begin + len(piece)])
        begin += len(piece)
        # A piece may end within an element.
        is_due = begin - seen >= passes.look_bytes or begin == len(data)
        if dtype in BITS and is_due and begin - seen >= dtype.itemsize:
            whole = begin // dtype.itemsize * dtype.itemsize
            found = passes.extremes(data[seen:whole].view(dtype))
            looks.append(Look(whole // dtype.itemsize, *found))
            seen = whole
    return WireTensor(entry.dtype, entry.shape, data, seen_of(looks))
