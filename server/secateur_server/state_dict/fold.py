"""Weights with their masks applied."""

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import signed_bits
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


def folded(parameter: Parameter) -> Iterator[Tensor]:
    """Yields a weight with its mask applied, as copies of its parts. The weight is not changed."""
    values, mask = parameter.weight.reshape(-1), parameter.mask
    assert mask is not None, "only parameters with a mask are folded"
    backend = backend_for(values.device)
    for begin, end in spans(values.numel(), backend.piece):
        part = values[begin:end].clone()
        backend.fold(part, mask.part(begin, end))
        yield part


def zeroed(parameter: Parameter) -> Iterator[Tensor]:
    """Yields the bytes of a weight with pruned elements set to 0, without their signs, in parts."""
    values, mask = parameter.weight.reshape(-1), parameter.mask
    assert mask is not None, "only parameters with a mask have pruned elements"
    bits, _ = signed_bits(values)
    for begin, end in spans(bits.numel(), backend_for(bits.device).piece):
        yield bits[begin:end].masked_fill(~mask.flags(begin, end), 0).view(torch.uint8)


def fold(context: RequestContext, parameter: Parameter) -> None:
    """Sets pruned elements of the weight itself to zero, as torch.nn.utils.prune.remove does.

    A zero keeps its element's sign, as in weight * mask: -0.5 becomes -0.0. A pruned infinity or
    NaN becomes zero too, where torch's product is NaN.

    Args:
        context: The request.
        parameter: Its weight is written to. Nothing happens if it has no mask.
    """
    values, mask = parameter.weight.view(-1), parameter.mask
    if mask is None:
        return
    backend = backend_for(values.device)

    def fold_piece(span: tuple[int, int]) -> None:
        backend.fold(values[slice(*span)], mask.part(*span))

    backend.map(context, fold_piece, spans(values.numel(), backend.piece))
