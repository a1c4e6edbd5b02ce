"""Tensors without some of their slices, made piece by piece."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.backends import allocate, backend_for, spans
from secateur_server.backends.keys import signed_bits
from secateur_server.backends.masks import Mask, all_kept
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter

# From a dimension of a tensor to the indices of the slices that are kept: int64, ascending.
Slices = Mapping[int, Tensor]

# Returns the elements [begin, end) of a tensor, flat.
Read = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Shrinking:
    """What a state_dict keeps.

    Attributes:
        groups: The name of each group, and which of its units are kept: bool.
        slices: The kept slices of each tensor that loses some, by its name.
        unmasked: The names of tensors that may lose elements which no mask prunes.
    """

    groups: Sequence[tuple[str, Tensor]]
    slices: Mapping[str, Slices]
    unmasked: Collection[str]

    def removes_all_pruned(self, context: RequestContext, name: str, parameter: Parameter) -> bool:
        """Whether the mask of a tensor prunes only elements that are removed."""
        if parameter.mask is None or name in self.unmasked:
            return False
        elements = math.prod(smaller_shape(parameter.weight.shape, self.slices[name]))
        return parameter.mask.kept(context) == elements


def smaller_shape(shape: Sequence[int], kept: Slices) -> tuple[int, ...]:
    """Returns the shape of a tensor without its other slices."""
    return tuple(kept[dim].numel() if dim in kept else size for dim, size in enumerate(shape))


def smaller_parts(values: Tensor, mask: Mask | None, kept: Slices) -> Iterator[Tensor]:
    """Yields the elements of a tensor without its other slices, in order, as flat parts.

    Args:
        values: The tensor. It is not changed.
        mask: Its pruned elements become zero, as in `folded`. None: there are none.
        kept: The slices that are kept.
    """
    flat, backend = values.reshape(-1), backend_for(values.device)

    def read(begin: int, end: int) -> Tensor:
        if mask is None:
            return signed_bits(flat[begin:end])[0]
        before = begin % 8
        part = flat[begin - before : end].clone()
        backend.fold(part, mask.part(begin - before, end))
        return signed_bits(part[before:])[0]

    for part in _smaller(read, values.shape, _on(values.device, kept), backend.piece):
        yield part.view(values.dtype)


def smaller_parameter(
    context: RequestContext, name: str, parameter: Parameter, shrinking: Shrinking
) -> Parameter:
    """Returns a parameter without the slices that are removed, to be measured.

    Args:
        context: The request. A large copy is on disk.
        name: Of the parameter, which loses slices.
        parameter: Its weight and its mask are not changed.
        shrinking: The kept slices.

    Returns:
        A copy. Its weight has no values of its own where it is known that none of them is zero.
    """
    weight, mask, kept = parameter.weight, parameter.mask, shrinking.slices[name]
    shape = smaller_shape(weight.shape, kept)
    if mask is not None and shrinking.removes_all_pruned(context, name, parameter):
        mask = all_kept(context, math.prod(shape), weight.device)
    elif mask is not None:
        mask = _smaller_mask(context, mask, weight, kept)
    if parameter.is_nonzero:
        return Parameter(weight.new_empty(()).expand(shape), mask, parameter.scan)
    size, backend = math.prod(shape) * weight.element_size(), backend_for(weight.device)
    smaller = allocate(context, size, backend).view(weight.dtype)
    begin = 0
    for part in context.each(smaller_parts(weight, None, kept)):
        smaller[begin : begin + len(part)].copy_(part)
        begin += len(part)
    return Parameter(smaller.view(shape), mask)


def _smaller_mask(context: RequestContext, mask: Mask, weight: Tensor, kept: Slices) -> Mask:
    """The mask of a weight without its other slices."""
    elements, backend = math.prod(smaller_shape(weight.shape, kept)), backend_for(weight.device)
    flags = allocate(context, elements, backend).view(torch.bool)
    begin = 0
    of_mask = _smaller(mask.flags, weight.shape, _on(weight.device, kept), backend.piece)
    for part in context.each(of_mask):
        flags[begin : begin + len(part)] = part
        begin += len(part)
    return Mask(backend.pack(flags), elements)


def _smaller(read: Read, shape: Sequence[int], kept: Slices, piece: int) -> Iterator[Tensor]:
    """Yields the kept elements of a tensor, at most about `piece` at once."""
    elements = math.prod(shape)
    if elements <= piece:
        yield _without(read(0, elements).view(*shape), kept.items())
    else:
        yield from _within(read, 0, shape, [kept.get(dim) for dim in range(len(shape))], piece)


def _without(lines: Tensor, kept: Iterable[tuple[int, Tensor | None]]) -> Tensor:
    """A tensor without its other slices, flat."""
    for dim, index in kept:
        if index is not None and len(index) < lines.shape[dim]:
            lines = lines.index_select(dim, index)
    return lines.reshape(-1)


def _within(
    read: Read, begin: int, shape: Sequence[int], kept: Sequence[Tensor | None], piece: int
) -> Iterator[Tensor]:
    """Does `_smaller` for the part of a tensor that begins at an element."""
    size, inner, rows = shape[0], math.prod(shape[1:]), kept[0]
    if inner > piece:
        for row in range(size) if rows is None else rows.tolist():
            yield from _within(read, begin + row * inner, shape[1:], kept[1:], piece)
        return
    for first, last in spans(size, max(1, piece // max(1, inner))):
        wanted = None if rows is None else rows[slice(*_places(rows, first, last))] - first
        if wanted is not None and not len(wanted):
            continue
        lines = read(begin + first * inner, begin + last * inner).view(last - first, *shape[1:])
        yield _without(lines, enumerate([wanted, *kept[1:]]))


def _places(rows: Tensor, first: int, last: int) -> list[int]:
    """Where the indices of [first, last) begin and end among ascending ones."""
    bounds = torch.tensor([first, last], device=rows.device)
    places: list[int] = torch.searchsorted(rows, bounds).tolist()
    return places


def _on(device: torch.device, kept: Slices) -> Slices:
    return {dim: index.to(device) for dim, index in kept.items()}
