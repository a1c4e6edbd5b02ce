"""Operations that compute an element from several, and those that join tensors."""

import re
from dataclasses import replace

import torch

from secateur.traced.calls import Call, Result, results
from secateur.traced.registry import rule
from secateur.traced.values import (
    Value,
    along,
    collapsed,
    reshaped,
    settled,
    spread,
    tie,
    together,
    vector,
)

_MIXES = "mixes the channels: without the pruned ones it gives other values"
_INPUT = "has an operand that is not cut"


@rule(
    "mean sum amax amin max min var std norm linalg_vector_norm logsumexp argmax argmin prod all"
    " any median"
)
def reduced(call: Call) -> Result:
    """A reduction over some dimensions."""
    value, *others = call.operands()
    if others:  # max and min of two tensors
        return together(call.units, [value, *others], call.why(_MIXES))
    dims = _dims(call, len(value.shape))
    value = collapsed(tie(call.units, value, dims, call.why(_MIXES)), dims)
    empty = results(call.node)
    if isinstance(empty, Value):
        return _kept(call, value, empty)
    return [_kept(call, value, one) for one in empty]


def _kept(call: Call, value: Value, empty: Value) -> Value:
    return Value(empty.shape, reshaped(value, empty.shape).layers)


def _dims(call: Call, dims: int) -> list[int]:
    given = call.arguments.get("dim")
    if given is None or given == []:
        return list(range(dims))
    return [dim % dims for dim in (given if isinstance(given, list | tuple) else [given])]


@rule("softmax _softmax log_softmax _log_softmax cumsum sort")
def mixed(call: Call) -> Result:
    """An operation along one dimension that keeps the shape."""
    value = call.operands()[0]
    tie(call.units, value, [call["dim"]], call.why(_MIXES))
    empty = results(call.node)
    return Value(value.shape, value.layers) if isinstance(empty, Value) else [value] * len(empty)


@rule("layer_norm native_layer_norm rms_norm")
def layer_norm(call: Call) -> Result:
    """A norm over the last dimensions, with weights of their shape."""
    value = call.operands()[0]
    last = range(len(value.shape) - len(call["normalized_shape"]), len(value.shape))
    tie(call.units, value, last, call.why(_MIXES))
    value = together(call.units, [value, *_given(call, "weight", "bias")], call.why(_MIXES))
    return Value(value.shape, value.layers)


@rule("group_norm")
def group_norm(call: Call) -> Result:
    """A norm over channels: whole."""
    value = call.operands()[0]
    tie(call.units, value, range(1, len(value.shape)), call.why(_MIXES))
    return _per_channel(call, value, _given(call, "weight", "bias"), call.why(_MIXES))


@rule("batch_norm instance_norm")
def batch_norm(call: Call) -> Result:
    """A norm of each channel by itself."""
    given = _given(call, "weight", "bias", "running_mean", "running_var")
    value = call.operands()[0]
    value = tie(call.units, value, range(2, len(value.shape)), call.why(_MIXES))
    return _per_channel(call, value, given, call.why(_INPUT))


def _given(call: Call, *names: str) -> list[Value]:
    return [call[name] for name in names if call.arguments.get(name) is not None]


def _per_channel(call: Call, value: Value, vectors: list[Value], why: str) -> Value:
    ones = (1,) * (len(value.shape) - 2)
    columns = [reshaped(vector, (1, *vector.shape, *ones)) for vector in vectors]
    found = together(call.units, [value, *columns], why)
    return Value(value.shape, found.layers)


@rule(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices"
    " max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d"
    " adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
    " upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d"
    " upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d lp_pool2d"
)
def pooled(call: Call) -> Result:
    """Positions of each channel make other positions of it."""
    value = call.operands()[0]
    count = int(re.findall(r"(\d)d", call.name)[0])
    value = tie(call.units, value, range(-count, 0), call.why("mixes neighbours"))
    empty = results(call.node)
    if isinstance(empty, Value):
        return Value(empty.shape, value.layers)
    return [Value(one.shape, value.layers) for one in empty]


