"""Reads the entries of a state_dict: a mapping of tensors, or a torch.nn.Module."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from secateur.cycles import no_search_for_cycles
from secateur.errors import InvalidStateDict
from secateur.model import Source
from secateur.tensors import (
    LocalTensor,
    NotATensor,
    NoWireDtype,
    dtype_of,
    from_value,
    is_array,
    is_extra_state,
    is_text,
)
from secateur.ties import shared_names, untie
from secateur.torch_files import state_dict_advice
from secateur_proto.ties import FORMAT, write_ties


def from_mapping(source: Mapping[Any, Any]) -> Source:
    """Reads a mapping of tensors or arrays.

    Raises:
        InvalidStateDict: A name is not text, or a value is neither a tensor nor an array.
    """
    for name in source:
        if not is_text(name) or name == "__metadata__":
            raise InvalidStateDict(f"{name!r} is not text that can name a tensor")
    torch = sys.modules.get("torch")
    as_torch = torch is not None and any(isinstance(v, torch.Tensor) for v in source.values())

    def is_carried(name: str, value: Any) -> bool:
        """An extra state may be any object; other entries are tensors or arrays."""
        if not is_extra_state(name):
            return False
        return not (isinstance(value, torch.Tensor) if torch and as_torch else is_array(value))

    try:
        return _divided(source, frozenset(source), as_torch, is_carried)
    except NotATensor as error:
        raise InvalidStateDict(f"{error}; {state_dict_advice(source)}") from None


def from_module(module: Any) -> Source:
    """Reads a torch.nn.Module.

    Raises:
        InvalidStateDict: Its state_dict or its pruning hooks are broken.
    """
    from secateur.module import check_hooks, entries_of

    check_hooks(module)
    try:
        entries, parameters = entries_of(module)
    except Exception as error:  # a state_dict may be the caller's own code
        raise InvalidStateDict(f"the module's state_dict() fails: {error}") from error
    tensor = sys.modules["torch"].Tensor
    return _divided(entries, parameters, True, lambda name, value: not isinstance(value, tensor))


@no_search_for_cycles()
def _divided(
    entries: Mapping[str, Any],
    parameters: frozenset[str],
    as_torch: bool,
    is_carried: Callable[[str, Any], bool],
) -> Source:
    """Divides entries into those that safetensors has a dtype for, and the others."""
    tensors: dict[str, LocalTensor] = {}
    others: dict[str, Any] = {}
    for name, value in entries.items():
        if is_carried(name, value):
            others[name] = value
            continue
        try:
            tensors[name] = from_value(name, value)
        except NoWireDtype:
            others[name] = value
    _check_masks(tensors, others)
    shared = shared_names(tensors)
    tensors, ties = untie(tensors, shared)
    parameters |= {name for other, name in shared.items() if other in parameters}
    parameters |= {
        half
        for name in parameters
        if f"{name}_orig" in tensors and f"{name}_mask" in tensors
        for half in (f"{name}_orig", f"{name}_mask")
    }
    metadata = write_ties(dict([FORMAT]), ties)
    return Source(tensors, parameters, as_torch, metadata, others=others, order=tuple(entries))


def _check_masks(tensors: Mapping[str, LocalTensor], others: Mapping[str, Any]) -> None:
    """Refuses an X_mask that is not sent for an X_orig that is: X_orig alone is not a pair."""
    for name, value in others.items():
        orig = tensors.get(f"{name.removesuffix('_mask')}_orig")
        if name.endswith("_mask") and orig is not None and orig.kind == "floating":
            raise InvalidStateDict(
                f"{name}: has dtype {dtype_of(value)}, which a mask cannot have; use bools"
            )
