"""Reads a safetensors file as it arrives, cut anywhere, straight into the tensors' memory."""

from collections.abc import Iterator

import numpy as np
import torch
from blake3 import blake3

from secateur_server.errors import TooShort, WrongLength
from secateur_server.wire.header import Header, header_length, parse_header
from secateur_server.wire.tensors import WireTensor


class ByteStream:
    """The bytes of `chunks` as one stream that holds exactly `announced` bytes."""

    def __init__(self, chunks: Iterator[bytes | memoryview], announced: int) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self.announced = announced
        self._received = 0
        self._digest = blake3()

    def take(self, count: int) -> bytearray:
        """The next `count` bytes. Memory grows as they arrive, not by the word of `count`."""
        taken = bytearray()
        while len(taken) < count:
            taken += self._next(count - len(taken))
        return taken

    def fill(self, target: memoryview) -> None:
        """Fills `target` with the next bytes."""
        filled = 0
        while filled < len(target):
            piece = self._next(len(target) - filled)
            target[filled : filled + len(piece)] = piece
            filled += len(piece)

    def finish(self) -> None:
        """Checks that nothing is left.  Errors: WrongLength."""
        for chunk in self._chunks:
            self._count(chunk)

    def digest(self) -> str:
        """The hex BLAKE3 of what has arrived."""
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
        self._digest.update(chunk)


def read_header(stream: ByteStream) -> Header:
    """Reads the head of a safetensors file.  Errors: MalformedFile, WrongLength."""
    length = header_length(bytes(stream.take(8)), stream.announced)
    return parse_header(bytes(stream.take(length)), stream.announced - 8 - length)


def read_tensors(stream: ByteStream, header: Header, device: torch.device) -> dict[str, WireTensor]:
    """Reads the rest of the file to `device`.

    A tensor's memory is allocated when its turn comes.
    Returns: the tensors in the header's order.  Errors: WrongLength.
    """
    read: dict[str, WireTensor] = {}
    for entry in sorted(header.entries, key=lambda entry: (entry.begin, entry.end)):
        data = _memory(entry.end - entry.begin)
        stream.fill(data.numpy().data)
        read[entry.name] = WireTensor(entry.dtype, entry.shape, data.to(device))
    stream.finish()
    return {entry.name: read[entry.name] for entry in header.entries}


def _memory(size: int) -> torch.Tensor:
    """Memory of `size` bytes, as uint8."""
    if size == 0:  # of numpy's torch makes a tensor that has no view as another dtype
        return torch.empty(0, dtype=torch.uint8)
    # numpy asks for huge pages where torch does not: half the time of first touching them.
    return torch.from_numpy(np.empty(size, np.uint8))
