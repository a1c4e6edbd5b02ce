"""Masks and cuts units of groups in plain loops: the definition of a shrunk model."""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.grouping import Group
from secateur.resizing.modules import shrunk
from secateur.resizing.removal import Removed, removed_slices
from secateur.shrinkage import ShrunkGroup
from secateur_proto import spec_pb2 as pb

Tensors = dict[str, Tensor]
Units = Mapping[str, Sequence[int]]  # the units that are pruned, by the names of their groups


def slices(member: pb.Member, unit: int, units: int) -> list[int]:
    """Returns the slices of a unit, by the contract."""
    if member.indices:
        count = len(member.indices) // units
        return list(member.indices[unit * count : (unit + 1) * count])
    stride = member.stride or 1
    start = member.offset + unit * stride
    return list(range(start, start + stride))


def members(group: Group) -> list[tuple[str, int]]:
    """Returns the tensor and the dimension of each member."""
    return [(member.tensor, member.dim) for member in group.message.members]


def unit_counts(groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns how many units each group has, by the contract."""
    counts = {}
    for group in groups:
        first = group.message.members[0]
        length = tensors[first.tensor].shape[first.dim]
        left = (length - first.offset) // (first.stride or 1)
        counts[group.message.name] = first.units or len(first.indices) or left
    return counts


def some_units(module: nn.Module, groups: Sequence[Group], seed: int) -> dict[str, list[int]]:
    """Chooses some units of each group, at least one and not all."""
    chosen = random.Random(seed)
    return {
        name: chosen.sample(range(count), chosen.randint(1, count - 1))
        for name, count in unit_counts(groups, module.state_dict()).items()
    }


def masked(groups: Sequence[Group], units: Units, tensors: Tensors) -> Tensors:
    """Returns the tensors with zeros in all masked slices of units; tied ones stay tied."""
    firsts = _first_of_tied(tensors)
    values = {id(first): first.clone() for first in firsts.values()}
    result = {name: values[id(first)] for name, first in firsts.items()}
    counts = unit_counts(groups, tensors)
    for group in groups:
        for member in group.message.members:
            for unit in units[group.message.name]:
                if not member.unmasked:
                    where = torch.tensor(slices(member, unit, counts[group.message.name]))
                    result[member.tensor].index_fill_(member.dim, where, 0)
    return result


def cut(groups: Sequence[Group], units: Units, tensors: Tensors) -> Tensors:
    """Returns the tensors without the slices of units; tied ones are cut under all their names."""
    gone: dict[tuple[int, int], set[int]] = {}
    firsts, counts = _first_of_tied(tensors), unit_counts(groups, tensors)
    for group in groups:
        for member in group.message.members:
            first = firsts[member.tensor]
            found = gone.setdefault((id(first), member.dim % first.dim()), set())
            for unit in units[group.message.name]:
                added = slices(member, unit, counts[group.message.name])
                assert found.isdisjoint(added), member
                found.update(added)
    result = dict(firsts)
    for name, first in firsts.items():
        for dim, length in enumerate(first.shape):
            indices = gone.get((id(first), dim), set())
            kept = [index for index in range(length) if index not in indices]
            if len(kept) < length:
                result[name] = result[name].index_select(dim, torch.tensor(kept))
    return result


def _first_of_tied(tensors: Tensors) -> Tensors:
    """Each tensor, or the first one that has its memory."""
    first: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: first.setdefault((one.data_ptr(), one.shape), one) for name, one in tensors.items()
    }


class Cut(NamedTuple):
    """A masked module, and the tensors of the shrunk one."""

    masked: nn.Module
    tensors: Tensors
    removed: Removed


def cut_module(module: nn.Module, groups: Sequence[Group], units: Units) -> Cut:
    """Masks and cuts a module slice by slice."""
    tensors = module.state_dict()
    zeros, counts = masked(groups, units, tensors), unit_counts(groups, tensors)
    with_zeros = copy.deepcopy(module)
    with_zeros.load_state_dict(zeros)
    lost = {name: _shrunk_group(counts[name], removed) for name, removed in units.items()}
    dims = {name: tensor.ndim for name, tensor in tensors.items()}
    removed = removed_slices([group.message for group in groups], lost, dims)
    return Cut(with_zeros, cut(groups, units, zeros), removed)


def _shrunk_group(count: int, removed: Sequence[int]) -> ShrunkGroup:
    kept = tuple(unit for unit in range(count) if unit not in removed)
    return ShrunkGroup(count, kept, tuple(sorted(removed)))


def shrink(module: nn.Module, groups: Sequence[Group], example_inputs: Any = None) -> nn.Module:
    """Returns a smaller module, without some of its units."""
    found = cut_module(module, groups, some_units(module, groups, 0))
    return shrunk(module, found.tensors, found.removed, example_inputs)


def difference(module: nn.Module, example: Any, groups: Sequence[Group], seed: int) -> float:
    """Returns how far the shrunk model is from the masked model, relative to its largest output."""
    found = cut_module(module, groups, some_units(module, groups, seed))
    small = shrunk(module, found.tensors, found.removed, example)
    expected = run(found.masked, example)
    assert expected.std() > 0
    assert not torch.equal(expected, run(module, example))
    return float((run(small, example) - expected).abs().max() / expected.abs().max())


def run(module: nn.Module, given: Any) -> Tensor:
    """Returns the first output of a module."""
    with torch.no_grad():
        out = module(**given) if isinstance(given, dict) else module(given)
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= 1e-12 * float(one.abs().max())
