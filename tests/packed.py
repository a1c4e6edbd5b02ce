"""Packed files read by their documented layout, in plain loops: the oracle of the tests."""

import json
import struct
from pathlib import Path

import zstandard

BLOCK = 1 << 18
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "I16": 16}
BITS |= {"U16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}

Stored = tuple[str, list[int], bytes]


def read_packed(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Returns dtype, shape and bytes of each tensor, and the metadata without the description."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    packed = json.loads(metadata.pop("secateur.packed"))
    assert packed.keys() == {"version", "tensors"}
    assert packed["version"] == 1
    assert packed["tensors"].keys() <= header.keys()
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        stored = data[begin:end]
        if name not in packed["tensors"]:
            found[name] = entry["dtype"], entry["shape"], stored
            continue
        dtype, shape = packed["tensors"][name]
        assert (entry["dtype"], entry["shape"]) == ("U8", [len(stored)])
        found[name] = dtype, shape, unpacked(stored, dtype, shape)
    return found, metadata


def packed_names(path: Path) -> set[str]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return set(json.loads(metadata["secateur.packed"])["tensors"])


def unpacked(stored: bytes, dtype: str, shape: list[int]) -> bytes:
    elements = 1
    for size in shape:
        elements *= size
    blocks = -(-elements // BLOCK)
    lengths = struct.unpack_from(f"<{blocks}I", stored)
    dense, begin = b"", 4 * blocks
    for block, length in enumerate(lengths):
        frame = zstandard.ZstdDecompressor().decompress(stored[begin : begin + length])
        dense += unpacked_block(frame, min(BLOCK, elements - block * BLOCK), BITS[dtype] // 8)
        begin += length
    assert begin == len(stored)
    return dense


def unpacked_block(frame: bytes, elements: int, width: int) -> bytes:
    mask_bytes = (elements + 7) // 8
    flags = [frame[i // 8] >> i % 8 & 1 for i in range(elements)]
    kept = sum(flags)
    planes = len(frame) - kept * width
    assert planes in (mask_bytes, mask_bytes + (elements - kept + 7) // 8)
    dense, value, zero = bytearray(), 0, 0
    for flag in flags:
        if flag:
            dense += bytes(frame[planes + place * kept + value] for place in range(width))
            value += 1
        else:
            sign = planes > mask_bytes and frame[mask_bytes + zero // 8] >> zero % 8 & 1
            dense += bytes(width - 1) + (b"\x80" if sign else b"\0")
            zero += 1
    return bytes(dense)
