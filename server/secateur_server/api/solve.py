"""Rules that update weights, applied layer by layer as the Gram matrices arrive."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur_server.backends.masks import Mask, mask_of_flags
from secateur_server.cut.choice import Choice
from secateur_server.errors import InvalidSpec, quote
from secateur_server.report.warnings import Remarks
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import Scheduler
from secateur_server.solvers.gram import check_gram, check_weight, full_gram, not_finite
from secateur_server.solvers.scaling import (
    MOST_OF_GRAM,
    MOST_OF_WEIGHT,
    exponent_beyond,
    scaled,
)
from secateur_server.spec.solve import GramOf, Solve
from secateur_server.spec.solvers import Weights
from secateur_server.state_dict.incoming import Incoming
from secateur_server.state_dict.parameter import Parameter

# A tensor, and the rules that update it, in order.
Task = tuple[str, list[Solve]]


def solve(
    context: RequestContext,
    scheduler: Scheduler,
    incoming: Incoming,
    rules: Sequence[Solve],
    pruned: Mapping[str, Parameter],
    remarks: Remarks,
) -> tuple[dict[str, Parameter], list[list[Choice]]]:
    """Applies rules that update weights.

    One Gram matrix is in memory at a time: all rules are applied to the tensors that use it.

    Args:
        context: The request.
        scheduler: Gives the cores to one request at a time, while no data is awaited.
        incoming: The source. Its weights become the updated ones.
        rules: Resolved.
        pruned: Parameters with the masks of the rules before.
        remarks: Are added to.

    Returns:
        The parameters that the rules name, with their new weights and masks; and the choices of
        each rule, in the order of its tensors.

    Raises:
        InvalidSpec: A Gram matrix is not one, or a tensor has two.
    """
    state = {**incoming.state_dict.parameters, **pruned}
    tasks, choices = _tasks(context, rules), {}
    solved: dict[str, Parameter] = {}
    for holder, triangle in incoming.streamed:
        with scheduler.cores(context, incoming.size), context.stage("solve"):
            gram = full_gram(triangle)
            del triangle
            check_gram(f"data[{quote(holder)}]", gram)
            gram = scaled(gram, -exponent_beyond(gram, MOST_OF_GRAM))
            is_zero = not gram.diagonal().any()
            for name, of_tensor in tasks.pop(holder, ()):
                solved[name], found = _solve(context, incoming, of_tensor, state[name], name, gram)
                if is_zero and state[name].weight.numel():
                    remarks.without_inputs.append(name)
                choices.update({(id(rule), name): choice for rule, choice in found})
            del gram  # before the next one arrives
    outcomes = [
        [choices[id(rule), name] for name in rule.tensors if (id(rule), name) in choices]
        for rule in rules
    ]
    return solved, outcomes


def _tasks(context: RequestContext, rules: Sequence[Solve]) -> dict[str, list[Task]]:
    """The tensors that use each Gram matrix, with their rules."""
    grams: dict[str, GramOf] = {}
    by_tensor: dict[str, list[Solve]] = defaultdict(list)
    for rule in context.each(rules):
        for name in rule.tensors:
            if grams.setdefault(name, rule.grams[name]) != rule.grams[name]:
                raise InvalidSpec(
                    f"{rule.path}.grams[{quote(name)}]",
                    f"differs from that of an earlier rule, {quote(grams[name].holder)}; all rules "
                    "of a tensor share one Gram matrix",
                )
            by_tensor[name].append(rule)
    tasks: dict[str, list[Task]] = defaultdict(list)
    for name, of_tensor in by_tensor.items():
        tasks[grams[name].holder].append((name, of_tensor))
    return tasks


def _solve(
    context: RequestContext,
    incoming: Incoming,
    rules: Sequence[Solve],
    parameter: Parameter,
    name: str,
    gram: Tensor,
) -> tuple[Parameter, list[tuple[Solve, Choice]]]:
    """Applies the rules of one tensor. Returns it, and what the rules that prune have chosen."""
    weight, mask, _ = parameter
    check_weight(f"data[{quote(name)}]", weight)
    is_transposed = rules[0].grams[name].is_transposed
    target = _matrix(weight, is_transposed).to(torch.float32)
    exponent = exponent_beyond(target, MOST_OF_WEIGHT)
    target = scaled(target, -exponent)
    flags = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    kept = _matrix(flags if mask is None else mask.whole(context, weight.shape), is_transposed)
    weights = Weights(target, target, kept)
    found, choices = _applied(context, rules, weights, gram.to(weight.device), name)
    # Pruned elements keep their values behind the mask, as in torch.nn.utils.prune. Values that no
    # rule has moved are not rounded to float32 either.
    is_moved = _tensor(found.kept & (found.now != target), weight, is_transposed)
    values = _tensor(scaled(found.now, exponent), weight, is_transposed).to(weight.dtype)
    updated = torch.where(is_moved, values, weight)
    if len(not_finite(updated)):
        field = f"{rules[-1].path}.grams[{quote(name)}]"
        raise InvalidSpec(field, f"makes weights that {weight.dtype} cannot hold; check it")
    kept = _tensor(found.kept, weight, is_transposed).reshape(-1)
    is_masked = mask is not None or bool(choices)
    new_mask: Mask | None = mask_of_flags(context, kept) if is_masked else None
    stored = incoming.state_dict.update(context, name, updated)
    return Parameter(stored, new_mask), choices


def _applied(
    context: RequestContext, rules: Sequence[Solve], weights: Weights, gram: Tensor, name: str
) -> tuple[Weights, list[tuple[Solve, Choice]]]:
    """Applies rules in order. Returns the weights, and what the rules that prune have chosen."""
    choices = []
    for rule in rules:
        candidates = int(weights.kept.count_nonzero())
        weights = rule.solver.solve(context, weights, gram, f"{rule.path}.grams[{quote(name)}]")
        if rule.solver.is_pruning:
            pruned = candidates - int(weights.kept.count_nonzero())
            choices.append((rule, Choice((name,), candidates, pruned, pruned)))
    return weights, choices


def _matrix(values: Tensor, is_transposed: bool) -> Tensor:
    """A weight, or its mask, as [outputs, inputs]."""
    matrix = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    return matrix.T.contiguous() if is_transposed else matrix


def _tensor(matrix: Tensor, like: Tensor, is_transposed: bool) -> Tensor:
    """Does the opposite of `_matrix`."""
    return (matrix.T if is_transposed else matrix).reshape(like.shape).contiguous()
