"""Rules that update weights: decoded, and fitted to the tensors of a state_dict."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import InvalidSpec, NotStructured, quote
from secateur_server.fields import chosen
from secateur_server.granularity.group import Group
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.matching import by_tensor, extra_of, not_pruned
from secateur_server.spec.solvers import MOST_COLUMNS, SOLVERS, Solver
from secateur_server.state_dict.catalog import Catalog, Shape, match

# Multiplications for all tensors of a Gram matrix, as spec.proto says: 3 hours of two cores.
MOST_STEPS = 1 << 50


@dataclass(frozen=True)
class GramOf:
    """The Gram matrix of a weight.

    Attributes:
        holder: The name of the tensor that holds it.
        is_transposed: Whether the weight is [inputs, outputs].
    """

    holder: str
    is_transposed: bool

    def inputs(self, shape: Shape) -> int:
        """Returns the inputs of a weight of a shape."""
        return shape[0] if self.is_transposed else math.prod(shape[1:])


@dataclass(frozen=True)
class Solve:
    """Updates the kept weights of layers. Its methods are those of Selection.

    Attributes:
        path: The path of this rule in the request.
        tensors: Names and globs; in a resolved rule, names.
        grams: Of each tensor.
        solver: Updates the weights.
    """

    path: str
    tensors: tuple[str, ...]
    grams: Mapping[str, GramOf]
    solver: Solver

    def extras(self) -> Collection[str]:
        return ()

    def streamed(self) -> Collection[str]:
        return {gram.holder for gram in self.grams.values()}

    def patterns(self) -> Sequence[str]:
        return self.tensors

    def names(self) -> Collection[str]:
        return self.tensors

    def units_together(self) -> Sequence[Group]:
        return ()

    def reads(self) -> Collection[str]:
        return self.tensors

    def is_meant_whole(self, name: str) -> bool:
        return self.solver.is_meant_whole


def decode_solver(context: RequestContext, message: pb.Solver, path: str) -> Solve:
    """Decodes a rule.

    Args:
        context: The request.
        message: The rule.
        path: Of the message in the request.

    Raises:
        InvalidSpec: A field is wrong.
    """
    if not message.tensors:
        raise InvalidSpec(f"{path}.tensors", "is empty; send at least one name or glob")
    grams = {
        name: GramOf(gram.holder, gram.is_transposed)
        for name, gram in context.each(message.grams.items())
    }
    solver = SOLVERS[chosen(message, "method", path)](message, path)
    return Solve(path, tuple(message.tensors), grams, solver)


def resolve_solver(context: RequestContext, rule: Solve, catalog: Catalog) -> Solve:
    """Replaces globs by names, and checks that the Gram matrices fit.

    Raises:
        InvalidSpec: The rule does not fit the tensors.
    """
    names = match(context, f"{rule.path}.tensors", rule.tensors, catalog)
    field = f"{rule.path}.grams"
    grams = by_tensor(context, rule.grams, field, catalog.all_names(names))
    for name in context.each(grams):
        if name not in names:
            raise not_pruned(f"{field}[{quote(name)}]", "tensor")
    for name in context.each(names):
        _check(rule, name, grams, catalog)
    return replace(rule, tensors=tuple(names), grams=grams)


def check_steps(context: RequestContext, rules: Sequence[Solve], catalog: Catalog) -> None:
    """Refuses rules for one Gram matrix that take too long: the cores wait for all of them.

    Raises:
        InvalidSpec: They take more than MOST_STEPS.
    """
    steps: dict[str, int] = defaultdict(int)
    for rule in context.each(rules):
        for name in context.each(rule.tensors):
            gram, shape = rule.grams[name], catalog.prunable[name]
            inputs = gram.inputs(shape)
            rows = math.prod(shape) // max(1, inputs)
            steps[gram.holder] += rule.solver.steps(rows, inputs)
            if steps[gram.holder] > MOST_STEPS:
                raise InvalidSpec(
                    f"{rule.path}.tensors",
                    f"{quote(name)} is {rows} x {inputs}: the rules up to this one take "
                    f"{steps[gram.holder]:.2e} steps with the Gram matrix {quote(gram.holder)}; at "
                    f"most {MOST_STEPS:.2e}: use sparsegpt in place of alps, or fewer rules",
                )


def working_bytes(context: RequestContext, rules: Sequence[Solve], catalog: Catalog) -> int:
    """Returns the bytes that the largest layer takes, beside its weight and its Gram matrix."""
    return max(
        (
            rule.solver.element_bytes * math.prod(catalog.prunable[name])
            for rule in rules
            for name in context.each(rule.tensors)
        ),
        default=0,
    )


def _check(rule: Solve, name: str, grams: Mapping[str, GramOf], catalog: Catalog) -> None:
    """Refuses a tensor without a Gram matrix of its size."""
    shape, field = catalog.prunable[name], f"{rule.path}.grams[{quote(name)}]"
    if name not in catalog.floating:
        raise InvalidSpec(f"{rule.path}.tensors", f"{quote(name)} has integers; leave it out")
    if len(shape) < 2:
        raise NotStructured(
            f"{rule.path}.tensors",
            f"{quote(name)} has shape {list(shape)}; a solver needs 2 dimensions or more",
        )
    if name not in grams:
        raise InvalidSpec(field, "is not set; a solver needs the Gram matrix of each layer")
    inputs, held = grams[name].inputs(shape), extra_of(field, grams[name].holder, catalog)
    if inputs > MOST_COLUMNS:
        raise InvalidSpec(field, f"{quote(name)} has {inputs} inputs; at most {MOST_COLUMNS}")
    if held.dtype != torch.float32 or held.shape != (inputs * (inputs + 1) // 2,):
        raise InvalidSpec(
            field,
            f"has dtype {held.dtype_name} and shape {list(held.shape)}; the upper triangle of a "
            f"Gram matrix of {inputs} inputs has F32 and [{inputs * (inputs + 1) // 2}]",
        )
    rule.solver.check(rule.path, name, inputs)
