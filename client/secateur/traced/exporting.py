"""Exports a module, and leaves it as it was."""

import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn import Module, MultiheadAttention

from secateur.checks import shown
from secateur.cycles import no_search_for_cycles
from secateur.entries import from_module
from secateur.errors import InvalidSpec
from secateur.evaluation import arguments_of, in_evaluation, logged_from
from secateur.grouping import Group
from secateur.traced.follow import follow
from secateur.traced.members import groups, whole
from secateur.traced.trial import tried

_UNUSED = "it is not used for these inputs"
_LONGEST = 200
_FOREIGN = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}", "<")


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
    program = _exported(module, example_inputs)
    with no_search_for_cycles():
        units = follow(program, names)
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
        with _as_it_was(module), _silent():
            return torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:  # the module's own code, or torch's on it
        raise InvalidSpec(
            f"module: torch.export cannot trace it with these example_inputs: "
            f"{_first_sentences(error)}{_place(error)}; if the module runs with "
            "them, write the groups with secateur.group"
        ) from error


def _place(error: Exception) -> str:
    """The last line of the module's own code that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f" ({frame.filename}:{frame.lineno})"
        for frame in frames
        if not frame.filename.startswith(_FOREIGN)
    ]
    return own[-1] if own else ""


def _first_sentences(error: Exception) -> str:
    """The first paragraph of an error, or as many of its sentences as are short enough."""
    text = " ".join(str(error).strip().split("\n\n")[0].split()).rstrip(".")
    text = text or type(error).__name__
    if len(text) <= _LONGEST:
        return text
    end = text.rfind(". ", 0, _LONGEST)
    return text[:end] if end > 0 else f"{text[:_LONGEST].rpartition(' ')[0]} ..."


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps torch from writing graphs to stderr; the error says what is wrong."""
    with logged_from("torch", logging.CRITICAL), redirect_stderr(io.StringIO()):
        yield


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
