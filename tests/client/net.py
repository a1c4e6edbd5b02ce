"""Networks with the groups of their units, and members of such groups."""

from typing import Any, NamedTuple

import torch
from torch import nn

import secateur
from secateur.grouping import Group, Member


class Net(NamedTuple):
    module: nn.Module
    groups: list[Group]
    inputs: Any


def norm(name: str, masked: bool = True) -> list[Member]:
    """A batch norm's tensors."""
    scale = [secateur.member(f"{name}.{leaf}", masked=masked) for leaf in ("weight", "bias")]
    running = ("running_mean", "running_var")
    return scale + [secateur.member(f"{name}.{leaf}", masked=False) for leaf in running]


def outputs(*names: str) -> list[Member]:
    return [secateur.member(f"{name}.{leaf}") for name in names for leaf in ("weight", "bias")]


def inputs(*names: str, offset: int = 0, stride: int = 1, units: int | None = None) -> list[Member]:
    places: dict[str, Any] = {"offset": offset, "stride": stride, "units": units}
    return [secateur.member(f"{name}.weight", dim=1, **places) for name in names]


def weights(*names: str) -> list[Member]:
    return [secateur.member(f"{name}.weight") for name in names]


def randomized(module: nn.Module) -> nn.Module:
    """The module in float64, with random values also where it begins with zeros and ones."""
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and "inv_freq" not in name:
                around = 1.0 if name.endswith("running_var") else 0.0
                tensor.copy_((torch.randn_like(tensor) * 0.3).abs() + around)
                if not around:
                    tensor.mul_(torch.randint_like(tensor, 2) * 2 - 1)
    return module
