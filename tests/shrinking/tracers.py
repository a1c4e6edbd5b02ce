"""Compares secateur.groups with Torch-Pruning on the networks of nets.py.

    python -m tests.shrinking.tracers

Each prunes half of all units at random. Then the smaller model must compute what the model computes
in which all removed elements are zero.
"""

import copy
import signal
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from tests.shrinking.cutting import difference
from tests.shrinking.nets import NETS, net
from tests.shrinking.sequence_nets import Attention, FusedAttention

LIMIT = 1e-12
SECONDS = 30  # for a network


def main() -> None:
    """Prints a table for the documentation."""
    warnings.simplefilter("ignore")
    print("| network | secateur.groups | Torch-Pruning |\n|---|---|---|")
    for name in NETS:
        found = [_verdict(by, *net(name)) for by in (_by_secateur, _by_torch_pruning)]
        print(f"| {name} | {' | '.join(found)} |", flush=True)


def _verdict(by: Callable[..., float | None], module: nn.Module, example: Tensor) -> str:
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        found = by(module, example)
    except Exception as error:
        return f"fails: {type(error).__name__} {str(error)[:60]}".strip().replace("\n", " ")
    finally:
        signal.alarm(0)
    if found is None:
        return "cuts nothing"
    return "equal" if found < LIMIT else f"differs by {found:.0%}"


def _stop(*_: object) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def _by_secateur(module: nn.Module, example: Tensor) -> float:
    return difference(module, example, secateur.groups(module, example), 0)


def _by_torch_pruning(module: nn.Module, example: Tensor) -> float | None:
    """How far the smaller model is from the masked one.

    A copy, of which each element is its own number, is pruned in the same way: it says which
    elements are left.
    """
    small, numbered, zeros = (copy.deepcopy(module) for _ in range(3))
    for parameter in numbered.parameters():
        parameter.data = torch.arange(parameter.numel()).reshape(parameter.shape).double()
    for one in (small, numbered):
        _prune(one, example)
    left = dict(numbered.named_parameters())
    removed = 0
    with torch.no_grad():
        for name, parameter in zeros.named_parameters():
            is_left = torch.zeros(parameter.numel(), dtype=torch.bool)
            is_left[left[name].long().flatten()] = True
            parameter.mul_(is_left.reshape(parameter.shape))
            removed += int((~is_left).sum())
        expected, found = zeros(example), small(example)
    return float((found - expected).abs().max() / expected.abs().max()) if removed else None


def _prune(module: nn.Module, example: Tensor) -> None:
    import torch_pruning

    heads: dict[nn.Module, int] = {}
    for part in module.modules():
        if isinstance(part, Attention):
            heads |= {one: one.out_features // part.head_dim for one in (part.q, part.k, part.v)}
        elif isinstance(part, FusedAttention):
            heads[part.qkv] = part.qkv.out_features // part.head_dim // 3
    layers = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
    last = [part for part in module.modules() if isinstance(part, layers)][-1]
    torch.manual_seed(0)
    options: dict[str, Any] = {"ignored_layers": [last], "num_heads": heads}
    torch_pruning.pruner.BasePruner(
        module,
        example,
        torch_pruning.importance.RandomImportance(),
        pruning_ratio=0.5,
        prune_num_heads=True,
        prune_head_dims=False,
        **options,
    ).step()


if __name__ == "__main__":
    main()
