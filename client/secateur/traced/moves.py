"""Operations that move elements, or compute each from one position only."""

from torch import Tensor

from secateur.traced.calls import Boundary, Call, Result, unknown
from secateur.traced.registry import rule
from secateur.traced.values import (
    Value,
    constant,
    freeze,
    reshaped,
    settled,
    spread,
    tie,
    together,
)

_OTHER = "is combined with a tensor that is not cut"


@rule(
    "abs alpha_dropout atan celu clamp clamp_max clamp_min cos dropout elu erf exp feature_dropout"
    " gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid logical_not mish neg"
    " ones_like rand_like randn_like relu relu6 round rsqrt selu sgn sigmoid sign silu sin softplus"
    " softshrink softsign square tanh threshold zeros_like full_like log1p sqrt expm1"
)
def each(call: Call) -> Result:
    """Each element of the result comes from the same element of the operand.

    It is finite where the operand is zero; of rsqrt that is so in norms, which add an epsilon.
    """
    value = call.operands()[0]
    return Value(value.shape, value.layers)


@rule("alias clone contiguous detach lift_fresh_copy to _to_copy type_as float double half")
def same(call: Call) -> Result:
    """The operand itself, perhaps of another dtype."""
    return call.operands()[0]


@rule(
    "add addcmul bitwise_and bitwise_or copy eq ge gt le lerp logical_and logical_or lt"
    " masked_fill maximum minimum ne rsub sub where"
)
def combined(call: Call) -> Result:
    """Elements of several operands at the same position make one."""
    return together(call.units, call.operands(), call.why(_OTHER))


@rule("mul")
def multiplied(call: Call) -> Result:
    """A product is zero where one factor is."""
    operands = call.operands()
    product = together(call.units, operands, call.why(_OTHER))
    return Value(product.shape, product.layers, any(value.is_zero for value in operands))


@rule("div")
def divided(call: Call) -> Result:
    """The divisor is not cut: pruned, it is zero."""
    dividend, *divisor = call.operands()
    for value in divisor:
        freeze(call.units, value, call.why("divides by these channels, and pruned ones are zero"))
    divided = together(call.units, [dividend, *divisor], call.why(_OTHER))
    return Value(divided.shape, divided.layers, dividend.is_zero)


@rule("pow")
def power(call: Call) -> Result:
    """A positive power of each element."""
    if isinstance(call["exponent"], Value) or call["exponent"] <= 0:
        return unknown(call)
    return each(call)


@rule("prelu")
def prelu(call: Call) -> Result:
    """The slopes are of the channels, or one for all."""
    value, slopes = call["self"], call["weight"]
    dims = len(value.shape)
    if dims > 1:
        slopes = reshaped(slopes, (1, *slopes.shape, *(1,) * (dims - 2)))
    shared = together(call.units, [value, slopes], call.why(_OTHER))
    return Value(value.shape, shared.layers)


@rule("zeros ones full empty new_zeros new_ones new_full new_empty")
def filled(call: Call) -> Result:
    """A tensor that is the same everywhere fits any cut."""
    return constant(call.units, call.shape)


@rule(
    "view reshape _unsafe_view view_as permute transpose t numpy_T mT expand expand_as squeeze"
    " unsqueeze flatten unflatten movedim swapaxes swapdims repeat tile pixel_shuffle"
    " pixel_unshuffle repeat_interleave"
)
def moved(call: Call) -> Result:
    """Each element of the result is one of the operand's."""
    return _moved(call, call.operands()[0])


@rule("slice select narrow split split_with_sizes chunk unbind tensor_split")
def taken(call: Call) -> Result:
    """Slices by their positions along a dimension."""
    value = call.operands()[0]
    dim = call.arguments.get("dim", 0) % len(value.shape)
    if call.arguments.get("step", 1) != 1:
        value = tie(call.units, value, [dim], call.why("takes every other channel"))
    positions = _positions(call, value.shape[dim], dim)
    why = call.why("takes channels by their positions")
    for layer in value.layers:
        if dim in spread(layer):
            call.trace.boundaries.append(Boundary(layer, dim, positions, why))
    return _moved(call, value)


def _positions(call: Call, length: int, dim: int) -> tuple[int, ...]:
    if call.name == "select":
        start = call["index"] % length
        return start, start + 1
    if call.name == "slice":
        start, end, _ = slice(call["start"], call["end"]).indices(length)
        return start, end
    if call.name == "narrow":
        return call["start"] % length, call["start"] % length + call["length"]
    pieces = [1] * length
    if call.name != "unbind":
        pieces = [piece.shape[dim] for piece in call.node.meta["val"]]
    return tuple(sum(pieces[:index]) for index in range(len(pieces) + 1))


def _moved(call: Call, value: Value) -> Result:
    results = [call.run(layer, value) for layer in value.layers]
    found = call.node.meta["val"]
    if not isinstance(found, list | tuple):
        return _placed(call, value, found.shape, results)
    pieces = [[pieces[index] for pieces in results] for index in range(len(found))]
    return [
        _placed(call, value, one.shape, labels) for one, labels in zip(found, pieces, strict=True)
    ]


def _placed(call: Call, value: Value, shape: tuple[int, ...], labels: list[Tensor]) -> Value:
    placed = Value(tuple(shape), tuple(labels), value.is_zero)
    return settled(call.units, placed, call.why("has one unit only"))
