"""Makes smaller torch modules. Imported with torch only."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module, Parameter
from torch.nn.modules.conv import _ConvNd

from secateur.checks import shown, text_keys
from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.in_place import check_module, pruning_hooks
from secateur.module import check_hooks
from secateur.names import matched
from secateur.resizing.copying import deep_copy
from secateur.resizing.flow import fit_flow
from secateur.resizing.heads import fit_heads, numbers_of
from secateur.resizing.layers import fit_layers
from secateur.resizing.misfit import Misfit
from secateur.resizing.removal import Removed, groups_kept, masked_tensor
from secateur.resizing.self_check import Difference, check_same

Sizes = Mapping[str, Any]

_ADVICE = "check that its groups have every tensor that makes or reads their units"
_SIZES = "give all sizes that secateur.sizes returns"
_COMPARE = "give example_inputs, to compare the shrunk module with the masked one"


def sizes_of(module: Module) -> dict[str, Any]:
    """Returns what `resized` needs: shapes of tensors, groups of convolutions, and attributes."""
    check_module(module)
    found: dict[str, Any] = {name: list(tensor.shape) for name, tensor in saved_tensors(module)}
    for path, part in module.named_modules():
        if isinstance(part, _ConvNd):
            found[_joined(path, "groups")] = part.groups
    return _numbers(module) | found


def resized(module: Module, sizes: Sizes) -> Module:
    """Returns a copy whose layers have other sizes; see secateur.resize."""
    check_module(module)
    tensors, numbers = dict(named_tensors(module)), set(_numbers(module))
    values: dict[str, Tensor] = {}
    groups: dict[str, int] = {}
    others: dict[str, int] = {}
    for name, size in text_keys("sizes", sizes, "names to shapes").items():
        if type(size) is int and (name in numbers or name.endswith("groups")):
            (others if name in numbers else groups)[name] = size
        elif name not in tensors:
            raise InvalidSpec(f"sizes: {shown(name)} is not a tensor of the module")
        elif tensors[name].shape != (shape := _shape(name, size, tensors[name].ndim)):
            values[name] = _zeros(name, tensors[name], shape)
    made = copied(module, values)
    try:
        _fit_sizes(module, made, groups, others)
    except Misfit as error:
        raise InvalidStateDict(f"{error.fact}; {_SIZES}" if error.advice else error.fact) from None
    return made


def _fit_sizes(
    module: Module, made: Module, groups: Mapping[str, int], numbers: Mapping[str, int]
) -> None:
    """Fits the layers of a copy to sizes.  Raises: InvalidStateDict."""
    doubts = fit_layers(module, made, groups)
    for name, number in numbers.items():
        path, _, leaf = name.rpartition(".")
        doubts.pop(path, None)
        setattr(made.get_submodule(path), leaf, number)
    for path, doubt in doubts.items():
        raise Misfit(f"{path or 'the module'}: {doubt}", _SIZES)
    if problem := fit_flow(module, made):
        raise problem


def _numbers(module: Module) -> dict[str, int]:
    """The integer attributes of modules, such as counts of heads, by path and name."""
    return {
        _joined(path, name): number
        for path, part in module.named_modules()
        for name, number in numbers_of(part).items()
        if not name.startswith("_")
    }


def shrunk(
    module: Module, tensors: Mapping[str, Tensor], removed: Removed, example_inputs: Any = None
) -> Module:
    """Returns a copy of a module with the tensors of a shrunk model.

    Args:
        module: The one that was pruned, or one with the same tensors. Its names may have other
            prefixes than those of `tensors`: see secateur.names.
        tensors: The whole shrunk model.
        removed: What was removed, by the names of `tensors`.
        example_inputs: To compare with the masked model: a tensor, a tuple of arguments, or a
            mapping of keywords. None compares nothing.

    Raises:
        InvalidStateDict: A tensor does not fit its module, or the shrunk module does not compute
            what the masked one computes; the message names the layer.
    """
    check_module(module)
    check_hooks(module)
    originals = dict(named_tensors(module))
    places = matched(tensors, originals, tensors)
    tensors = {places[name]: tensor for name, tensor in tensors.items()}
    by_tensor = {id(originals.get(places[name])): slices for name, slices in removed.items()}
    removed = {name: by_tensor.get(id(tensor), ()) for name, tensor in originals.items()}
    _check_tensors(originals, tensors, removed, {name for name, _ in module.named_parameters()})
    made = copied(module, tensors)
    doubts = fitted(module, made, removed)
    problem = fit_flow(module, made)
    if example_inputs is not None:
        try:
            check_same(_masked(module, originals, tensors, removed), made, example_inputs)
        except Difference as error:
            why = f"{error}; {doubts[0] if doubts else _ADVICE}"
            raise (problem or InvalidStateDict(why)) from error
    elif problem or doubts:
        raise problem or InvalidStateDict(f"{doubts[0]}; {_COMPARE}")
    return made


def fitted(module: Module, made: Module, removed: Removed) -> list[str]:
    """Sets the sizes of the layers of a copy that has smaller tensors.

    Returns:
        What cannot be known from the shapes, one line for each layer.

    Raises:
        InvalidStateDict: A tensor does not fit; the message names the layer.
    """
    doubts = fit_layers(module, made, groups_kept(dict(module.named_modules()), removed))
    doubts |= fit_heads(module, made, removed)
    return [f"{path or 'the module'}: {doubt}" for path, doubt in doubts.items()]


def _masked(
    module: Module,
    originals: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    removed: Removed,
) -> Module:
    """A copy of a module with the tensors of the masked model."""
    values = {
        name: masked_tensor(originals[name], tensor, removed[name])
        for name, tensor in tensors.items()
    }
    return copied(module, values)


def named_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Yields all parameters and buffers under all their names; a pair is X, with X_orig's value."""
    for path, part in module.named_modules(remove_duplicate=False):
        pruned = {hook._tensor_name for hook in pruning_hooks(part)}
        names = {f"{leaf}_orig": leaf for leaf in pruned}
        masks = {f"{leaf}_mask" for leaf in pruned}
        for stored, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None and stored not in masks:
                yield _joined(path, names.get(stored, stored)), tensor


