"""Layers with weights, and attention: what makes units and uses them."""

from dataclasses import replace

from torch import Tensor

from secateur.traced.calls import Call, Result, unknown
from secateur.traced.registry import rule
from secateur.traced.values import (
    Value,
    aligned,
    along,
    collapsed,
    contract,
    freeze,
    reshaped,
    tie,
    together,
    vector,
)

_WHOLE = "works on a tensor that is not cut"
_SUMS = "multiplies two activations and sums over these slices"


@rule("linear")
def linear(call: Call) -> Result:
    """Columns meet the operand's last dimension; rows are new units."""
    value, weight = call["input"], call["weight"]
    rows = reshaped(value, (*value.shape[:-1], 1, value.shape[-1]))
    if len(weight.shape) == 1:
        weight = reshaped(weight, (1, *weight.shape))
    return _product(call, rows, weight, -1, call["bias"])


@rule("matmul mm bmm mv dot")
def matmul(call: Call) -> Result:
    """The last dimension of the first meets the last but one of the second."""
    a, b = call.operands()
    return _matmul(call, a, b, None)


@rule("addmm baddbmm addmv addbmm")
def added_matmul(call: Call) -> Result:
    """A product and a tensor that is added to it."""
    bias, a, b = call.operands()
    return _matmul(call, a, b, bias)


def _matmul(call: Call, a: Value, b: Value, bias: Value | None) -> Value:
    a = reshaped(a, (*a.shape, 1))
    columns = 1 if len(b.shape) == 1 else b.shape[-1]
    b = reshaped(b, (*b.shape[:-2], 1, b.shape[-1 if len(b.shape) == 1 else -2], columns))
    return _product(call, a, b, -2, bias)


@rule("einsum")
def einsum(call: Call) -> Result:
    """A product of two operands, summed over one named dimension."""
    terms, _, result = call["equation"].replace(" ", "").partition("->")
    inputs = terms.split(",")
    summed = sorted(set(terms) - set(result) - {","})
    is_simple = len(inputs) == 2 and len(summed) == 1 and result and "." not in terms
    if not is_simple or any(len(set(one)) < len(one) for one in inputs):
        return unknown(call)
    letters = result + summed[0]
    pairs = zip(inputs, call["tensors"], strict=True)
    a, b = (_by_letters(one, value, letters) for one, value in pairs)
    return _product(call, a, b, -1, None)


def _by_letters(term: str, value: Value, letters: str) -> Value:
    order = [term.index(letter) for letter in letters if letter in term]
    layers = tuple(layer.permute(order) for layer in value.layers)
    permuted = replace(value, shape=tuple(value.shape[d] for d in order), layers=layers)
    shape = [value.shape[term.index(letter)] if letter in term else 1 for letter in letters]
    return reshaped(permuted, shape)


def _product(call: Call, a: Value, b: Value, dim: int, bias: Value | None) -> Value:
    dims = max(len(a.shape), len(b.shape))
    a, b = aligned(a, dims), aligned(b, dims)
    for one in (a, b):
        for layer in one.layers:
            if one.is_zero and layer.size(dim) == 1:
                call.units.produce(layer)
    is_weight = a.is_zero or b.is_zero
    product = contract(call.units, a, b, dim, call.why(_WHOLE if is_weight else _SUMS))
    return _biased(call, reshaped(product, call.shape), bias)


def _biased(call: Call, value: Value, bias: Value | None) -> Value:
    operands = [value] if bias is None else [value, bias]
    found = together(call.units, operands, call.why("has a bias that is not cut"))
    return replace(found, is_zero=False)


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
def conv(call: Call) -> Result:
    """Filters are new units; with groups a group of channels and its filters are one unit."""
    value, weight = call["input"], call["weight"]
    dims = len(value.shape)
    channel = dims - len(weight.shape) + 1
    if not weight.is_zero:
        freeze(call.units, value, call.why("has filters that are computed"))
    inputs = vector(call.units, value, channel, call.why("mixes neighbours"))
    outs = _filters(call, inputs, weight)
    call.units.produce(outs)
    rest = replace(value, layers=tuple(one for one in value.layers if one.size(channel) == 1))
    rest = tie(call.units, rest, range(channel + 1, dims), call.why("mixes neighbours"))
    result = Value(call.shape, (*rest.layers, along(outs, channel, dims)))
    bias = call["bias"]
    if bias is not None:
        bias = reshaped(bias, (*bias.shape, *(1,) * (dims - channel - 1)))
    return _biased(call, result, bias)


def _filters(call: Call, inputs: Tensor, weight: Value) -> Tensor:
    is_transposed = "transpose" in call.name or call.arguments.get("transposed", False)
    why = call.why(_WHOLE)
    weight = tie(call.units, weight, range(2, len(weight.shape)), why)
    first, second = (vector(call.units, weight, dim, why) for dim in (0, 1))
    if call["groups"] == 1:
        ins, outs = (first, second) if is_transposed else (second, first)
        call.units.union(inputs, ins, why)
        return outs
    one = inputs.reshape(call["groups"], -1)[:, :1]
    for labels in (inputs, first):
        call.units.union(labels.reshape(call["groups"], -1), one, why)
    call.units.freeze(second, call.why("has groups"))
    count = weight.shape[1] if is_transposed else weight.shape[0] // call["groups"]
    return one.expand(-1, count).reshape(-1)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """A head is one unit; with fewer keys than queries, a key with its queries."""
    query, key, value = (_heads(call, call[name]) for name in ("query", "key", "value"))
    if call.arguments.get("enable_gqa"):
        key, value = (_repeated(one, query.shape[-3]) for one in (key, value))
    mask = [] if call["attn_mask"] is None else [_heads(call, call["attn_mask"])]
    why = call.why("has heads that are not cut")
    return replace(together(call.units, [query, key, value, *mask], why), shape=call.shape)


def _heads(call: Call, value: Value) -> Value:
    value = tie(call.units, value, [-2, -1], call.why("mixes the channels of a head"))
    return collapsed(value, [-2, -1])


def _repeated(value: Value, heads: int) -> Value:
    times = heads // value.shape[-3]
    if value.shape[-3] == 1 or times == 1:
        return value
    layers = [one.repeat_interleave(times, -3) if one.size(-3) > 1 else one for one in value.layers]
    return replace(value, shape=(*value.shape[:-3], heads, 1, 1), layers=tuple(layers))
