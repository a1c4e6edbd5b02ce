"""Masks and cuts whole units of groups in plain loops."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.grouping import Group
from secateur_proto import spec_pb2 as pb
from tests.client.rebuilding import rebuilt

Tensors = dict[str, Tensor]


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


def pruned(groups: Sequence[Group], seed: int) -> dict[str, list[int]]:
    """Chooses some units of each group, at least one and not all."""
    chosen = random.Random(seed)
    counts = {group.message.name: group.message.members[0].units for group in groups}
    return {
        name: chosen.sample(range(count), chosen.randint(1, count - 1))
        for name, count in counts.items()
    }


def masked(groups: Sequence[Group], units: dict[str, list[int]], tensors: Tensors) -> Tensors:
    """Returns the tensors with zeros in all masked slices of units."""
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    for group in groups:
        for member in group.message.members:
            for unit in units[group.message.name]:
                if not member.unmasked:
                    where = torch.tensor(slices(member, unit, member.units))
                    result[member.tensor].index_fill_(member.dim, where, 0)
    return result


def cut(groups: Sequence[Group], units: dict[str, list[int]], tensors: Tensors) -> Tensors:
    """Returns the tensors without the slices of units."""
    gone: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        for member in group.message.members:
            for unit in units[group.message.name]:
                found = gone.setdefault((member.tensor, member.dim), set())
                added = slices(member, unit, member.units)
                assert found.isdisjoint(added), member
                found.update(added)
    result = dict(tensors)
    for (name, dim), indices in gone.items():
        kept = [index for index in range(tensors[name].shape[dim]) if index not in indices]
        assert kept, name
        result[name] = result[name].index_select(dim, torch.tensor(kept))
    return result


def difference(module: nn.Module, example: Tensor, groups: Sequence[Group], seed: int) -> float:
    """Returns how far the cut model is from the masked model, relative to its largest output."""
    tensors = module.state_dict()
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    tied = {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    units = pruned(groups, seed)
    zeros = masked(groups, units, {n: t for n, t in tensors.items() if tied.get(n, n) == n})
    small = cut(groups, units, zeros)
    with torch.no_grad():
        expected = functional_call(module, zeros, (example,))
        found = rebuilt(module, {name: small[tied.get(name, name)] for name in tensors})(example)
        unpruned = module(example)
    assert expected.std() > 0
    assert not torch.equal(expected, unpruned)
    return float((found - expected).abs().max() / expected.abs().max())
