"""How sparse is a tensor, and where."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.pruning import kernels, parallel
from secateur_server.pruning.parallel import each, spans
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
    weight, mask = parameter.weight.reshape(-1), parameter.mask
    flat = None if mask is None else mask.reshape(-1)

    def counts_of(span: tuple[int, int]) -> tuple[int, int]:
        values, kept = weight[slice(*span)], None if flat is None else flat[slice(*span)]
        pruned = 0 if kept is None else len(kept) - int(kept.count_nonzero())
        if piece := kernels.piece_of(values, kept):
            return piece.count_zeros(), pruned
        zero = values == 0
        if kept is not None:
            zero |= ~kept
        return int(zero.count_nonzero()), pruned

    counts = each(counts_of, spans(len(weight)))
    zeros, pruned = sum(zero for zero, _ in counts), sum(pruned for _, pruned in counts)
    dims = range(parameter.weight.dim()) if parameter.weight.dim() > 1 else ()
    slices = tuple(_zero_slices(parameter, dim, zeros) for dim in dims)
    return Sparsity(zeros, len(weight), pruned, slices)


def _zero_slices(parameter: Parameter, dim: int, zeros: int) -> int:
    """How many slices along `dim` are wholly zero. A corner of each settles it for most."""
    weight = parameter.weight.movedim(dim, 0)
    if zeros == 0 or zeros * len(weight) < weight.numel():  # not even one slice's worth
        return 0
    mask = None if parameter.mask is None else parameter.mask.movedim(dim, 0)

    def zero_in(part: tuple[slice | Tensor, ...]) -> Tensor:
        zero = weight[part] == 0
        if mask is not None:
            zero |= ~mask[part]
        return zero.flatten(1).all(1)

    corner = (slice(None), *[slice(8)] * (weight.dim() - 1))
    left = zero_in(corner).nonzero().view(-1)
    size = max(1, parallel.PIECE * len(weight) // weight.numel())
    shares = [left[begin:end] for begin, end in spans(len(left), size)]
    return sum(each(lambda share: int(zero_in((share,)).count_nonzero()), shares))


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
    bits = weight.reshape(-1).view(_BITS[weight.element_size()])
    kept, sign = mask.reshape(-1), torch.iinfo(bits.dtype).min
    folded = torch.empty_like(bits)

    def fold_piece(span: tuple[int, int]) -> None:
        part = slice(*span)
        torch.where(kept[part], bits[part], bits[part] & sign, out=folded[part])

    each(fold_piece, spans(len(bits)))
    return folded.view(weight.dtype).view(weight.shape)
