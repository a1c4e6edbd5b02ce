"""Copies of modules, and the tensors of masked ones."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from secateur.resizing.copying import deep_copy
from secateur.resizing.removal import RemovedSlices, masked_tensor


class Tied(nn.Module):
    """Has tied weights, shared dictionaries, and empty ones of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.names: dict[str, Any] = {}
        self.same_names = self.names
        self.order: OrderedDict[str, Any] = OrderedDict()


def test_a_deep_copy_shares_nothing_with_its_module_and_what_the_module_shares() -> None:
    module = Tied()
    made: Any = deep_copy(module, {})
    assert made.names is made.same_names
    assert made.names is not module.names
    assert type(made.order) is OrderedDict
    assert made.one.weight is made.other.weight
    assert made.one.weight is not module.one.weight
    made.one.register_forward_hook(lambda *_: None)
    made.names["x"] = 1
    assert not module.one._forward_hooks
    assert not made.other._forward_hooks
    assert not module.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("is_masked", [True, False])
def test_a_masked_tensor_has_zeros_or_its_values_where_slices_were_removed(
    dtype: torch.dtype, is_masked: bool
) -> None:
    original = torch.arange(1, 61).view(3, 5, 4).to(dtype)
    removed = [
        RemovedSlices(1, [0, 3], True, "g", 5, 3),
        RemovedSlices(2, [2], is_masked, "h", 4, 3),
    ]
    shrunk = 2 * original[:, [1, 2, 4]][:, :, [0, 1, 3]]
    expected = original.clone()
    expected[:, [[1], [2], [4]], [0, 1, 3]] = shrunk
    expected[:, [0, 3]] = 0
    if is_masked:
        expected[:, :, 2] = 0
    assert torch.equal(masked_tensor(original, shrunk, removed), expected)
    assert torch.equal(masked_tensor(original, 2 * original, []), 2 * original)
