"""Reads a safetensors file from a stream of chunks, directly into the memory of its tensors."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

import numpy as np
import torch
from blake3 import blake3

from secateur_server.backends import backend_for
from secateur_server.backends.dtypes import TORCH_DTYPES
from secateur_server.backends.keys import BITS
from secateur_server.backends.protocol import Backend
from secateur_server.backends.scan import PartScan, Scan, joined_scan, scan_each
from secateur_server.errors import TooShort, WrongLength
from secateur_server.runtime.context import RequestContext
from secateur_server.wire.header import Entry, Header, header_length, parse_header
from secateur_server.wire.tensors import WireTensor, wire_tensor

# The largest bytes of a tensor, and of a run of tensors, that are read together. The values of
# larger tensors are scanned faster one by one.
TINY_BYTES, RUN_BYTES = 1 << 13, 1 << 18
# Runs of up to so many tensors are read one by one.
FEW = 8

_CPU = torch.device("cpu")


class ByteStream:
    """Chunks as one stream of bytes, which must have exactly the announced length.

    Args:
        chunks: The stream, cut anywhere.
        announced: Its length in bytes.
        is_hashed: Whether `digest` will be called.
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
        """The next `count` bytes. Memory is allocated as they arrive, not up front."""
        taken = bytearray()
        while len(taken) < count:
            taken += self._next(count - len(taken))
        return taken

    def at_hand(self, count: int) -> memoryview | None:
        """The next `count` bytes, if they have arrived in one chunk; else None."""
        if not 0 < count <= len(self._rest):
            return None
        return self._next(count)

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes, as they arrive."""
        while count:
            piece = self._next(count)
            yield piece
            count -= len(piece)

    def finish(self) -> None:
        """Checks that the stream has ended.

        Raises:
            WrongLength: More bytes arrive than announced.
        """
        for chunk in self._chunks:
            self._count(chunk)

    def digest(self) -> str:
        """The hex BLAKE3 of the bytes that have arrived."""
        assert self._digest is not None, "is_hashed was set"
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
    """Reads the header of a safetensors file.

    Raises:
        MalformedFile: The stream is not a safetensors file.
        WrongLength: The stream has another length than announced.
        RequestTooLarge, QueueFull: The header would take too much memory.
    """
    length = header_length(context, bytes(stream.take(8)), stream.announced)
    return parse_header(context, bytes(stream.take(length)), stream.announced - 8 - length)


def read_tensors(
    stream: ByteStream, header: Header, device: torch.device, is_all: bool = True
) -> dict[str, WireTensor]:
    """Reads the tensors of a file. The memory of a tensor is allocated when its data arrives.

    Args:
        stream: At the end of the header.
        header: Of the file, or of its first tensors.
        device: Where the tensors are allocated.
        is_all: Whether the stream ends with the last of them.

    Returns:
        The tensors, in the header's order.

    Raises:
        WrongLength: The stream has another length than announced.
    """
    backend = backend_for(device)
    in_order = sorted(header.entries, key=attrgetter("begin", "end"))
    read: dict[str, WireTensor] = {}
    for run in _runs(in_order) if device.type == "cpu" else ([entry] for entry in in_order):
        if len(run) > FEW:
            read.update(zip((entry.name for entry in run), _read_run(stream, run), strict=True))
        else:
            read |= {entry.name: _read_tensor(stream, entry, backend) for entry in run}
    if is_all:
        stream.finish()
    return {entry.name: read[entry.name] for entry in header.entries}


def read_values(stream: ByteStream, entry: Entry) -> torch.Tensor:
    """Reads the next tensor of a file, on the CPU.

    Args:
        stream: At the tensor's data.
        entry: Of a dtype that torch has.

    Raises:
        WrongLength: The stream ends before.
    """
    values = _read_tensor(stream, entry, backend_for(_CPU)).values()
    assert values is not None, "the catalog lets no other dtype through"
    return values


def _runs(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Groups entries, in their order, into runs of small tensors of one dtype."""
    run: list[Entry] = []
    size = 0
    for entry in entries:
        small = entry.end - entry.begin
        is_tiny = 0 < small <= TINY_BYTES
        is_of_run = run and is_tiny and entry.dtype == run[0].dtype and size + small <= RUN_BYTES
        if run and not is_of_run:
            yield run
            run, size = [], 0
        run.append(entry)
        size += small if is_tiny else RUN_BYTES  # a large tensor is a run of its own
    if run:
        yield run


def _read_run(stream: ByteStream, run: Sequence[Entry]) -> list[WireTensor]:
    """Reads tensors of one dtype, none of them empty, into shared memory."""
    backend, size, begin = backend_for(_CPU), run[-1].end - run[0].begin, 0
    memory = backend.allocate(size)
    for piece in stream.pieces(size):
        backend.receive(piece, memory[begin : begin + len(piece)])
        begin += len(piece)
    data = memory.view(TORCH_DTYPES.get(run[0].dtype, torch.uint8))
    begins = np.array([entry.begin - run[0].begin for entry in run]) // data.itemsize
    scans: Iterable[Scan | None] = itertools.repeat(None)
    if data.dtype in BITS:
        scans = scan_each(data, begins)
    parts = torch.split(data, np.diff(begins, append=len(data)).tolist())
    found = zip(run, parts, scans, strict=False)
    return [WireTensor(entry.dtype, entry.shape, part, scan) for entry, part, scan in found]


def _read_tensor(stream: ByteStream, entry: Entry, backend: Backend) -> WireTensor:
    size, dtype = entry.end - entry.begin, TORCH_DTYPES.get(entry.dtype)
    if (at_hand := stream.at_hand(size)) is not None:
        data = backend.allocate(size)
        backend.receive(at_hand, data)
        if dtype not in BITS:
            return wire_tensor(entry.dtype, entry.shape, data)
        scan = PartScan(size // dtype.itemsize, *backend.extremes(data.view(dtype)))
        return wire_tensor(entry.dtype, entry.shape, data, joined_scan([scan]))
    data = backend.allocate(size)
    scans: list[PartScan] = []
    begin = scanned = 0
    for piece in stream.pieces(len(data)):
        backend.receive(piece, data[begin : begin + len(piece)])
        begin += len(piece)
        # A piece may end within an element.
        is_due = begin - scanned >= backend.scanned or begin == len(data)
        if dtype in BITS and is_due and begin - scanned >= dtype.itemsize:
            whole = begin // dtype.itemsize * dtype.itemsize
            found = backend.extremes(data[scanned:whole].view(dtype))
            scans.append(PartScan(whole // dtype.itemsize, *found))
            scanned = whole
    return wire_tensor(entry.dtype, entry.shape, data, joined_scan(scans))
