"""A tensor as safetensors stores it: bytes with a dtype and a shape."""

from typing import NamedTuple

from torch import Tensor

from secateur_server.backends.dtypes import TORCH_DTYPES
from secateur_server.backends.scan import Scan


class WireTensor(NamedTuple):
    """A tensor as safetensors stores it.

    Attributes:
        dtype: As safetensors spells it.
        shape: Of the tensor.
        data: Row-major, flat, of torch's dtype; uint8 bytes if torch does not have the dtype.
        scan: Facts about a floating tensor's values that were found while it was read.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Tensor
    scan: Scan | None = None

    def values(self) -> Tensor | None:
        """A view with dtype and shape; None if torch does not have the dtype."""
        if self.dtype not in TORCH_DTYPES:
            return None
        # torch parses separate arguments twice as fast as a tuple.
        return self.data.view(*self.shape) if self.shape else self.data.view(())


def wire_tensor(
    dtype: str, shape: tuple[int, ...], data: Tensor, scan: Scan | None = None
) -> WireTensor:
    """Makes a tensor of bytes.

    Args:
        dtype: As safetensors spells it.
        shape: Of the tensor.
        data: Its bytes, flat uint8.
        scan: Facts about its values that were found while it was read.
    """
    known = TORCH_DTYPES.get(dtype)
    return WireTensor(dtype, shape, data if known is None else data.view(known), scan)
