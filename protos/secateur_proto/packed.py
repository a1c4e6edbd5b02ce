"""The packed layout, which docs/packed.md describes: what writers and readers share."""

import numpy as np

from secateur_proto.dtypes import DTYPES

# The entry of a file's metadata that describes its packed tensors, and the version of the layout.
METADATA, VERSION = "secateur.packed", 1
# How a file becomes dense again; the server reads no packed ones.
UNPACK = "secateur finalize PACKED -o OUT, or secateur.load(PACKED)"

# Elements of a block. Each is a frame of zstd, which is read and written without the others.
BLOCK = 1 << 18
# The lengths of the frames, before the first of them.
TABLE = np.dtype("<u4")


def element_bytes(dtype: str) -> int:
    """Bytes of an element; elements smaller than a byte are packed as bytes."""
    return max(1, DTYPES[dtype].bits // 8)


def block_count(size: int, width: int) -> int:
    """Blocks of `size` bytes, with elements of `width` bytes."""
    return -(-size // (BLOCK * width))
