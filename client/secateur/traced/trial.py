"""Tries whether forward can run with fewer units. Imported with torch only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module
from torch.utils import _pytree as pytree

from secateur.evaluation import arguments_of, brief
from secateur.grouping import Group
from secateur.resizing.modules import copied, fitted, named_tensors, shrunk
from secateur.resizing.removal import Removed, removed_slices
from secateur.shrinkage import ShrunkGroup

_FIXED = "forward uses a size that does not change: "


def tried(
    module: Module, groups: Sequence[Group], example_inputs: Any
) -> tuple[list[Group], dict[str, str]]:
    """Runs a module without one unit of each group, on tensors that have shapes and no values.

    All groups are tried at once. Only if that fails they are halved.

    Args:
        module: In evaluation.
        groups: As `members.groups` made them.
        example_inputs: What forward takes.

    Returns:
        The groups with which forward runs, and why it fails with the others, by their tensors. All
        groups if forward does not run on such tensors with all units either.
    """
    if not groups or _failure(module, groups, example_inputs) is None:
        return list(groups), {}
    if _failure(module, (), example_inputs) is not None:
        return list(groups), {}
    failures: dict[str, str] = {}

    def added(accepted: list[Group], more: Sequence[Group]) -> list[Group]:
        failure = _failure(module, [*accepted, *more], example_inputs)
        if failure is None:
            return [*accepted, *more]
        if len(more) == 1:
            failures[more[0].name.rstrip("+")] = _FIXED + failure
            return accepted
        half = len(more) // 2
        return added(added(accepted, more[:half]), more[half:])

    return added([], groups), failures


def _failure(module: Module, groups: Sequence[Group], example_inputs: Any) -> str | None:
    """Why forward fails without the last unit of each group; None if it does not."""
    try:
        removed = _last_units(module, groups)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args, kwargs = pytree.tree_map_only(
                Tensor, mode.from_tensor, arguments_of(example_inputs)
            )
            made = copied(module, _shapes(module, removed))
            doubts = fitted(module, made, removed)
            made(*args, **kwargs)
        if doubts:  # only values tell whether a count of heads is right
            shrunk(module, _cut(module, removed), removed, example_inputs)
    except Exception as error:  # the module's own code, or torch's on it
        return brief(error)
    return None


def _last_units(module: Module, groups: Sequence[Group]) -> Removed:
    """The last unit of each group, in the tensors under all their names."""
    tensors = dict(named_tensors(module))
    lost = {group.name: _last(group.members[0].message.units) for group in groups}
    messages = [group.message for group in groups]
    found = removed_slices(messages, lost, {name: one.ndim for name, one in tensors.items()})
    by_tensor = {id(tensors[name]): slices for name, slices in found.items()}
    return {name: by_tensor.get(id(tensor), ()) for name, tensor in tensors.items()}


def _last(units: int) -> ShrunkGroup:
    return ShrunkGroup(units, tuple(range(units - 1)), (units - 1,))


def _shapes(module: Module, removed: Removed) -> dict[str, Tensor]:
    """New tensors of the shapes that those of a module have without the slices."""
    found = {}
    for name, tensor in named_tensors(module):
        shape = list(tensor.shape)
        for one in removed[name]:
            shape[one.dim] -= len(one.slices)
        found[name] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return found


def _cut(module: Module, removed: Removed) -> dict[str, Tensor]:
    """The tensors of a module without the slices that are removed."""
    found = {}
    for name, tensor in named_tensors(module):
        for dim, length in enumerate(tensor.shape):
            gone = {index for one in removed[name] if one.dim == dim for index in one.slices}
            if gone:
                kept = [index for index in range(length) if index not in gone]
                tensor = tensor.index_select(dim, torch.tensor(kept, device=tensor.device))
        found[name] = tensor
    return found
