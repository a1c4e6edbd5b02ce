"""Writes tensors as a safetensors file, piece by piece."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from secateur_proto.framing import cut, file_header, tensor_bytes


@dataclass(frozen=True)
class Outgoing:
    """A tensor to write.

    parts: gives its values in their order, flat; called once for the digest and once to send, so
        that what a result adds to the model is in memory one part at a time.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]


class StateDictWriter:
    """A safetensors file of `tensors`, in their order."""

    def __init__(self, tensors: dict[str, Outgoing], metadata: dict[str, str]) -> None:
        self._tensors = tensors
        described = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        self._header = file_header(described, metadata)
        sizes = (tensor_bytes(dtype, shape) for _, dtype, shape in described)
        self.file_bytes = len(self._header) + sum(sizes)

    def digest(self) -> str:
        """The hex BLAKE3 of the file."""
        digest = blake3()
        for part in self._parts():
            digest.update(part)
        return digest.hexdigest()

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file, in chunks of CHUNK_BYTES."""
        return cut(self._parts())

    def _parts(self) -> Iterator[bytes | memoryview]:
        yield self._header
        for tensor in self._tensors.values():
            for part in tensor.parts():
                yield part.view(torch.uint8).cpu().numpy().data
