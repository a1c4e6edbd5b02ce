"""A small network, batches, and a loop in which it trains."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import secateur

SPEC = secateur.global_unstructured("*.weight", 0.8)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


def batches(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        yield (
            torch.randn(8, 1, 6, 6, generator=generator),
            torch.randint(10, (8,), generator=generator),
        )


def loss_of(module: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(module(images), labels)


def zeros(module: nn.Module) -> dict[str, Tensor]:
    """Where the weights of a module are zero, by their names without prefixes."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): parameter.detach() == 0
        for name, parameter in module.named_parameters()
        if name.endswith("weight")
    }


def count(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def cubic(number: int, prunings: int) -> int:
    """Zhu & Gupta's sparsity of `network` after some prunings to SPEC, in weights."""
    total = sum(mask.numel() for mask in zeros(network()).values())
    return round(0.8 * (1 - (1 - number / prunings) ** 3) * total)


class Watch:
    """Compares the zeros after each step with those before: none may vanish."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, zeros(module)
        self.sums: list[int] = []

    def look(self) -> None:
        now = zeros(self._module)
        for name, before in self._before.items():
            assert bool((now[name] | ~before).all()), name
        self._before = now
        self.sums.append(count(now))


def trained(
    pruning: secateur.callbacks.Pruning, module: Any, optimizer: Any, number: int
) -> list[int]:
    """Trains a module, and returns its zeros after each step."""
    watch = Watch(module)
    for batch in batches(number):
        optimizer.zero_grad()
        loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        secateur.callbacks.step(pruning)
        watch.look()
    return watch.sums
