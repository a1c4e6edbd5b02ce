"""A tensor as the wire has it: bytes, with the name of their dtype."""

from dataclasses import dataclass

from torch import Tensor

from secateur_server.backends.dtypes import TORCH_DTYPES
from secateur_server.backends.looks import Seen


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
