"""Which slices of which tensors a shrunk model lacks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from secateur.errors import InvalidStateDict
from secateur.shrinkage import ShrunkGroup
from secateur_proto import spec_pb2 as pb

if TYPE_CHECKING:
    from torch import Tensor


class RemovedSlices(NamedTuple):
    """Slices of a tensor that were removed along one dimension.

    Attributes:
        dim: The dimension.
        slices: Their indices.
        masked: Whether the masked model has zeros there, or the values as they were.
        group: The name of the group that has them.
        units: How many units the group had.
        kept: How many units it has now.
    """

    dim: int
    slices: Sequence[int]
    masked: bool
    group: str
    units: int
    kept: int


Removed = Mapping[str, Sequence[RemovedSlices]]


def removed_slices(
    groups: Iterable[pb.Group], units: Mapping[str, ShrunkGroup], dims: Mapping[str, int]
) -> dict[str, list[RemovedSlices]]:
    """Returns what was removed of each tensor.

    Args:
        groups: As they were sent.
        units: Which units were removed, by the groups' names; guard rails may exclude groups.
        dims: How many dimensions each tensor has.
    """
    found: dict[str, list[RemovedSlices]] = {}
    for group in {group.name: group for group in groups}.values():  # several rules may have one
        of = units.get(group.name)
        if of is None or not of.removed:
            continue
        for member in group.members:
            slices = _slices(member, of)
            dim = member.dim % dims[member.tensor]
            found.setdefault(member.tensor, []).append(
                RemovedSlices(dim, slices, not member.unmasked, group.name, of.units, len(of.kept))
            )
    return found


def masked_tensor(original: "Tensor", shrunk: "Tensor", removed: Iterable[RemovedSlices]) -> Any:
    """Returns a tensor of the masked model.

    Args:
        original: The tensor as it was.
        shrunk: What is left of it.
        removed: What was removed.
    """
    removed = list(removed)
    if all(one.masked for one in removed):
        return _with_zeros(original, shrunk.detach().to("cpu", original.dtype), removed)
    masked = original.detach().cpu().clone()
    kept = [np.ones(size, bool) for size in masked.shape]
    for one in removed:
        kept[one.dim][list(one.slices)] = False
    places = np.ix_(*[np.flatnonzero(each) for each in kept])
    masked[places] = shrunk.detach().to("cpu", masked.dtype)
    for one in removed:
        if one.masked:
            masked[(slice(None),) * one.dim + (list(one.slices),)] = 0
    return masked


def _with_zeros(original: "Tensor", shrunk: "Tensor", removed: Sequence[RemovedSlices]) -> "Tensor":
    """The shrunk tensor with zeros for what was removed."""
    import torch

    found = shrunk
    for dim in {one.dim for one in removed}:
        kept = np.ones(original.shape[dim], bool)
        for one in removed:
            if one.dim == dim:
                kept[list(one.slices)] = False
        shape = (*found.shape[:dim], len(kept), *found.shape[dim + 1 :])
        index = torch.from_numpy(np.flatnonzero(kept))
        found = found.new_zeros(shape).index_copy_(dim, index, found)
    return found


def groups_kept(layers: Mapping[str, Any], removed: Removed) -> dict[str, int]:
    """Returns how many groups are left of each grouped convolution that lost rows.

    Args:
        layers: All submodules by their paths.
        removed: What was removed of each tensor.

    Raises:
        InvalidStateDict: It keeps more rows of one group than of another.
    """
    found = {}
    for path, layer in layers.items():
        weight = f"{path}.weight" if path else "weight"
        rows = [one for one in removed.get(weight, ()) if one.dim == 0]
        groups = getattr(layer, "groups", 1) if rows else 1
        if groups == 1:
            continue
        kept = np.ones(layer.weight.shape[0], bool)
        for one in rows:
            kept[list(one.slices)] = False
        counts = kept.reshape(groups, -1).sum(1)
        whole = set(counts.tolist()) <= {0, kept.size // groups}
        if not whole and len(set(counts.tolist())) > 1:
            raise InvalidStateDict(
                f"{weight}: keeps from {counts.min()} to {counts.max()} rows of its {groups} "
                "convolution groups; prune whole ones, or as many rows of each"
            )
        found[f"{path}.groups" if path else "groups"] = int((counts > 0).sum())
    return found


def _slices(member: pb.Member, units: ShrunkGroup) -> list[int]:
    """The slices that a member lost."""
    if member.indices:
        each = len(member.indices) // units.units
        chosen = (member.indices[unit * each : (unit + 1) * each] for unit in units.removed)
        return [index for indices in chosen for index in indices]
    stride, offset = member.stride or 1, member.offset  # protobuf makes an object for each reading
    if stride == 1:
        return [offset + unit for unit in units.removed]
    begins = (offset + unit * stride for unit in units.removed)
    return [begin + step for begin in begins for step in range(stride)]
