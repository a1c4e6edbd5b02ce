"""A tensor as the wire has it: bytes, with the name of their dtype."""

from typing import NamedTuple

from torch import Tensor

from secateur_server.backends.dtypes import TORCH_DTYPES
from secateur_server.backends.scan import Scan


class WireTensor(NamedTuple):
    """A tensor.

    dtype: as safetensors spells it.
    data: row-major, flat, of torch's dtype; where torch has none, the bytes as uint8.
    scan: of the values of a floating one.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Tensor
    scan: Scan | None = None

    def values(self) -> Tensor | None:
        """The same memory with its dtype and shape; None where torch has no such dtype."""
        if self.dtype not in TORCH_DTYPES:
            return None
        # torch reads numbers twice as fast as a tuple of them.
        return self.data.view(*self.shape) if self.shape else self.data.view(())


def wire_tensor(
    dtype: str, shape: tuple[int, ...], data: Tensor, scan: Scan | None = None
) -> WireTensor:
    """The tensor that has the bytes `data`."""
    known = TORCH_DTYPES.get(dtype)
    return WireTensor(dtype, shape, data if known is None else data.view(known), scan)
