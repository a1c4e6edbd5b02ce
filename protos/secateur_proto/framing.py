"""How a state_dict is laid out as one safetensors file, and cut into messages.

Both ends write with these functions: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from secateur_proto.dtypes import DTYPES

# Measured: 1 MiB carries about 1 GB/s through Python's gRPC, 64 KiB and 16 MiB half of that.
CHUNK_BYTES = 1 << 20


def mask_bytes(elements: int) -> int:
    """Bytes of a packed mask of `elements` bits."""
    return (elements + 7) // 8


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. dtype: a key of DTYPES."""
    return mask_bytes(math.prod(shape) * DTYPES[dtype].bits)


def file_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The head of a safetensors file that holds `tensors` (name, dtype, shape) in their order.

    The length in 8 bytes, then JSON, padded with spaces so that the data begins at a multiple of 8.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + tensor_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def cut(
    parts: Iterable[bytes | memoryview], size: int = CHUNK_BYTES
) -> Iterator[bytes | memoryview]:
    """Cuts the concatenation of `parts` into pieces of `size` bytes; only the last is shorter.

    parts: bytes, or one-dimensional views of bytes. Pieces within one part are views of it.
    """
    piece = bytearray()
    for part in parts:
        view = memoryview(part)
        begin = 0
        while begin < len(view):
            taken = view[begin : begin + size - len(piece)]
            begin += len(taken)
            if len(taken) == size:
                yield taken
                continue
            piece += taken
            if len(piece) == size:
                yield bytes(piece)
                piece.clear()
    if piece:
        yield bytes(piece)
