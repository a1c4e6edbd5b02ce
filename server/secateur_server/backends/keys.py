"""The integers that order scores: their keys.

A key is a non-negative integer that orders units as their scores do. Of a floating score it is
the bit pattern of the absolute value, which IEEE 754 orders as the values; so one selection serves
every dtype, and exactly.
"""

import struct

import torch
from torch import Tensor

from secateur_server.backends.dtypes import FP8

# The integers that have the bits of a floating dtype.
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    **dict.fromkeys(FP8, torch.int8),
}

# The keys of infinity; those of NaN are above. E4M3 has none: that of its largest number.
INFINITY = {
    dtype: int(torch.tensor(torch.inf, dtype=dtype).view(bits))
    for dtype, bits in BITS.items()
    if dtype != torch.float8_e4m3fn
}
INFINITY[torch.float8_e4m3fn] = 0x7E

# What fp8 and integers rank as: wider dtypes that have all their values. But int64 has more than
# float64: it ranks as the nearest one.
_RANKED_AS = {
    **dict.fromkeys((*FP8, torch.int8, torch.uint8), torch.float16),
    torch.int16: torch.float32,
    **dict.fromkeys((torch.int32, torch.int64), torch.float64),
}


def ranked_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` rank: itself, but for fp8 and integers."""
    return _RANKED_AS.get(dtype, dtype)


def signed_bits(values: Tensor) -> tuple[Tensor, int]:
    """The bits of values as integers, and the bit that is their sign; 0 for integers."""
    if values.dtype not in BITS:
        return (values.view(torch.int8) if values.dtype == torch.uint8 else values), 0
    bits = values.view(BITS[values.dtype])
    return bits, torch.iinfo(bits.dtype).min


def picked(values: Tensor, index: Tensor) -> Tensor:
    """The values at an index, or those that it flags, of any dtype: not every one has indexing."""
    bits, _ = signed_bits(values)
    return bits[index].view(values.dtype)


def score_at(key: int, dtype: torch.dtype) -> float:
    """The score of a dtype that has a key."""
    if dtype in _FORMATS:
        of_key, of_score = _FORMATS[dtype]
        (score,) = struct.unpack(of_score, struct.pack(of_key, key))
        return float(score)
    return torch.tensor(key, dtype=BITS[dtype]).view(dtype).item()


# A tensor for each of thousands of keys takes long.
_FORMATS = {torch.float64: ("=q", "=d"), torch.float32: ("=i", "=f")}


def as_keys(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """The keys of scores, compared as `dtype`, floating and not fp8."""
    bits = scores.to(dtype).view(BITS[dtype])
    return bits & torch.iinfo(bits.dtype).max  # without the sign
