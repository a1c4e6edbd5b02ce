"""Groups by hand."""

from typing import Any

import torch
from torch import nn

import secateur
from secateur.grouping import Group, Member


def outputs(*names: str) -> list[Member]:
    return [secateur.member(f"{name}.{leaf}") for name in names for leaf in ("weight", "bias")]


def inputs(*names: str, offset: int = 0, stride: int = 1, units: int | None = None) -> list[Member]:
    places: dict[str, Any] = {"offset": offset, "stride": stride, "units": units}
    return [secateur.member(f"{name}.weight", dim=1, **places) for name in names]


def two_layers() -> tuple[nn.Sequential, list[Group]]:
    """Two layers, the same each time, and the group of the units between them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    return module, [secateur.group("hidden", *outputs("0"), *inputs("2"))]