def saved_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Yields those of `named_tensors` that are in the state_dict."""
    saved = module.state_dict()
    for name, tensor in named_tensors(module):
        if name in saved or f"{name}_orig" in saved:
            yield name, tensor


def copied(module: Module, values: Mapping[str, Tensor]) -> Module:
    """Returns a deep copy with other values of some tensors, and without torch's masks.

    Tensors that get other values are not copied. Tied ones are tied in the copy.

    Raises:
        InvalidStateDict: Python cannot copy the module.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(module):
        if name in values:
            memo[id(tensor)] = _like(tensor, values[name])
    for part in module.modules():
        _skip_masks(part, memo)
    try:
        made = deep_copy(module, memo)
    except Exception as error:
        raise InvalidStateDict(f"the module cannot be copied: {error}") from error
    for part in made.modules():
        _remove_masks(part)
    return made


def _skip_masks(part: Module, memo: dict[int, Any]) -> None:
    """Puts the products of pairs in the memo: torch does not copy tensors that have a graph."""
    for hook in pruning_hooks(part):
        leaf = hook._tensor_name
        original, mask = part._parameters[f"{leaf}_orig"], part._buffers[f"{leaf}_mask"]
        assert original is not None, "check_hooks found it"
        assert mask is not None, "check_hooks found it"
        if id(original) not in memo:
            memo[id(original)] = _like(original, original.detach() * mask)
        memo[id(getattr(part, leaf))] = memo[id(mask)] = memo[id(original)]


def _remove_masks(part: Module) -> None:
    """Makes each pair of a copy the parameter X, which has the pruned values already."""
    for key, hook in list(part._forward_pre_hooks.items()):
        if hook in pruning_hooks(part):
            leaf = hook._tensor_name
            del part._forward_pre_hooks[key]
            del part._buffers[f"{leaf}_mask"]
            part.__dict__.pop(leaf, None)
            setattr(part, leaf, part._parameters.pop(f"{leaf}_orig"))


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """A value of its own, with the dtype, device and flags of a tensor."""
    made = value  # a fake tensor has no values to copy
    if not isinstance(value, FakeTensor):
        made = torch.empty(value.shape, dtype=tensor.dtype, device=tensor.device)
        made.copy_(value.detach())
    return Parameter(made, tensor.requires_grad) if isinstance(tensor, Parameter) else made


def _check_tensors(
    originals: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    removed: Removed,
    parameters: set[str],
) -> None:
    """Refuses tensors of another module."""
    for name, tensor in tensors.items():
        if name not in originals:
            raise InvalidStateDict(f"{name}: the module has no such tensor")
        before = list(tensor.shape)
        for one in removed[name]:
            before[one.dim] += len(one.slices)
        if before != list(originals[name].shape):
            raise InvalidStateDict(
                f"{name}: the module has shape {list(originals[name].shape)}, and the model that "
                f"was pruned {before}; give the module that was pruned"
            )
    for name in originals:
        if name in parameters and name not in tensors:
            raise InvalidStateDict(f"{name}: the result has no such tensor")


def _shape(name: str, size: Any, dimensions: int) -> tuple[int, ...]:
    is_shape = isinstance(size, list | tuple) and all(type(n) is int and n > 0 for n in size)
    if not is_shape or len(size) != dimensions:
        raise InvalidSpec(f"sizes[{name!r}]: {shown(size)} is not a shape of {dimensions} lengths")
    return tuple(size)


def _zeros(name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return like.new_zeros(shape)
    except (RuntimeError, OverflowError, TypeError):
        raise InvalidSpec(f"sizes[{name!r}]: {list(shape)} is too large to allocate") from None


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
