"""Exports a module, and leaves it as it was."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn import Module, MultiheadAttention

from secateur.checks import shown
from secateur.entries import from_module
from secateur.errors import InvalidSpec
from secateur.evaluation import arguments_of, in_evaluation
from secateur.grouping import Group
from secateur.traced.follow import follow
from secateur.traced.members import groups, whole
from secateur.traced.trial import tried

_UNUSED = "it is not used for these inputs"
_LONGEST = 200


def trace(module: Any, example_inputs: Any) -> tuple[list[Group], dict[str, str]]:
    """Returns the groups of a module, and what stays whole: see secateur.groups."""
    if not isinstance(module, Module):
        raise InvalidSpec(f"module: {shown(module)} is not a torch.nn.Module")
    names = _names(module)
    parameters = {
        names[name]: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name in names
    }
    weights = {name for name, one in parameters.items() if one.dim() > 1}
    units = follow(_exported(module, example_inputs), names)
    found = groups(units, weights, parameters, _fixed(module, names))
    used = {named.tensor for named in units.named}
    unused = {name: _UNUSED for name in parameters if name in weights - used}
    with _as_it_was(module):
        found, failures = tried(module, found, example_inputs)
    return found, whole(units, weights) | failures | unused


def _fixed(module: Module, names: Mapping[str, str]) -> set[str]:
    """The tensors of attention modules of torch."""
    places = {path for path, part in module.named_modules() if isinstance(part, MultiheadAttention)}
    prefixes = tuple(f"{path}." if path else "" for path in places)
    return {name for given, name in names.items() if prefixes and given.startswith(prefixes)}


def _names(module: Module) -> dict[str, str]:
    """Maps each parameter and buffer to its tensor: one for tied ones, X for X_orig and X_mask."""
    source = from_module(module)
    names = {name: name for name in source.tensors}
    for other, name in source.other_names.items():
        names |= {other: name, f"{other}_orig": name, f"{other}_mask": name}
    for base in source.pairs():
        names |= {f"{base}_orig": base, f"{base}_mask": base}
    return names


def _exported(module: Module, example_inputs: Any) -> ExportedProgram:
    args, kwargs = arguments_of(example_inputs)
    try:
        with _as_it_was(module):
            return torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:  # the module's own code, or torch's on it
        line = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        raise InvalidSpec(
            f"module: torch.export cannot trace it with these example_inputs: {line}; "
            "write the groups with secateur.group"
        ) from error


@contextmanager
def _as_it_was(module: Module) -> Iterator[None]:
    """Puts the module in evaluation, without kernels that fuse layers, and restores it."""
    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with in_evaluation(module), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about attributes that the export restores
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)
