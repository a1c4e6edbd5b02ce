"""Reference results: torch.nn.utils.prune itself, and plain sorting."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.utils.prune
from torch import Tensor
from torch.nn import Module

import secateur

prune: Any = torch.nn.utils.prune  # torch leaves these functions untyped

Tensors = Mapping[str, Tensor]
Names = Sequence[str]

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
EXACT = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)


def module_of(tensors: Tensors) -> Module:
    """Makes a module, without a forward, whose parameters have these names and values."""
    root = Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        part = root
        for step in path:
            if step not in part._modules:
                part.add_module(step, Module())
            part = part.get_submodule(step)
        part.register_parameter(leaf, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    return root


def place(module: Module, name: str) -> tuple[Module, str]:
    """Returns the submodule of a parameter and its name in it, as torch's functions take them."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def masks_of(module: Module) -> dict[str, Tensor]:
    """Returns the masks of a pruned module: bool, True is kept."""
    buffers = module.named_buffers()
    return {n.removesuffix("_mask"): b == 1 for n, b in buffers if n.endswith("_mask")}


@dataclass(frozen=True)
class Step:
    """One pruning, as a spec and as calls of torch's functions."""

    spec: secateur.Spec
    on: Callable[[Module], None]

    def __add__(self, other: "Step") -> "Step":
        def on(module: Module) -> None:
            self.on(module)
            other.on(module)

        return Step(self.spec + other.spec, on)


def by_torch(tensors: Tensors, *steps: Step) -> Module:
    """Makes a module, and prunes it with torch."""
    module = module_of(tensors)
    for step in steps:
        step.on(module)
    return module


def torch_masks(tensors: Tensors, *steps: Step) -> dict[str, Tensor]:
    """Returns the masks that torch computes."""
    return masks_of(by_torch(tensors, *steps))


def _each(names: Names, spec: secateur.Spec, call: Callable[..., Any]) -> Step:
    def on(module: Module) -> None:
        for name in names:
            call(name, *place(module, name))

    return Step(spec, on)


def identity(names: Names) -> Step:
    return _each(names, secateur.identity(names), lambda _, part, leaf: prune.identity(part, leaf))


def l1(names: Names, amount: float, scores: Tensors | None = None) -> Step:
    spec = secateur.l1_unstructured(names, amount, importance_scores=scores)
    own = scores or {}
    return _each(
        names,
        spec,
        lambda name, part, leaf: prune.l1_unstructured(part, leaf, amount, own.get(name)),
    )


def ln(
    names: Names, amount: float, n: float | str, dim: int, scores: Tensors | None = None
) -> Step:
    spec = secateur.ln_structured(names, amount, n, dim, importance_scores=scores)
    own = scores or {}
    return _each(
        names,
        spec,
        lambda name, part, leaf: prune.ln_structured(part, leaf, amount, n, dim, own.get(name)),
    )


def all_l1(names: Names, amount: float, scores: Tensors | None = None) -> Step:
    def on(module: Module) -> None:
        places = {name: place(module, name) for name in names}
        own = {places[name]: values for name, values in (scores or {}).items()}
        prune.global_unstructured(places.values(), prune.L1Unstructured, own, amount=amount)

    return Step(secateur.global_unstructured(names, amount, importance_scores=scores), on)


def custom(masks: Tensors) -> Step:
    return _each(
        list(masks),
        secateur.custom_from_mask(masks),
        lambda name, part, leaf: prune.custom_from_mask(part, leaf, masks[name]),
    )


def assert_same_masks(ours: Tensors, theirs: Tensors) -> None:
    """Compares the masks of a result with expected ones, in any order."""
    assert ours.keys() == theirs.keys()
    for name, mask in theirs.items():
        assert ours[name].dtype == torch.bool, name
        assert ours[name].shape == mask.shape, name
        assert torch.equal(ours[name], mask), name


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: -0.0 differs from 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def assert_same_tensors(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor.detach()), name


def distinct(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random weights of both signs with distinct magnitudes, for up to 10^5 elements."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    steps = torch.randperm(count, generator=generator) + 1
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return ((steps + 0.9 * jitter) * signs / max(count, 1)).to(dtype).reshape(tuple(shape))


def count_of(amount: float, units: int) -> int:
    """Converts an amount to a number of units."""
    return amount if isinstance(amount, int) else round(amount * units)


def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Returns masks that prune the `count` lowest |scores|; ties go to the first tensor and index.

    Compares as float64, which represents every other floating dtype exactly.
    """
    ranked = torch.cat([values.double().abs().reshape(-1) for values in scores])
    kept = torch.ones(len(ranked), dtype=torch.bool)
    kept[torch.sort(ranked, stable=True).indices[:count]] = False
    parts = torch.split(kept, [values.numel() for values in scores])
    return [part.view(values.shape) for part, values in zip(parts, scores, strict=True)]


def lowest_slices(norms: Tensor, count: int, shape: Sequence[int], dim: int) -> Tensor:
    """Returns the mask of a tensor of `shape` that prunes the `count` slices of lowest norms."""
    (kept,) = lowest([norms], count)
    along = [1] * len(shape)
    along[dim] = -1
    return kept.view(along).expand(tuple(shape))
