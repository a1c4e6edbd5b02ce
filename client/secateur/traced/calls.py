"""A call of an operation in a traced graph, and what the trace keeps of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from secateur.traced.units import Units
from secateur.traced.values import Value, freeze

Result = Value | Sequence[Value]


@dataclass(frozen=True)
class Boundary:
    """An operation takes slices [start, end) of a dimension by their positions.

    Positions are right in the smaller model only if each unit has its share before and after them.
    """

    layer: Tensor
    dim: int
    positions: tuple[int, ...]
    reason: str


@dataclass
class Trace:
    """What is known of a graph so far."""

    units: Units
    values: dict[Node, Result] = field(default_factory=dict)
    boundaries: list[Boundary] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """A call of an operation.

    Attributes:
        trace: Of the graph.
        node: The call in the graph.
        name: The operation's name, as `relu`; that of an operation in place is the same.
        arguments: By name, with Values in place of tensors.
    """

    trace: Trace
    node: Node
    name: str
    arguments: Mapping[str, Any]

    @property
    def units(self) -> Units:
        """The units of the graph."""
        return self.trace.units

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the only result."""
        return tuple(self.node.meta["val"].shape)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def operands(self) -> list[Value]:
        """Returns all arguments that are tensors, also those in lists."""
        return values_in(list(self.arguments.values()))

    def why(self, text: str) -> str:
        """Returns a reason for what stays whole: the layer, the operation, the text."""
        return f"{place(self.node)} ({self.name}): {text}"

    def run(self, layer: Tensor, value: Value) -> Any:
        """Runs the operation on labels in place of its first operand."""
        first = self.node.all_input_nodes[0]
        labels = layer.expand(value.shape).contiguous()

        def data(node: Node) -> Any:
            if node is first:
                return labels
            return pytree.tree_map_only(Tensor, _zeros, node.meta["val"])

        args, kwargs = map_arg((self.node.args, self.node.kwargs), data)
        target: Callable[..., Any] = self.node.target  # type: ignore[assignment]
        return target(*args, **kwargs)


def _zeros(fake: Tensor) -> Tensor:
    return torch.zeros(fake.shape, dtype=fake.dtype)


def place(node: Node) -> str:
    """Returns the path of the module that an operation is in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0] if stack else "") or "the model"


def values_in(tree: Any) -> list[Value]:
    """Returns the values in nested lists."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Value)]


def results(node: Node) -> Result:
    """Returns values without units for the results of a node."""
    found = node.meta.get("val")
    if isinstance(found, list | tuple):
        return [Value(tuple(getattr(one, "shape", ()))) for one in found]
    return Value(tuple(getattr(found, "shape", ())))


def unknown(call: Call) -> Result:
    """Keeps whole what an operation touches that no rule knows."""
    for value in call.operands():
        freeze(call.units, value, call.why("secateur does not know this operation"))
    return results(call.node)
