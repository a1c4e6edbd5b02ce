"""What the trace knows about a tensor: which of its slices belong to which unit."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.traced.units import Units


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Attributes:
        shape: Its lengths.
        layers: Labels of its elements. An element is cut if one of its labels is. A layer has as
            many dimensions as the tensor, and length 1 along those where it is constant.
        is_zero: Whether elements are zero in the masked model if their unit is pruned: true of
            parameters, and not of activations, which may be anything.
    """

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()
    is_zero: bool = False


def along(labels: Tensor, dim: int, dims: int) -> Tensor:
    """Returns labels of one dimension as a layer of a tensor that has `dims`."""
    shape = [1] * dims
    shape[dim] = -1
    return labels.reshape(shape)


def named(units: Units, name: str, shape: tuple[int, ...], is_zero: bool) -> Value:
    """Makes the value of a tensor of the state_dict: each slice has a label of its own."""
    return _each_slice(units, units.name(name, shape), shape, is_zero)


def constant(units: Units, shape: tuple[int, ...]) -> Value:
    """Makes the value of a tensor that is the same everywhere, so that its length may change."""
    return _each_slice(units, [units.fresh(length) for length in shape], shape, False)


def _each_slice(units: Units, labels: list[Tensor], shape: tuple[int, ...], is_zero: bool) -> Value:
    dims = len(shape)
    layers = [along(found, dim, dims) for dim, found in enumerate(labels)]
    return Value(shape, tuple(layer for layer in layers if layer.numel() > 1), is_zero)


def varying(units: Units, layer: Tensor) -> set[int]:
    """Returns the dimensions along which a layer has several units."""
    found = units.units(layer)
    return {dim for dim in range(found.dim()) if not _is_constant(found, dim)}


def _is_constant(labels: Tensor, dim: int) -> bool:
    return labels.size(dim) == 1 or bool((labels == labels.narrow(dim, 0, 1)).all())


def settled(units: Units, value: Value, reason: str) -> Value:
    """Returns the value with length 1 in layers where they are constant.

    A layer that is constant everywhere is one unit, which is never cut.
    """
    layers = []
    for layer in value.layers:
        layer = units.find(layer)
        for dim in range(layer.dim()):
            if _is_constant(layer, dim):
                layer = layer.narrow(dim, 0, 1)
        if layer.numel() > 1:
            layers.append(layer.clone())
        else:
            units.freeze(layer, reason)
    return replace(value, layers=tuple(layers))


def tie(units: Units, value: Value, dims: Collection[int], reason: str) -> Value:
    """Makes slices along some dimensions one unit, since an operation mixes them.

    Args:
        units: Changed.
        value: The operand.
        dims: The dimensions.
        reason: Why what is left of no other dimension stays whole.

    Returns:
        The value, constant along these dimensions.
    """
    dims = {dim % len(value.shape) for dim in dims}
    layers = []
    for layer in value.layers:
        if spread(layer) <= dims:  # nothing is left to tell units apart
            units.freeze(layer, reason)
            continue
        for dim in dims & spread(layer):
            units.union(layer, layer.narrow(dim, 0, 1), reason)
            layer = layer.narrow(dim, 0, 1)
        layers.append(layer)
    return settled(units, replace(value, layers=tuple(layers)), reason)


def freeze(units: Units, value: Value, reason: str) -> None:
    """Keeps everything in a value whole."""
    for layer in value.layers:
        units.freeze(layer, reason)


def aligned(value: Value, dims: int) -> Value:
    """Returns the value with dimensions of length 1 in front, as broadcasting does."""
    front = (1,) * (dims - len(value.shape))
    layers = tuple(layer.reshape(front + tuple(layer.shape)) for layer in value.layers)
    return replace(value, shape=front + tuple(value.shape), layers=layers)


