"""The fastest public ways to the masks of secateur's methods, as far as there are any.

Each takes a model, of which half is to go, and returns its masks: bool, of the tensors' shapes,
True is kept.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torch.nn.utils import prune

from common import AMOUNT, Model


def uniform(model: Model) -> Model:
    """The lowest of each tensor by torch.kthvalue."""
    counts = {name: round(AMOUNT * weight.numel()) for name, weight in model.items()}
    return each_lowest(model, counts)


def erk(model: Model) -> Model:
    """Densities as RigL's code has them, then the lowest of each tensor by torch.kthvalue."""
    sizes = {name: weight.numel() for name, weight in model.items()}
    raw = {name: sum(weight.shape) / weight.numel() for name, weight in model.items()}
    dense: set[str] = set()
    while True:
        left = (1 - AMOUNT) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        factor = left / sum(raw[n] * sizes[n] for n in model if n not in dense)
        full = {n for n in model if n not in dense and raw[n] * factor > 1}
        if not full:
            break
        dense |= full
    kept = {n: sizes[n] if n in dense else factor * raw[n] * sizes[n] for n in model}
    return each_lowest(model, {name: round(sizes[name] - kept[name]) for name in model})


def each_lowest(model: Model, counts: Mapping[str, int]) -> Model:
    """The `counts` lowest of each tensor go."""
    masks = {}
    for name, weight in model.items():
        magnitudes = weight.abs()
        if counts[name]:
            cut = magnitudes.flatten().kthvalue(counts[name]).values
            masks[name] = magnitudes > cut
        else:
            masks[name] = torch.ones_like(weight, dtype=torch.bool)
    return masks


def ranked(scores: Model) -> Model:
    """The lowest of all tensors go, by torch.kthvalue."""
    joined = torch.cat([of_one.flatten() for of_one in scores.values()])
    cut = joined.kthvalue(round(AMOUNT * len(joined))).values
    return {name: of_one > cut for name, of_one in scores.items()}


def by_magnitude(model: Model) -> Model:
    """Elements ranked over all tensors, without the sort of torch's global_unstructured."""
    return ranked({name: weight.abs() for name, weight in model.items()})


def lamp(model: Model) -> Model:
    """Lee et al. 2021 as their code has it: a sort of each tensor, and sums from the largest on."""
    return ranked({name: lamp_scores(weight) for name, weight in model.items()})


def lamp_scores(weight: Tensor) -> Tensor:
    """w^2 over the sum of all w^2 that are as large or larger."""
    squares, order = weight.flatten().square().sort()
    from_here = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / from_here
    return scores.view_as(weight)


def two_of_four(model: Model) -> Model:
    """2:4 by torch.topk of each group of 4."""
    masks = {}
    for name, weight in model.items():
        groups = weight.abs().view(-1, 4)
        kept = groups.topk(2, dim=1, sorted=False).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
        masks[name] = mask.view_as(weight)
    return masks


def rows(model: Model) -> Model:
    """Rows by their L2 norm: torch.nn.utils.prune.ln_structured."""
    masks = {}
    for name, module in modules(model).items():
        prune.ln_structured(module, "weight", AMOUNT, n=2, dim=0)  # type: ignore[no-untyped-call]
        masks[name] = module.get_buffer("weight_mask").bool()
    return masks


def blocks(model: Model) -> Model:
    """Blocks of 4x4 by their L2 norm: torch.ao.pruning.WeightNormSparsifier."""
    layers = modules(model)
    whole = nn.Sequential(*layers.values())
    sparsifier = WeightNormSparsifier(AMOUNT, sparse_block_shape=(4, 4), zeros_per_block=16)
    names = [{"tensor_fqn": f"{index}.weight"} for index in range(len(layers))]
    sparsifier.prepare(whole, names)  # type: ignore[no-untyped-call]
    sparsifier.step()
    return {
        name: layer.parametrizations.weight[0].mask.bool()  # type: ignore[union-attr, index]
        for name, layer in layers.items()
    }


def modules(model: Model) -> dict[str, nn.Module]:
    """A module for each tensor, on its memory."""
    found = {}
    for name, weight in model.items():
        found[name] = nn.Module()
        found[name].register_parameter("weight", nn.Parameter(weight))
    return found
