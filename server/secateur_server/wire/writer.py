"""Writes tensors as safetensors files, piece by piece."""

from collections.abc import Callable, Iterable, Iterator, Mapping
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

    parts: gives its values in their order, flat; called once for the digest and once to send, so
        that what a result adds to the model is in memory one part at a time.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class OutgoingFile:
    """A file to write.

    blake3: hexadecimal.  parts: gives its bytes.  seek: gives those from an offset on, where that
    takes less than to make all.
    """

    filename: str
    size: int
    blake3: str
    parts: Callable[[], Iterable[Bytes]]
    seek: Callable[[int], Iterable[Bytes]] | None = None

    def parts_from(self, context: RequestContext, offset: int) -> Iterable[Bytes]:
        """Its bytes from `offset` on."""
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
    """A safetensors file of `tensors`, in their order.

    The parts of a large one are made twice: here, for the digest, and to be sent.
    """
    header, size = state_dict_head(tensors, metadata)

    def data() -> Iterator[torch.Tensor]:
        for tensor in tensors.values():
            yield from tensor.parts()

    return _file(context, filename, header, size, data)


def flat_file(
    context: RequestContext, filename: str, tensors: Mapping[str, torch.Tensor]
) -> OutgoingFile:
    """A safetensors file of tensors of bytes, 1-D."""
    described = ((name, "U8", (tensor.numel(),)) for name, tensor in tensors.items())
    return _file(context, filename, *file_head(described), lambda: _joined(tensors.values()))


def _joined(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same bytes; small tensors on the CPU that follow each other are one part."""
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
            yield from _on_host(part.view(torch.uint8))

    if size <= CHUNK_BYTES:  # of what is small the parts are made once
        return bytes_file(context, filename, b"".join(parts()))
    return OutgoingFile(filename, size, _digest(context, parts()), parts)


def _on_host(data: torch.Tensor) -> Iterator[memoryview]:
    """Bytes from any device, of which no more than a part is held here."""
    if data.device.type == "cpu":
        yield data.numpy().data
    else:
        yield from (part.cpu().numpy().data for part in torch.split(data, _PART_BYTES))


def state_dict_head(
    tensors: Mapping[str, Outgoing], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """The head of a file of `tensors`, and the length of the whole file."""
    described = ((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    return file_head(described, metadata)


def bytes_file(context: RequestContext, filename: str, data: bytes) -> OutgoingFile:
    """A file of bytes."""
    return OutgoingFile(filename, len(data), _digest(context, [data]), lambda: [data])


def chunks(
    context: RequestContext, files: Iterable[OutgoingFile], offset: int = 0
) -> Iterator[Bytes]:
    """The files, one behind another, in chunks of CHUNK_BYTES.  offset: where to begin."""
    return cut(chain.from_iterable(_files_from(context, files, offset)))


def _files_from(
    context: RequestContext, files: Iterable[OutgoingFile], offset: int
) -> Iterator[Iterable[Bytes]]:
    for file in files:
        if offset < file.size:
            yield file.parts_from(context, offset)
        offset = max(0, offset - file.size)


def track_progress(context: RequestContext, parts: Iterable[Bytes]) -> Iterator[Bytes]:
    """The same bytes, in parts of which each takes well under a second.  Errors: Cancelled."""
    for part in parts:
        view = memoryview(part)
        for begin in range(0, len(view), _PART_BYTES):
            context.advance(len(view[begin : begin + _PART_BYTES]))
            yield view[begin : begin + _PART_BYTES]


_PART_BYTES = 16 << 20
_JOINED_BYTES = 1 << 16


def _digest(context: RequestContext, parts: Iterable[Bytes]) -> str:
    digest = blake3()
    for part in track_progress(context, parts):
        digest.update(part)
    return digest.hexdigest()
