"""Weights with their masks applied."""

from collections.abc import Iterator

from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


def folded(parameter: Parameter) -> Iterator[Tensor]:
    """As `fold`, in parts that are copies: the weight stays."""
    values, mask = parameter.weight.reshape(-1), parameter.mask
    assert mask is not None, "what is folded has a mask"
    backend = backend_for(values.device)
    for begin, end in spans(values.numel(), backend.piece):
        part = values[begin:end].clone()
        backend.fold(part, mask.part(begin, end))
        yield part


def fold(context: RequestContext, parameter: Parameter) -> None:
    """Sets what is pruned to zero in the weight itself, as torch.nn.utils.prune.remove leaves it.

    A zero keeps its element's sign, as weight * mask does: -0.5 becomes -0.0. An infinity or a
    NaN that is pruned becomes zero too, where torch's product is NaN.
    """
    values, mask = parameter.weight.view(-1), parameter.mask
    if mask is None:
        return
    backend = backend_for(values.device)

    def fold_piece(span: tuple[int, int]) -> None:
        backend.fold(values[slice(*span)], mask.part(*span))

    backend.map(context, fold_piece, spans(values.numel(), backend.piece))
