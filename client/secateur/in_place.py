"""Changes a torch module whole, or not at all. Imported with torch only."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils import prune

from secateur.errors import InvalidStateDict


def check_module(module: Any) -> None:
    """Refuses a module that cannot be pruned in place.

    Raises:
        InvalidStateDict: It is not a module, or has a part of TorchScript.
    """
    if not isinstance(module, Module):
        raise InvalidStateDict(f"a torch.nn.Module is needed, not {type(module).__name__}")
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise InvalidStateDict(
                f"{path or 'the module'} is a ScriptModule, in which torch installs no masks: "
                "apply the result before torch.jit.script, or load its state_dict()"
            )


def pruning_hooks(part: Module) -> list[prune.BasePruningMethod]:
    """Returns the hooks of torch.nn.utils.prune: one for each pruned parameter of a submodule."""
    hooks = part._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


@contextmanager
def all_or_nothing(parts: Iterable[Module]) -> Iterator[None]:
    """Restores submodules if the block fails.

    The values of the parameters are not copied: the block may replace them, not write into them.
    """
    saved = [_Saved(holder) for part in parts for holder in (part, *pruning_hooks(part))]
    data = [(p, p.data) for part in parts for p in part._parameters.values() if p is not None]
    try:
        yield
    except BaseException:
        for one in saved:
            one.restore()
        for parameter, values in data:
            parameter.data = values
        raise


@contextmanager
def left_as_it_was(module: Module) -> Iterator[None]:
    """Restores a module after the block: values and gradients bit for bit, modes and hooks.

    The values are copied on their devices, and all objects are the ones from before.
    """
    parts = list(module.modules())
    saved = [_Saved(holder) for part in parts for holder in (part, *pruning_hooks(part))]
    tensors = {id(one): one for part in parts for one in _tensors(part)}
    values = [_SavedTensor(one) for one in tensors.values()]
    try:
        yield
    finally:
        for one in saved:
            one.restore()
        for tensor in values:
            tensor.restore()


def _tensors(part: Module) -> Iterator[torch.Tensor]:
    """The parameters, buffers and other tensors of a submodule itself."""
    for value in vars(part).values():
        held = value.values() if isinstance(value, dict) else value
        for one in held if isinstance(value, dict | list | set) else [value]:
            if isinstance(one, torch.Tensor):
                yield one


class _SavedTensor:
    """The values of a tensor, where they are, and its gradient."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._data = tensor, tensor.data
        self._values, self._has_grad = tensor.data.clone(), tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self._saved_grad = None if self._grad is None else _SavedTensor(self._grad)

    def restore(self) -> None:
        self._tensor.data = self._data
        self._data.copy_(self._values)
        if self._tensor.is_leaf:
            self._tensor.requires_grad_(self._has_grad)
            self._tensor.grad = self._grad
        if self._saved_grad is not None:
            self._saved_grad.restore()


class _Saved:
    """The attributes of an object, and the content of those that are containers."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        self._attributes = dict(vars(holder))
        kinds = (dict, list, set)  # OrderedDict among them
        self._contents = [(v, v.copy()) for v in vars(holder).values() if isinstance(v, kinds)]

    def restore(self) -> None:
        vars(self._holder).clear()
        vars(self._holder).update(self._attributes)
        for container, content in self._contents:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


def remove_masks(module: Module, values: Mapping[str, torch.Tensor]) -> None:
    """Finalizes pruned parameters as torch.nn.utils.prune.remove does.

    Args:
        module: It has a pruning hook for each of `values`.
        values: The new values by parameter name: X_orig where it is kept, and zeros.

    Raises:
        InvalidStateDict: The module changed since it was finalized. It is left as it is.
    """
    found = []
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        part = module.get_submodule(path)
        _check_same(part, leaf, name, value)
        found.append((part, leaf, name, value))
    with all_or_nothing([part for part, *_ in found]):
        for part, leaf, name, value in found:
            try:
                prune.remove(part, leaf)  # type: ignore[no-untyped-call]
                part.get_parameter(leaf).data.copy_(
                    value
                )  # a pruned inf is NaN in torch, and 0 here
            except Exception as error:
                raise InvalidStateDict(f"{name}: torch cannot finalize it: {error}") from error


def _check_same(part: Module, leaf: str, name: str, value: torch.Tensor) -> None:
    """Refuses a parameter whose values or mask changed since it was finalized."""
    orig, mask = part._parameters[f"{leaf}_orig"], part._buffers[f"{leaf}_mask"]
    assert orig is not None, "check_hooks found it"
    assert mask is not None, "check_hooks found it"
    same = orig.shape == value.shape and orig.dtype == value.dtype
    if same:
        kept = (mask != 0).cpu()
        ours, theirs = _bits(orig.detach().cpu()), _bits(value)
        same = torch.equal(ours[kept.reshape(-1)], theirs[kept.reshape(-1)])
        same = same and not bool(value.to(torch.float64)[~kept].any())
    if not same:
        raise InvalidStateDict(
            f"{name}: the module changed since it was finalized; finalize it again"
        )


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bytes of each element, one row each: NaN equals itself."""
    flat = values.contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), -1) if flat.numel() else flat
