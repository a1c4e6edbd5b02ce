"""torch modules: what is read from them, and masks put on them. Imported with torch only."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils import prune

from secateur.errors import InvalidStateDict
from secateur.places import tensor_place


def entries_of(module: Module) -> tuple[dict[str, Any], frozenset[str]]:
    """A module's state_dict, and the names of its tensors that can be pruned.

    The latter are its parameters, and the masks of those that are pruned.
    """
    entries = module.state_dict()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    masks = {f"{name.removesuffix('_orig')}_mask" for name in parameters if name.endswith("_orig")}
    return entries, frozenset(parameters | masks) & entries.keys()


def check_hooks(module: Module) -> None:
    """Refuses a module in which pruning hooks and pairs do not belong together one to one.

    Errors: InvalidStateDict.
    """
    for path, part in module.named_modules():
        hooks = [hook._tensor_name for hook in _pruning_hooks(part)]
        for name in hooks:
            full = f"{path}.{name}" if path else name
            if hooks.count(name) > 1:
                raise InvalidStateDict(f"{full}: has {hooks.count(name)} pruning hooks, not one")
            if f"{name}_orig" not in part._parameters or f"{name}_mask" not in part._buffers:
                raise InvalidStateDict(
                    f"{full}: has a pruning hook, but not both {name}_orig and {name}_mask"
                )


def _pruning_hooks(part: Module) -> list[prune.BasePruningMethod]:
    hooks = part._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def apply_masks(module: Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Installs masks as torch.nn.utils.prune.custom_from_mask does.

    A tied parameter is pruned under each of its names in the module.

    masks: bool, by parameter name.  Errors: InvalidStateDict, before anything has changed.
    """
    check_hooks(module)
    for part, leaf, mask in _targets(module, masks):
        prune.custom_from_mask(part, leaf, mask.to(_weight(part, leaf).device))  # type: ignore[no-untyped-call]


def _targets(
    module: Module, masks: Mapping[str, torch.Tensor]
) -> list[tuple[Module, str, torch.Tensor]]:
    """Each submodule and parameter to install a mask at.  Errors: InvalidStateDict."""
    parts = dict(module.named_modules(remove_duplicate=False))
    names = _names_by_parameter(module)
    buffers = _tied_buffers(module, masks, names)
    by_parameter: dict[int, tuple[str, torch.Tensor]] = {}
    for given, mask in masks.items():
        name = buffers.get(given, given)
        weight = _weight(*_target(parts, name, mask))
        first, known = by_parameter.setdefault(id(weight), (name, mask))
        if not torch.equal(known, mask):
            raise InvalidStateDict(
                f"{first} and {name} are one parameter of the module, and their masks differ"
            )
    return [
        (*_target(parts, name, mask), mask)
        for parameter, (_, mask) in by_parameter.items()
        for name in names[parameter]
    ]


def _tied_buffers(
    module: Module, masked: Collection[str], names: Mapping[int, list[str]]
) -> dict[str, str]:
    """From each masked buffer on the memory of a parameter to that parameter's name.

    names: As _names_by_parameter returns them.
    """
    buffers = {n: b for n, b in module.named_buffers(remove_duplicate=False) if n in masked}
    if not buffers:
        return {}
    places = {tensor_place(p): names[id(p)][0] for p in module.parameters()}
    found = {name: places.get(tensor_place(buffer)) for name, buffer in buffers.items()}
    return {buffer: name for buffer, name in found.items() if name is not None}


def _names_by_parameter(module: Module) -> dict[int, list[str]]:
    """From the id of each parameter to its names; one name for a submodule that has several."""
    names: dict[int, list[str]] = {}
    for path, part in module.named_modules():
        for stored, parameter in part._parameters.items():
            leaf = stored.removesuffix("_orig")
            leaf = leaf if f"{leaf}_mask" in part._buffers else stored
            names.setdefault(id(parameter), []).append(f"{path}.{leaf}" if path else leaf)
    return names


def _weight(part: Module, leaf: str) -> torch.Tensor:
    weight = part._parameters.get(f"{leaf}_orig")
    weight = part._parameters.get(leaf) if weight is None else weight
    assert weight is not None, "_target found it"
    return weight


def _target(parts: Mapping[str, Module], name: str, mask: torch.Tensor) -> tuple[Module, str]:
    """The submodule and the parameter that a mask is for, once they are found to fit it.

    Args:
        parts: The submodules by their names, of which one may have several.
        name: Of the parameter.
        mask: Bool.

    Raises:
        InvalidStateDict: The mask cannot be installed there.
    """
    path, _, leaf = name.rpartition(".")
    part = parts.get(path)
    if part is None or not {leaf, f"{leaf}_orig"} & part._parameters.keys():
        raise InvalidStateDict(f"{name}: the module has no such parameter")
    if _weight(part, leaf).shape != mask.shape:
        shapes = f"{list(_weight(part, leaf).shape)}, the mask {list(mask.shape)}"
        raise InvalidStateDict(f"{name}: the parameter has shape {shapes}")
    if f"{leaf}_orig" not in part._parameters:
        for taken in (f"{leaf}_orig", f"{leaf}_mask"):
            if hasattr(part, taken):
                raise InvalidStateDict(f"{name}: the module has a {taken} of its own")
    else:
        if leaf not in [hook._tensor_name for hook in _pruning_hooks(part)]:
            raise InvalidStateDict(f"{name}: is a pair without a pruning hook")
        before = part._buffers[f"{leaf}_mask"]
        if before is not None and bool((mask & (before.cpu() == 0)).any()):
            raise InvalidStateDict(
                f"{name}: the module was pruned otherwise since the result was made"
            )
    return part, leaf
