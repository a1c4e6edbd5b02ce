"""Reads torch modules, and installs masks in them. Imported with torch only."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils import prune

from secateur.errors import InvalidStateDict
from secateur.in_place import all_or_nothing, check_module, pruning_hooks, remove_masks
from secateur.names import matched
from secateur.places import tensor_place


def entries_of(module: Module) -> tuple[dict[str, Any], frozenset[str]]:
    """Returns a module's state_dict, and the names of its parameters and of their masks."""
    entries = module.state_dict()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    masks = {f"{name.removesuffix('_orig')}_mask" for name in parameters if name.endswith("_orig")}
    return entries, frozenset(parameters | masks) & entries.keys()


def check_hooks(module: Module) -> list[str]:
    """Checks that each pruning hook of a module has one pair.

    Returns:
        The names of the pruned parameters.

    Raises:
        InvalidStateDict: A hook has no pair, or a pair has several hooks.
    """
    pruned = []
    for path, part in module.named_modules():
        hooks = [hook._tensor_name for hook in pruning_hooks(part)]
        for name in hooks:
            full = f"{path}.{name}" if path else name
            if hooks.count(name) > 1:
                raise InvalidStateDict(f"{full}: has {hooks.count(name)} pruning hooks, not one")
            if f"{name}_orig" not in part._parameters or f"{name}_mask" not in part._buffers:
                raise InvalidStateDict(
                    f"{full}: has a pruning hook, but not both {name}_orig and {name}_mask"
                )
            pruned.append(full)
    return pruned


def apply_masks(module: Module, masks: Mapping[str, torch.Tensor], model: Collection[str]) -> None:
    """Installs masks as torch.nn.utils.prune.custom_from_mask does.

    A tied parameter is pruned under each of its names in the module.

    Args:
        module: Its names may have other prefixes than the masks': see secateur.names.
        masks: Bool, by parameter name.
        model: All names of the model that the masks are of.

    Raises:
        InvalidStateDict: A mask does not fit. The module is unchanged.
    """
    check_module(module)
    check_hooks(module)
    places = matched(masks, _parameter_names(module), {*model, *masks})
    targets = _targets(module, {places[name]: mask for name, mask in masks.items()})
    with all_or_nothing([part for _, part, _, _ in targets]):
        for name, part, leaf, mask in targets:
            try:
                prune.custom_from_mask(part, leaf, mask.to(_weight(part, leaf).device))  # type: ignore[no-untyped-call]
            except Exception as error:
                raise InvalidStateDict(f"{name}: torch cannot prune it: {error}") from error


def set_values(module: Module, values: Mapping[str, torch.Tensor]) -> None:
    """Writes a result's values into a module that is not yet pruned by it.

    Args:
        module: The one that was pruned.
        values: By the names of the parameters; of a new pair that of its X_orig.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = values.get(name, values.get(f"{name}_orig"))
        if value is not None:
            parameter.data.copy_(value)


def finalize(
    module: Module, values: Mapping[str, torch.Tensor], finalized: Collection[str]
) -> None:
    """Finalizes the parameters of a module that the server finalized.

    Args:
        module: Its names may have other prefixes than those of `values`: see secateur.names.
        values: The state_dict of the result; a pair in it is not finalized.
        finalized: The names in `values` of former pairs, as far as they are known.

    Raises:
        InvalidStateDict: The result is not of this module. The module is unchanged.
    """
    check_module(module)
    pruned = check_hooks(module)
    still = {name.removesuffix("_orig") for name in values if name.endswith("_orig")}
    places = matched(pruned, {*values, *still}, _parameter_names(module))
    for name in pruned:
        if places[name] not in {*values, *still}:
            raise InvalidStateDict(f"{name}: the result has no such tensor")
    folded = {name: values[places[name]] for name in pruned if places[name] in values}
    found = {id(value) for value in folded.values()}  # a tied tensor has several names
    missing = [name for name in finalized if id(values[name]) not in found]
    if missing or not folded:
        raise InvalidStateDict(
            f"{missing[0] if missing else 'the module'}: is not pruned in the module; load the "
            "result's state_dict() instead"
        )
    remove_masks(module, folded)


def _parameter_names(module: Module) -> list[str]:
    """All names of all parameters; a pair is its X."""
    return [name for name, _ in _parameters(module, remove_duplicate=False)]


def _parameters(module: Module, remove_duplicate: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters with their names; a pair is its X, with the value of X_orig."""
    for path, part in module.named_modules(remove_duplicate=remove_duplicate):
        for stored, parameter in part._parameters.items():
            leaf = stored.removesuffix("_orig")
            leaf = leaf if f"{leaf}_mask" in part._buffers else stored
            if parameter is not None:
                yield f"{path}.{leaf}" if path else leaf, parameter


def _targets(
    module: Module, masks: Mapping[str, torch.Tensor]
) -> list[tuple[str, Module, str, torch.Tensor]]:
    """The name, submodule, parameter and mask of each installation."""
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
        (name, *_target(parts, name, mask), mask)
        for parameter, (_, mask) in by_parameter.items()
        for name in names[parameter]
    ]


def _tied_buffers(
    module: Module, masked: Collection[str], names: Mapping[int, list[str]]
) -> dict[str, str]:
    """Maps each masked buffer on the memory of a parameter to that parameter's name."""
    buffers = {n: b for n, b in module.named_buffers(remove_duplicate=False) if n in masked}
    if not buffers:
        return {}
    places = {tensor_place(p): names[id(p)][0] for p in module.parameters()}
    found = {name: places.get(tensor_place(buffer)) for name, buffer in buffers.items()}
    return {buffer: name for buffer, name in found.items() if name is not None}


def _names_by_parameter(module: Module) -> dict[int, list[str]]:
    """Maps the id of each parameter to its names; a submodule with several names counts once."""
    names: dict[int, list[str]] = {}
    for name, parameter in _parameters(module, remove_duplicate=True):
        names.setdefault(id(parameter), []).append(name)
    return names


def _weight(part: Module, leaf: str) -> torch.Tensor:
    weight = part._parameters.get(f"{leaf}_orig")
    weight = part._parameters.get(leaf) if weight is None else weight
    assert weight is not None, "_target found it"
    return weight


def _target(parts: Mapping[str, Module], name: str, mask: torch.Tensor) -> tuple[Module, str]:
    """The submodule and the parameter of a mask; they must fit the mask."""
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
        if leaf not in [hook._tensor_name for hook in pruning_hooks(part)]:
            raise InvalidStateDict(f"{name}: is a pair without a pruning hook")
        before = part._buffers[f"{leaf}_mask"]
        if before is not None and bool((mask & (before.cpu() == 0)).any()):
            raise InvalidStateDict(
                f"{name}: the module was pruned in another way since the result was made"
            )
    return part, leaf
