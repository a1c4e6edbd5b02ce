"""Groups along which forward cannot be cut are found before anything is pruned."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from tests.shrinking.cutting import difference, shrink
from tests.shrinking.fixed_nets import FIXED
from tests.shrinking.nets import prepared


@pytest.mark.parametrize("name", FIXED)
def test_groups_that_forward_cannot_take_are_kept_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, inputs, whole, names = FIXED[name]
    module, inputs = prepared(make()), inputs.double()
    groups = secateur.groups(module, inputs)
    assert [group.message.name for group in groups] == names
    assert groups.kept[whole].startswith("forward uses a size that does not change: ")
    assert difference(module, inputs, groups, 0) < 1e-12
    monkeypatch.setattr("secateur.traced.exporting.tried", lambda _, groups, __: (groups, {}))
    untried = secateur.groups(module, inputs)
    assert [one.message.name for one in untried if one.message.name not in names] == [whole]
    with pytest.raises(secateur.InvalidStateDict, match="fails in the shrunk module"):
        shrink(module, untried, inputs)


class Pair(nn.Module):
    """Its layers may lose one unit in all, as the sum of their widths is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.c, self.d = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        if a.size(1) + b.size(1) < 11:
            raise ValueError("too narrow\nby far")
        return self.c(a) + self.d(b)  # type: ignore[no-any-return]


def test_groups_that_fail_only_with_each_other() -> None:
    groups = secateur.groups(Pair(), torch.randn(3, 4))
    assert [group.message.name for group in groups] == ["a.weight"]
    assert groups.kept["b.weight"] == "forward uses a size that does not change: too narrow"


class Listed(nn.Linear):
    """Needs values, which tensors of a trial do not have; torch.export can trace it."""

    def forward(self, input: Tensor) -> Any:
        if not torch.compiler.is_exporting():
            input = input * float(input.tolist()[0][0] == input[0, 0])
        return super().forward(input)


def test_a_module_that_cannot_be_tried_has_all_groups() -> None:
    module = nn.Sequential(Listed(4, 6), nn.ReLU(), nn.Linear(6, 2))
    groups = secateur.groups(prepared(module), torch.randn(3, 4).double())
    assert [group.message.name for group in groups] == ["0.weight"]
