"""Tries whether forward can run with fewer units. Imported with torch only."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, empty
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module
from torch.utils import _pytree as pytree

from secateur.evaluation import arguments_of, brief
from secateur.grouping import Group
from secateur.resizing.layers import fit_layers
from secateur.resizing.modules import copied, named_tensors
from secateur.resizing.removal import groups_kept, removed_slices
from secateur.shrinkage import ShrunkGroup

_FIXED = "forward uses a size that does not change: "


def tried(
    module: Module, groups: Sequence[Group], example_inputs: Any
) -> tuple[list[Group], dict[str, str]]:
    """Runs a module without one unit of each group, on tensors that have shapes and no values.

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
            failures[more[0].message.name.rstrip("+")] = _FIXED + failure
            return accepted
        half = len(more) // 2
        return added(added(accepted, more[:half]), more[half:])

    return added([], groups), failures


def _failure(module: Module, groups: Sequence[Group], example_inputs: Any) -> str | None:
    """Why forward fails without the last unit of each group; None if it does not."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args, kwargs = pytree.tree_map_only(
                Tensor, mode.from_tensor, arguments_of(example_inputs)
            )
            _without_units(module, groups)(*args, **kwargs)
    except Exception as error:  # the module's own code, or torch's on it
        return brief(error)
    return None


def _without_units(module: Module, groups: Sequence[Group]) -> Module:
    """A copy of a module whose tensors have no values, without the last unit of each group."""
    tensors = dict(named_tensors(module))
    lost = {group.message.name: _last(group.message.members[0].units) for group in groups}
    messages = [group.message for group in groups]
    found = removed_slices(messages, lost, {name: one.ndim for name, one in tensors.items()})
    by_tensor = {id(tensors[name]): slices for name, slices in found.items()}
    removed = {name: by_tensor.get(id(tensor), ()) for name, tensor in tensors.items()}
    values = {}
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        for one in removed[name]:
            shape[one.dim] -= len(one.slices)
        values[name] = empty(shape, dtype=tensor.dtype, device=tensor.device)
    made = copied(module, values)
    fit_layers(module, made, groups_kept(dict(module.named_modules()), removed))
    return made


def _last(units: int) -> ShrunkGroup:
    return ShrunkGroup(units, tuple(range(units - 1)), (units - 1,))
