"""How sparse is a tensor, and where."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.pruning.spec import Parameter


@dataclass(frozen=True)
class Sparsity:
    """Counts of one tensor.

    zeros: elements that are 0 with the mask applied.  pruned: elements that the mask prunes.
    zero_slices: for each dimension, how many slices are wholly zero; empty under 2 dimensions.
    """

    zeros: int
    total: int
    pruned: int
    zero_slices: tuple[int, ...]


def measure(parameter: Parameter) -> Sparsity:
    """Counts the zeros of a parameter, -0.0 among them."""
    weight, mask = parameter.weight, parameter.mask
    zero = weight == 0
    if mask is not None:
        zero |= ~mask
    zeros = int(zero.count_nonzero())
    pruned = 0 if mask is None else weight.numel() - int(mask.count_nonzero())
    dims = range(weight.dim()) if weight.dim() > 1 else ()
    return Sparsity(
        zeros, weight.numel(), pruned, tuple(_zero_slices(zero, dim, zeros) for dim in dims)
    )


def _zero_slices(zero: Tensor, dim: int, zeros: int) -> int:
    slices = zero.shape[dim]
    if zeros == 0 or zeros * slices < zero.numel():  # not even one slice's worth
        return 0
    return int(zero.movedim(dim, 0).flatten(1).all(1).count_nonzero())


# The integers that have the bits of a floating dtype.
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def fold(parameter: Parameter) -> Tensor:
    """The weight with what is pruned set to zero, as torch.nn.utils.prune.remove leaves it.

    A zero keeps its element's sign, as weight * mask does: -0.5 becomes -0.0. An infinity or a
    NaN that is pruned becomes zero too, where torch's product is NaN.
    """
    weight, mask = parameter.weight, parameter.mask
    if mask is None:
        return weight
    bits = weight.contiguous().view(_BITS[weight.element_size()])
    sign = torch.iinfo(bits.dtype).min
    return torch.where(mask, bits, bits & sign).view(weight.dtype)


def pack(mask: Tensor) -> Tensor:
    """A mask as bits: row-major, lowest bit first, the last byte padded with 0.

    mask: bool, any shape.  Returns: uint8, ceil(elements / 8).
    """
    flat = mask.reshape(-1).view(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    packed = padded[:, 0].clone()
    for bit in range(1, 8):
        packed |= padded[:, bit] << bit
    return packed
