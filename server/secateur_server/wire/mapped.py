"""Reads a safetensors file in mapped memory, without copying its tensors."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from secateur_server.backends import allocate, backend_for
from secateur_server.backends.dtypes import TORCH_DTYPES
from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import BYTES_OF_FEW
from secateur_server.backends.scan import (
    SPACING,
    PartScan,
    Sample,
    Scan,
    joined_scan,
    sample_places,
)
from secateur_server.errors import MalformedFile, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.wire.header import (
    MIN_FILE_BYTES,
    Entry,
    Header,
    header_length,
    parse_header,
)
from secateur_server.wire.tensors import WireTensor, wire_tensor

# Bytes that are read at once. An element of an aligned tensor is in one block.
BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class MappedFile:
    """A file in mapped memory.

    Attributes:
        filename: Without a folder.
        data: The whole file.
        check: Raises an error if a block of BLOCK bytes, by its number, is damaged.
        check_unchanged: Raises an error if the file has changed since it was opened. It is called
            after the data has been used.
    """

    filename: str
    data: memoryview
    check: Callable[[int], None] = lambda block: None
    check_unchanged: Callable[[], None] = lambda: None

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-len(self.data) // BLOCK)


def map_header(context: RequestContext, file: MappedFile) -> tuple[Header, int]:
    """Parses the header of a file.

    Returns:
        The header, and the offset of the data behind it.

    Raises:
        MalformedFile: The file is not a safetensors file.
        RequestTooLarge, QueueFull: The header would take too much memory.
    """
    try:
        return _map_header(context, file)
    except MalformedFile as error:
        if not file.filename:
            raise
        raise MalformedFile("data", f"{quote(file.filename)}: {error.description}") from None


def _map_header(context: RequestContext, file: MappedFile) -> tuple[Header, int]:
    if len(file.data) < MIN_FILE_BYTES:
        size = len(file.data)
        raise MalformedFile("data", f"is not a safetensors file: it has only {size} bytes")
    file.check(0)
    length = header_length(context, bytes(file.data[:8]), len(file.data))
    for block in range(1, -(-(8 + length) // BLOCK)):
        file.check(block)
    text = bytes(file.data[8 : 8 + length])
    return parse_header(context, text, len(file.data) - 8 - length), 8 + length


def map_tensors(
    context: RequestContext, file: MappedFile, entries: Iterable[Entry], base: int
) -> dict[str, WireTensor]:
    """The tensors of `entries`, in the file's own memory. They are never copied to a GPU.

    One scan over their blocks checks them, and finds the extremes of their values. If the file is
    larger than the request's work memory, so that later scans read it from disk again, this scan
    also takes a sample of the values.

    Args:
        context: The request.
        file: The file.
        entries: Of the header: which tensors.
        base: The offset of the data in the file.
    """
    spans = _Spans([entry for entry in entries if entry.end > entry.begin], base)
    backend = backend_for(torch.device("cpu"))
    data = torch.frombuffer(file.data, dtype=torch.uint8)
    work_memory = context.work_memory

    def scan(block: int) -> list[tuple[str, PartScan]]:
        file.check(block)
        begin, end = block * BLOCK, min((block + 1) * BLOCK, len(data))
        found = []
        for name, dtype, first, last, end_of_part in spans.within(begin, end):
            part = data[first:last].view(dtype)
            spacing = _spacing(len(data), work_memory, dtype)
            sample = _sample(part, end_of_part, spacing) if spacing else None
            found.append((name, PartScan(end_of_part, *backend.extremes(part), sample)))
        context.advance(end - begin)
        return found

    scans: dict[str, list[PartScan]] = {}
    for of_block in backend.map(context, scan, spans.blocks()):
        for name, part in of_block:
            scans.setdefault(name, []).append(part)
    return {
        entry.name: _tensor(context, entry, data, base, joined_scan(scans.get(entry.name, [])))
        for entry in entries
    }


def _spacing(size: int, work_memory: int | None, dtype: torch.dtype) -> int | None:
    """The distance between the elements of a sample; None: no sample is taken."""
    if work_memory is None or size <= work_memory:
        return None
    # The spacing for elements of 2 bytes, also for wider dtypes; twice that for fp8.
    return max(SPACING, size * BYTES_OF_FEW // work_memory // min(dtype.itemsize, 2))


def _sample(part: torch.Tensor, end: int, spacing: int) -> Sample:
    """A sample of the part of a tensor that ends at element `end`."""
    places = sample_places(len(part), spacing, part.device)
    return Sample(places + (end - len(part)), part[places])


class _Spans:
    """The positions of tensors in a file."""

    def __init__(self, entries: list[Entry], base: int) -> None:
        self._entries = sorted(entries, key=lambda entry: entry.begin)
        self._begins = [base + entry.begin for entry in self._entries]
        self._base = base

    def blocks(self) -> list[int]:
        """The blocks that contain a part of a tensor."""
        found: set[int] = set()
        for begin, entry in zip(self._begins, self._entries, strict=True):
            found.update(range(begin // BLOCK, -(-(self._base + entry.end) // BLOCK)))
        return sorted(found)

    def within(self, begin: int, end: int) -> Iterable[tuple[str, torch.dtype, int, int, int]]:
        """The parts of floating tensors in the bytes [begin, end) of the file.

        Yields:
            Name, dtype, the first and last byte of the part, and the element where it ends.
        """
        index = max(0, bisect_right(self._begins, begin) - 1)
        while index < len(self._entries) and self._begins[index] < end:
            entry, dtype = self._entries[index], TORCH_DTYPES.get(self._entries[index].dtype)
            first = max(begin, self._begins[index])
            last = min(end, self._base + entry.end)
            if dtype in BITS and self._begins[index] % dtype.itemsize == 0 and first < last:
                end_of_part = (last - self._begins[index]) // dtype.itemsize
                yield entry.name, dtype, first, last, end_of_part
            index += 1


def _tensor(
    context: RequestContext, entry: Entry, data: torch.Tensor, base: int, scan: Scan | None
) -> WireTensor:
    part = data[base + entry.begin : base + entry.end]
    dtype = TORCH_DTYPES.get(entry.dtype)
    if dtype is not None and (base + entry.begin) % dtype.itemsize:
        # torch does not support unaligned elements.
        part = allocate(context, len(part), backend_for(part.device)).copy_(part)
    return wire_tensor(entry.dtype, entry.shape, part, scan)