@rule("pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d")
def padded(call: Call) -> Result:
    """Slices are added at the ends of the last dimensions; they are never cut."""
    value, pad = call.operands()[0], list(call.arguments.get("pad") or call["padding"])
    is_constant = call.arguments.get("mode", "constant") == "constant" and "pad" in call.arguments
    layers = value.layers
    for index in range(len(pad) // 2):
        dim, ends = len(value.shape) - 1 - index, pad[2 * index : 2 * index + 2]
        if not is_constant or min(ends) < 0:
            value = tie(call.units, value, [dim], call.why("copies neighbours"))
        layers = tuple(_padded(layer, dim, ends) for layer in value.layers)
        value = Value(value.shape, layers)
    return settled(call.units, Value(call.shape, layers), call.why("has one unit only"))


def _padded(layer: torch.Tensor, dim: int, ends: list[int]) -> torch.Tensor:
    if dim not in spread(layer):
        return layer
    pad = [0] * (2 * (layer.dim() - 1 - dim)) + ends
    return torch.constant_pad_nd(layer, pad, 0)


@rule("cat concat concatenate")
def concatenated(call: Call) -> Result:
    """Slices along one dimension one after the other; along all others they meet."""
    return _joined(call, call["tensors"], call.arguments.get("dim", 0))


@rule("stack")
def stacked(call: Call) -> Result:
    """Tensors one after the other along a new dimension."""
    dim = call["dim"] % len(call.shape)
    rows = [reshaped(v, (*v.shape[:dim], 1, *v.shape[dim:])) for v in call["tensors"]]
    return _joined(call, rows, dim)


def _joined(call: Call, tensors: list[Value], dim: int) -> Value:
    dim %= len(call.shape)
    tensors = [one for one in tensors if len(one.shape) == len(call.shape)]  # not shape (0,)
    across = []
    for one in tensors:
        layers = tuple(layer for layer in one.layers if spread(layer) != {dim})
        flat = tie(call.units, Value(one.shape, layers), [dim], call.why("joins these slices"))
        across.append(collapsed(flat, [dim]))
    met = together(call.units, across, call.why("is joined with a tensor that is not cut"))
    labels = [along(_alone(call, one, dim), dim, len(call.shape)) for one in tensors]
    joined = Value(call.shape, (*met.layers, torch.cat(labels, dim)))
    return settled(call.units, joined, call.why("has one unit only"))


def _alone(call: Call, value: Value, dim: int) -> torch.Tensor:
    layers = tuple(layer for layer in value.layers if spread(layer) == {dim})
    return vector(call.units, replace(value, layers=layers), dim, call.why("joins these slices"))


@rule("glu")
def glu(call: Call) -> Result:
    """Half of the channels times a function of the other half."""
    value, dim = call["self"], call["dim"] % len(call.shape)
    half = value.shape[dim] // 2
    for layer in value.layers:
        if dim in spread(layer):
            first, second = layer.narrow(dim, 0, half), layer.narrow(dim, half, half)
            call.units.union(first, second, call.why("joins these slices"))
    layers = tuple(one.narrow(dim, 0, half) if one.size(dim) > 1 else one for one in value.layers)
    return settled(call.units, Value(call.shape, layers), call.why("has one unit only"))


@rule("embedding")
def embedding(call: Call) -> Result:
    """Rows of a table by their number: the rows stay."""
    table, rows = call["weight"], call["indices"]
    table = tie(call.units, table, [0], call.why("takes rows by their number"))
    for layer in table.layers:
        call.units.produce(layer)
    shape = (1,) * len(rows.shape) + (table.shape[1],)
    layers = tuple(layer.reshape(shape) for layer in table.layers)
    return Value(call.shape, layers)


@rule("index")
def indexed(call: Call) -> Result:
    """Elements by tensors of positions: these dimensions are whole."""
    value = call["self"]
    dims = [dim for dim, index in enumerate(call["indices"]) if index is not None]
    value = tie(call.units, value, dims, call.why("takes slices by a tensor of positions"))
    labels = tuple(call.run(layer, value) for layer in value.layers)
    return settled(call.units, Value(call.shape, labels, value.is_zero), call.why("has one unit"))


@rule("index_select flip roll")
def rearranged(call: Call) -> Result:
    """Slices along some dimensions in another order."""
    value = call["self"]
    dims = call.arguments.get("dims", call.arguments.get("dim"))
    dims = [d % len(value.shape) for d in (dims if isinstance(dims, list | tuple) else [dims])]
    value = tie(call.units, value, dims or range(len(value.shape)), call.why("reorders channels"))
    return Value(call.shape, value.layers, value.is_zero)
