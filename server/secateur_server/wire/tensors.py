"""A tensor as the wire has it: bytes, with the name of their dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.devices.looks import Seen

# The dtypes that torch can compute with here. Tensors of others pass through as bytes.
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
WIRE_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class WireTensor:
    """A tensor.

    dtype: as safetensors spells it.  data: uint8, flat, the row-major little-endian bytes.
    seen: of a floating one, what a first look at its values told.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Tensor
    seen: Seen | None = None

    def values(self) -> Tensor | None:
        """The same memory with its dtype and shape; None where torch has no such dtype."""
        dtype = TORCH_DTYPES.get(self.dtype)
        return None if dtype is None else self.data.view(dtype).view(self.shape)
