"""LSTM, GRU and plain recurrent layers: unit i is row i of each gate, and what reads it."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from secateur.traced.calls import Call, Result, unknown
from secateur.traced.registry import rule
from secateur.traced.values import Value, along, freeze, vector

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_WHOLE = "works on a tensor that is not cut"


@rule("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call) -> Result:
    """All layers and directions have the same units, since the module has one hidden size."""
    weights = call.arguments.get("params", [])
    if "batch_sizes" in call.arguments or not all(weight.is_zero for weight in weights):
        return unknown(call)
    directions = 2 if call["bidirectional"] else 1
    count = len(weights) // (call["num_layers"] * directions)
    cells = [weights[index : index + count] for index in range(0, len(weights), count)]
    units, states = _tied(call, cells, 4 if call["has_biases"] else 2)
    for index, (weight, *_) in enumerate(cells):
        source = _last(call, call["input"]) if index < directions else states.repeat(directions)
        call.units.union(source, _last(call, weight), call.why(_WHOLE))
    _start(call, units, states)
    last = [states.repeat(directions), states, units]
    return [
        Value(tuple(fake.shape), (along(labels, -1, fake.dim()),))
        for fake, labels in zip(call.node.meta["val"], last, strict=False)
    ]


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(call: Call) -> Result:
    """One step of a recurrent layer."""
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    weights = [call[name] for name in names if call[name] is not None]
    if not all(weight.is_zero for weight in weights):
        return unknown(call)
    units, states = _tied(call, [weights], len(weights))
    call.units.union(_last(call, call["input"]), _last(call, weights[0]), call.why(_WHOLE))
    _start(call, units, states)
    found = call.node.meta["val"]
    value = Value(tuple((found[0] if call.name == "lstm_cell" else found).shape))
    value = replace(value, layers=(along(units, -1, len(value.shape)),))
    return [value, value] if call.name == "lstm_cell" else value


def _tied(call: Call, cells: Sequence[Sequence[Value]], gated: int) -> tuple[Tensor, Tensor]:
    """Makes each hidden unit one of all cells; returns labels of units, and of what they show.

    Args:
        call: Its units are changed.
        cells: The tensors of each: weight_ih, weight_hh, biases, and of a projection weight_hr.
        gated: How many of a cell's tensors have rows of all gates.
    """
    gates = _GATES[call.name.removesuffix("_cell")]
    why = call.why(_WHOLE)
    rows = _first(call, cells[0][0])
    units = states = rows[: len(rows) // gates]
    if len(cells[0]) > gated:
        states = _first(call, cells[0][gated])
    for tensors in cells:
        for tensor in tensors[:gated]:
            call.units.union(_first(call, tensor).reshape(gates, -1), units, why)
        call.units.union(_last(call, tensors[1]), states, why)
        for projection in tensors[gated:]:  # torch wants it smaller than the hidden size
            call.units.freeze(units, call.why("has a projection, which must stay smaller"))
            call.units.union(_first(call, projection), states, why)
            call.units.union(_last(call, projection), units, why)
    call.units.produce(units)
    call.units.produce(states)
    return units, states


def _start(call: Call, units: Tensor, states: Tensor) -> None:
    """The states before the first step have the units of those after it."""
    given = call["hx"]
    pairs = zip(given if isinstance(given, list) else [given], (states, units), strict=False)
    for value, labels in pairs:
        call.units.union(_last(call, value), labels, call.why("starts from a state of its own"))


def _first(call: Call, value: Value) -> Tensor:
    return vector(call.units, value, 0, call.why(_WHOLE))


def _last(call: Call, value: Value) -> Tensor:
    dim = len(value.shape) - 1
    others = tuple(layer for layer in value.layers if layer.size(dim) == 1)
    if not value.is_zero:  # time and batch: neither is cut
        freeze(call.units, replace(value, layers=others), call.why("works step by step"))
    return vector(call.units, value, dim, call.why(_WHOLE))