def together(units: Units, operands: Sequence[Value], reason: str) -> Value:
    """Makes slices of operands that meet element by element one unit; shapes are broadcast.

    A slice that meets a tensor that is not cut along this dimension stays whole.

    Returns:
        The value of the result.
    """
    result = operands[0]
    for operand in operands[1:]:
        dims = max(len(result.shape), len(operand.shape))
        result = _pair(units, aligned(result, dims), aligned(operand, dims), reason)
    return result


def _pair(units: Units, a: Value, b: Value, reason: str) -> Value:
    a = tie(units, a, _uncovered(a, b), reason)
    b = tie(units, b, _uncovered(b, a), reason)
    kept = list(a.layers)
    for layer in b.layers:
        matches = [other for other in a.layers if spread(other) & spread(layer)]
        for other in matches:
            units.union(other, layer, reason)
        if not matches:
            kept.append(layer)
    shape = tuple(max(pair) for pair in zip(a.shape, b.shape, strict=True))
    return settled(units, Value(shape, tuple(kept), a.is_zero and b.is_zero), reason)


def _uncovered(a: Value, b: Value) -> list[int]:
    """Dimensions along which b is not cut, and is not broadcast either."""
    covered = set().union(*map(spread, b.layers))
    return [dim for dim, length in enumerate(b.shape) if length > 1 and dim not in covered]


def spread(layer: Tensor) -> set[int]:
    """Returns the dimensions of a layer that are not of length 1."""
    return {dim for dim, length in enumerate(layer.shape) if length > 1}


def contract(units: Units, a: Value, b: Value, dim: int, reason: str) -> Value:
    """Sums the product of two values over a dimension that is in both.

    A parameter's slices are zero where their unit is pruned, so that each slice of the other
    operand may be cut with one of the parameter. Two activations promise nothing: all that is
    summed is one unit.

    Args:
        units: Changed.
        a: Has as many dimensions as b.
        b: Broadcast with a along all other dimensions.
        dim: Negative counts from the end.
        reason: Why what cannot be cut stays whole.

    Returns:
        The value, with length 1 along `dim`.
    """
    dim %= len(a.shape)
    others = [other for other in range(len(a.shape)) if other != dim]
    if a.is_zero or b.is_zero:
        ends = [_only(value, dim, True) for value in (a, b)]
        together(units, [tie(units, end, others, reason) for end in ends], reason)
        a, b = _only(a, dim, False), _only(b, dim, False)
    a, b = (collapsed(tie(units, value, [dim], reason), [dim]) for value in (a, b))
    return replace(together(units, [a, b], reason), is_zero=False)


def _only(value: Value, dim: int, has_dim: bool) -> Value:
    layers = [layer for layer in value.layers if (layer.size(dim) > 1) is has_dim]
    return replace(value, layers=tuple(layers))


def collapsed(value: Value, dims: Collection[int]) -> Value:
    """Returns a value that is constant along some dimensions with length 1 there."""
    dims = {dim % len(value.shape) for dim in dims}
    shape = tuple(1 if dim in dims else length for dim, length in enumerate(value.shape))
    return replace(value, shape=shape)


def reshaped(value: Value, shape: Sequence[int]) -> Value:
    """Returns the value with dimensions of length 1 added or removed."""

    def moved(layer: Tensor) -> Tensor:
        lengths = iter([n for n, whole in zip(layer.shape, value.shape, strict=True) if whole != 1])
        return layer.reshape([1 if whole == 1 else next(lengths) for whole in shape])

    return replace(value, shape=tuple(shape), layers=tuple(map(moved, value.layers)))


def vector(units: Units, value: Value, dim: int, reason: str) -> Tensor:
    """Returns the labels along one dimension; what varies along it and another is tied first."""
    others = [other for other in range(len(value.shape)) if other != dim]
    layers = tuple(layer for layer in value.layers if layer.size(dim) > 1)
    tied = tie(units, replace(value, layers=layers), others, reason).layers
    for layer in tied[1:]:
        units.union(tied[0], layer, reason)
    return tied[0].reshape(-1) if tied else torch.zeros(value.shape[dim], dtype=torch.int64)
