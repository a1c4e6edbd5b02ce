"""Follows units through the graph of an exported program."""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from secateur.traced import mixing, moves, products, recurrent  # noqa: F401  # they register rules
from secateur.traced.calls import Boundary, Call, Trace, place, results, unknown, values_in
from secateur.traced.registry import RULES
from secateur.traced.units import NO_UNIT, Units
from secateur.traced.values import Value, freeze, named, settled, varying

_SPLITS = "a reshape divides these slices among two dimensions, of which neither is cut by itself"


def follow(program: ExportedProgram, names: Mapping[str, str]) -> Units:
    """Finds which slices of a program's parameters must be cut together.

    Args:
        program: With the graph; not changed but for dead code.
        names: From each parameter and buffer that may be cut to the name of its tensor: tied ones
            have the same.
    """
    _drop_unused(program)
    trace = Trace(Units())
    values = _inputs(trace.units, program, names)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            trace.values[node] = values.get(node.name, results(node))
        elif node.op == "call_function":
            trace.values[node] = _called(trace, node)
        elif node.op == "output":
            for value in values_in(_known(trace, node.args)):
                freeze(trace.units, value, "makes the model's output")
    _settle(trace)
    return trace.units


def _drop_unused(program: ExportedProgram) -> None:
    """Drops operations without an effect, but for those whose operands must fit each other."""
    program.graph.eliminate_dead_code(
        lambda node: node.is_impure() or len(node.all_input_nodes) > 1
    )


def _inputs(units: Units, program: ExportedProgram, names: Mapping[str, str]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    shared: dict[str, Value] = {}
    fakes = {node.name: node.meta.get("val") for node in program.graph.nodes if node.users}
    for spec in program.graph_signature.input_specs:
        name = names.get(spec.target or "")
        if name is None or spec.arg.name not in fakes or not fakes[spec.arg.name].dim():
            continue
        if name not in shared:
            is_parameter = spec.kind is InputKind.PARAMETER
            shape = tuple(fakes[spec.arg.name].shape)
            shared[name] = named(units, name, shape, is_parameter)
        values[spec.arg.name] = shared[name]
    return values


def _called(trace: Trace, node: Node) -> Any:
    arguments = _arguments(trace, node)
    if node.target is operator.getitem:
        return arguments["sequence"][arguments["index"]]
    schema = getattr(node.target, "_schema", None)
    name = schema.name.partition("::")[2] if schema else str(node.target)
    call = Call(trace, node, name.rstrip("_") if name[:1] != "_" else name, arguments)
    rule = RULES.get(call.name, unknown)
    is_checked = schema is not None and not schema.returns  # it has no result
    has_units = any(value.layers for value in call.operands())
    if is_checked or not (has_units or rule is moves.filled):
        return results(node)
    return rule(call)


def _arguments(trace: Trace, node: Node) -> dict[str, Any]:
    args, kwargs = _known(trace, (node.args, node.kwargs))
    if node.target is operator.getitem:
        return {"sequence": args[0], "index": args[1]}
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(index): value for index, value in enumerate([*args, *kwargs.values()])}
    found: dict[str, Any] = {one.name: one.default_value for one in schema.arguments}
    return {**found, **dict(zip(found, args, strict=False)), **kwargs}


def _known(trace: Trace, arguments: Any) -> Any:
    """Returns the arguments with values in place of nodes, as classes are now."""

    def known(node: Node) -> Any:
        def current(value: Value) -> Value:
            return settled(trace.units, value, f"{place(node)}: all these slices are one unit")

        return pytree.tree_map_only(Value, current, trace.values[node])

    return map_arg(arguments, known)


def _settle(trace: Trace) -> None:
    """Keeps whole what could be cut only along two dimensions at once, or would shift positions."""
    layers = [
        (value, f"{place(node)}: {_SPLITS}")
        for node, result in trace.values.items()
        for value in values_in(result)
        if value.layers
    ]
    is_settled = False
    while not is_settled:
        frozen = [_freeze_unclear(trace.units, value, reason) for value, reason in layers]
        frozen += [_freeze_shifted(trace.units, boundary) for boundary in trace.boundaries]
        is_settled = not any(frozen)


def _freeze_unclear(units: Units, value: Value, reason: str) -> bool:
    """Freezes what varies along two dimensions, or none, or along the dimension of another."""
    dims = [varying(units, layer) for layer in value.layers]
    taken = [dim for found in dims for dim in found]
    frozen = False
    for layer, found in zip(value.layers, dims, strict=True):
        is_one = not found and bool((units.units(layer) != NO_UNIT).any())
        if is_one or len(found) > 1 or any(taken.count(dim) > 1 for dim in found):
            units.freeze(layer, reason)
            frozen = True
    return frozen


def _freeze_shifted(units: Units, boundary: Boundary) -> bool:
    """Freezes units that have more than their share of slices before a position."""
    labels = units.units(boundary.layer).movedim(boundary.dim, 0)
    labels = labels.reshape(labels.size(0), -1)[:, 0]
    found, index = np.unique(labels.numpy(), return_inverse=True)
    total = np.bincount(index, minlength=len(found))
    wrong = np.zeros(len(found), bool)
    for position in boundary.positions:
        before = np.bincount(index[:position], minlength=len(found))
        wrong |= before * len(labels) != total * position
    wrong &= found != NO_UNIT
    units.freeze(torch.from_numpy(found[wrong]), boundary.reason)
    return bool(wrong.any())
