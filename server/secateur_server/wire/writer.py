"""Writes tensors as safetensors files, one part at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from blake3 import blake3
from torch import Tensor

from secateur_proto.framing import CHUNK_BYTES, cut, file_head
from secateur_server.runtime.context import RequestContext

Bytes = bytes | memoryview


@dataclass(frozen=True)
class Outgoing:
    """A tensor to write.

    Attributes:
        dtype: As safetensors spells it.
        shape: Of the tensor.
        parts: Returns its values in order, as flat parts. It is called once for the digest and once
            to send, so that only one part of a computed result is in memory at a time.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class OutgoingFile:
    """A file to write.

    Attributes:
        filename: Without a folder.
        size: Bytes.
        blake3: Hexadecimal.
        parts: Returns its bytes.
        seek: Returns its bytes from an offset on; None: they must be made from the beginning.
    """

    filename: str
    size: int
    blake3: str
    parts: Callable[[], Iterable[Bytes]]
    seek: Callable[[int], Iterable[Bytes]] | None = None

    def parts_from(self, context: RequestContext, offset: int) -> Iterable[Bytes]:
        """The bytes of the file from `offset` on."""
        if offset and self.seek:
            return self.seek(offset)
        return _without_begin(context, self.parts(), offset)


def _without_begin(context: RequestContext, parts: Iterable[Bytes], offset: int) -> Iterator[Bytes]:
    for part in track_progress(context, parts) if offset else parts:
        skipped = min(offset, len(part))
        offset -= skipped
        yield memoryview(part)[skipped:]


def state_dict_file(
    context: RequestContext,
    filename: str,
    tensors: Mapping[str, Outgoing],
    metadata: Mapping[str, str],
) -> OutgoingFile:
    """A safetensors file of tensors.

    The parts of a large file are made twice: here for the digest, and again to be sent.

    Args:
        context: The request.
        filename: Without a folder.
        tensors: By name, in the order of the file.
        metadata: The file's `__metadata__`.
    """
    header, size = state_dict_head(tensors, metadata)

    def data() -> Iterator[torch.Tensor]:
        for tensor in tensors.values():
            yield from tensor.parts()

    return _file(context, filename, header, size, data)


def flat_file(
    context: RequestContext, filename: str, tensors: Mapping[str, torch.Tensor]
) -> OutgoingFile:
    """A safetensors file of 1-D uint8 tensors.

    Args:
        context: The request.
        filename: Without a folder.
        tensors: By name, in the order of the file.
    """
    described = ((name, "U8", (tensor.numel(),)) for name, tensor in tensors.items())
    return _file(context, filename, *file_head(described), lambda: _joined(tensors.values()))


def _joined(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same bytes, with adjacent small tensors on the CPU joined to one part."""
    small: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        count = tensor.numel()
        if not tensor.is_cpu or size + count > _JOINED_BYTES:
            yield from [torch.cat(small)] if small else []
            small, size = [], 0
        if not tensor.is_cpu or count > _JOINED_BYTES:
            yield tensor
        else:
            small.append(tensor)
            size += count
    yield from [torch.cat(small)] if small else []


def _file(
    context: RequestContext,
    filename: str,
    header: bytes,
    size: int,
    data: Callable[[], Iterable[torch.Tensor]],
) -> OutgoingFile:
    def parts() -> Iterator[Bytes]:
        yield header
        for part in data():
            yield from on_host(part.view(torch.uint8))

    if size <= CHUNK_BYTES:  # the parts of a small file are made once
        return bytes_file(context, filename, b"".join(parts()))
    return OutgoingFile(filename, size, _digest(context, parts(), size), parts)


def on_host(data: torch.Tensor) -> Iterator[memoryview]:
    """Copies bytes of any device to the host, one part at a time. data: uint8, flat."""
    if data.device.type == "cpu":
        yield data.numpy().data
    else:
        yield from (part.cpu().numpy().data for part in torch.split(data, _PART_BYTES))


def state_dict_head(
    tensors: Mapping[str, Outgoing], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """The header of a file of `tensors`, and the size of the whole file."""
    described = ((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    return file_head(described, metadata)


def bytes_file(context: RequestContext, filename: str, data: bytes) -> OutgoingFile:
    """A file of `data`."""
    return OutgoingFile(filename, len(data), _digest(context, [data], len(data)), lambda: [data])


def digest_of(files: Sequence[OutgoingFile]) -> str:
    """Returns the digest of a single file; empty for several files or none."""
    return files[0].blake3 if len(files) == 1 else ""


def chunks(
    context: RequestContext, files: Iterable[OutgoingFile], offset: int = 0
) -> Iterator[Bytes]:
    """Concatenates files, in chunks of CHUNK_BYTES.

    Args:
        context: The request.
        files: In order.
        offset: The first byte of the concatenation to send.
    """
    return cut(chain.from_iterable(_files_from(context, files, offset)))


def _files_from(
    context: RequestContext, files: Iterable[OutgoingFile], offset: int
) -> Iterator[Iterable[Bytes]]:
    for file in files:
        if offset < file.size:
            yield file.parts_from(context, offset)
        offset = max(0, offset - file.size)


def track_progress(context: RequestContext, parts: Iterable[Bytes]) -> Iterator[Bytes]:
    """Yields the same bytes in parts that each take well under a second, and counts the progress.

    Raises:
        Cancelled: The request has been cancelled.
    """
    for part in parts:
        view = memoryview(part)
        for begin in range(0, len(view), _PART_BYTES):
            context.advance(len(view[begin : begin + _PART_BYTES]))
            yield view[begin : begin + _PART_BYTES]


_PART_BYTES = 16 << 20
_JOINED_BYTES = 1 << 16


# From this size on a file is hashed by all cores, which wait for each other after each part.
_HASHED_BY_ALL = 32 << 20


def _digest(context: RequestContext, parts: Iterable[Bytes], size: int) -> str:
    digest = blake3(max_threads=blake3.AUTO if size >= _HASHED_BY_ALL else 1)
    for part in track_progress(context, parts):
        digest.update(part)
    return digest.hexdigest()
