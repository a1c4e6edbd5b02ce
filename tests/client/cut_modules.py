"""Masks and cuts modules slice by slice, and compares them: the definition of a shrunk model."""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from secateur.grouping import Group
from secateur.removal import Removed, removed_slices
from secateur.resizing import shrunk
from secateur.shrinkage import ShrunkGroup


class Cut(NamedTuple):
    masked: nn.Module
    tensors: dict[str, Tensor]
    removed: Removed


def cut(module: nn.Module, groups: Sequence[Group], kept: Mapping[str, Sequence[bool]]) -> Cut:
    """Masks and cuts a module slice by slice."""
    masked = copy.deepcopy(module)
    whole = masked.state_dict()
    lost: dict[tuple[str, int], set[int]] = {}
    for group in (group.message for group in groups):
        for member in group.members:
            dim = member.dim % whole[member.tensor].ndim
            size = (len(member.indices) // len(kept[group.name])) or member.stride
            for unit, stays in enumerate(kept[group.name]):
                for step in range(0 if stays else size):
                    at = unit * size + step
                    slice_ = member.indices[at] if member.indices else member.offset + at
                    lost.setdefault((member.tensor, dim), set()).add(slice_)
                    if not member.unmasked:
                        whole[member.tensor].select(dim, slice_).zero_()
    tensors = {name: tensor.clone() for name, tensor in whole.items()}
    for (name, dim), slices in lost.items():
        tensors[name] = torch.from_numpy(np.delete(tensors[name].numpy(), list(slices), dim))
    dims = {name: tensor.ndim for name, tensor in whole.items()}
    units = {name: _shrunk_group(stays) for name, stays in kept.items()}
    return Cut(masked, tensors, removed_slices([g.message for g in groups], units, dims))


def _shrunk_group(stays: Sequence[bool]) -> ShrunkGroup:
    kept = tuple(unit for unit, stay in enumerate(stays) if stay)
    removed = tuple(unit for unit, stay in enumerate(stays) if not stay)
    return ShrunkGroup(len(stays), kept, removed)


def some_units(module: nn.Module, groups: Sequence[Group], seed: int) -> dict[str, list[bool]]:
    """About half of the units of each group, at least one."""
    chance, tensors, found = random.Random(seed), module.state_dict(), {}
    for group in (group.message for group in groups):
        first = group.members[0]
        length = tensors[first.tensor].shape[first.dim]
        units = first.units or (len(first.indices) or length - first.offset) // (first.stride or 1)
        kept = [chance.random() < 0.5 for _ in range(units)]
        kept[chance.randrange(units)] = True
        kept[chance.randrange(units)] &= sum(kept) == 1
        found[group.name] = kept
    return found


def run(module: nn.Module, given: Any) -> Tensor:
    with torch.no_grad():
        out = module(**given) if isinstance(given, dict) else module(given)
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= 1e-12 * float(one.abs().max())


def doubles(given: Any) -> Any:
    """Inputs for a module in float64."""
    if isinstance(given, dict):
        return {name: doubles(value) for name, value in given.items()}
    return given.double() if given.is_floating_point() else given


def shrink(module: nn.Module, groups: Sequence[Group], example_inputs: Any = None) -> nn.Module:
    """A smaller module, without about half of its units."""
    kept = some_units(module, groups, 0)
    return shrunk(module, *cut(module, groups, kept)[1:], example_inputs)
