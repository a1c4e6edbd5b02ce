"""Compares a shrunk module with the masked one. Imported with torch only."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils import _pytree as pytree

from secateur.errors import InvalidStateDict
from secateur.evaluation import arguments_of, brief
from secateur.resizing.copying import deep_copy

_CACHES = ("past_key_values", "cache")


class Difference(InvalidStateDict):
    """The shrunk module does not compute what the masked one computes; the caller adds advice."""


def check_same(masked: Module, shrunk: Module, example_inputs: Any) -> None:
    """Checks that two modules compute the same on example inputs, in eval mode and float64.

    A module that does not run in float64 is compared in its own dtypes.

    Args:
        masked: Is not changed.
        shrunk: Is not changed.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keywords.

    Raises:
        Difference: The shrunk module differs, or does not run; the message names the first layer.
        InvalidStateDict: The masked module does not run on the inputs.
    """
    dtype, expected = _expected(masked, example_inputs)
    found = _run_shrunk(shrunk, example_inputs, dtype)
    if not expected:
        raise InvalidStateDict("example_inputs: the module returns no tensors to compare")
    if problem := _differences(expected, found):
        pair = [_outputs(module, example_inputs, dtype) for module in (masked, shrunk)]
        place, problem = _first_difference(*pair) or ("the module", problem)
        raise Difference(f"{place}: {problem}")


def _expected(masked: Module, inputs: Any) -> tuple[torch.dtype | None, list[Tensor]]:
    """The dtype in which the masked module runs, None for its own ones, and its outputs."""
    try:
        return torch.float64, _run(_ready(masked, torch.float64), inputs, torch.float64)
    except Exception:  # a module may make tensors of another dtype, or be on a device without it
        try:
            return None, _run(_ready(masked, None), inputs, None)
        except Exception as error:
            raise InvalidStateDict(
                f"example_inputs: the module fails on them: {brief(error)}"
            ) from error


def _run_shrunk(shrunk: Module, inputs: Any, dtype: torch.dtype | None) -> list[Tensor]:
    """The outputs of the shrunk module; an error names the innermost layer that fails."""
    module = _ready(shrunk, dtype)
    running: list[str] = []
    for path, part in module.named_modules():
        part.register_forward_pre_hook(lambda *_, path=path: running.append(path))
        part.register_forward_hook(lambda *_: (running.pop(), None)[1])
    try:
        return _run(module, inputs, dtype)
    except Exception as error:
        place = running[-1] if running else ""
        raise Difference(
            f"{place or 'the module'}: fails in the shrunk module: {brief(error)}"
        ) from error


def _ready(module: Module, dtype: torch.dtype | None) -> Module:
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()) if dtype else ():
        if tensor.is_floating_point() and type(tensor) in (Tensor, Parameter):
            wide = tensor.detach().to(dtype, copy=True)  # faster than to copy first
            is_parameter = isinstance(tensor, Parameter)
            memo[id(tensor)] = Parameter(wide, tensor.requires_grad) if is_parameter else wide
    return deep_copy(module, memo).to(dtype=dtype).eval()


def _run(module: Module, inputs: Any, dtype: torch.dtype | None) -> list[Tensor]:
    """The tensors that a module returns; random numbers are the same in each run."""
    args, kwargs = arguments_of(inputs)
    args, kwargs = pytree.tree_map_only(Tensor, partial(_own, dtype=dtype), (args, kwargs))
    is_on_cuda = any(parameter.is_cuda for parameter in module.parameters())
    devices = range(torch.cuda.device_count() if is_on_cuda else 0)
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        if devices:
            torch.cuda.manual_seed_all(0)
        return _tensors(module(*args, **kwargs))


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy, which the module may change."""
    return tensor.detach().to(dtype if tensor.is_floating_point() else None, copy=True)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping):  # of transformers: its cached keys are fewer with fewer heads
        output = {name: value for name, value in output.items() if name not in _CACHES}
    return [leaf.clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _outputs(
    module: Module, inputs: Any, dtype: torch.dtype | None
) -> list[tuple[str, list[Tensor]]]:
    """The output of each call of a submodule, with its path."""
    module = _ready(module, dtype)
    found: list[tuple[str, list[Tensor]]] = []

    def record(path: str, _: Module, __: Any, output: Any) -> None:
        found.append((path, _tensors(output)))

    for path, part in module.named_modules():
        part.register_forward_hook(partial(record, path))
    _run(module, inputs, dtype)
    return found


def _first_difference(
    masked: list[tuple[str, list[Tensor]]], shrunk: list[tuple[str, list[Tensor]]]
) -> tuple[str, str] | None:
    """The path of the first submodule whose outputs have the same shapes and other values."""
    for (path, expected), (_, found) in zip(masked, shrunk, strict=False):
        same_shapes = [one.shape for one in expected] == [one.shape for one in found]
        if path and same_shapes and (problem := _differences(expected, found)):
            return path, problem
    return None


def _differences(expected: list[Tensor], found: list[Tensor]) -> str | None:
    if len(expected) != len(found):
        return f"returns {len(found)} tensors, and {len(expected)} in the masked module"
    problems = (_difference(*pair) for pair in zip(expected, found, strict=True))
    return next((problem for problem in problems if problem), None)


def _difference(expected: Tensor, found: Tensor) -> str | None:
    """How the output of the shrunk module differs, beyond rounding."""
    if expected.shape != found.shape:
        shapes = f"{list(found.shape)}, and {list(expected.shape)} in the masked module"
        return f"returns a tensor of shape {shapes}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(wide), found.to(wide)
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not differs.any():
        return None
    gap = float((a - b)[differs].abs().max())
    largest = float(torch.where(a.isfinite(), a.abs(), 0).max())
    if gap <= _tolerance(expected.dtype) * largest:
        return None
    return f"its output differs by {gap:.2g} from the masked module's, of at most {largest:.2g}"


def _tolerance(dtype: torch.dtype) -> float:
    """Of the largest value. Parts of a module may compute in float32 even if others do not."""
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0
    return max(1e-6, math.sqrt(eps))
