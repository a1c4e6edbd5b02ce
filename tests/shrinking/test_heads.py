"""Counts of heads in attributes of any name."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import secateur
from secateur.errors import InvalidStateDict
from tests.shrinking.cutting import assert_same, difference, run, shrink
from tests.shrinking.nets import prepared

X = torch.randn(2, 5, 16, dtype=torch.float64)


class Heads(nn.Module):
    """Attention with names of its own, and as many KV heads as it is given."""

    def __init__(self, kv_heads: int = 4, **others: int) -> None:
        super().__init__()
        self.h, self.g, self.size = 4, kv_heads, 4
        self.ask, self.answer = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16))
        self.find, self.tell = (nn.Linear(16, 4 * kv_heads) for _ in range(2))
        for name, number in others.items():
            setattr(self, name, number)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.ask(x).view(batch, time, self.h, -1).transpose(1, 2)
        k, v = (
            one(x).view(batch, time, self.g, -1).transpose(1, 2) for one in (self.find, self.tell)
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.answer(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Attention within a model that has a number of its own."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.depth = 4
        self.inner = Heads(**options)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))  # type: ignore[no-any-return]


def test_the_only_attribute_with_the_number_of_heads_is_set() -> None:
    module: Any = prepared(Deep(kv_heads=2))
    groups = secateur.groups(module, X)
    assert groups["inner.ask.weight"].units == 2
    assert difference(module, X, groups, 0) < 1e-12
    small: Any = shrink(module, groups, X)
    assert (small.inner.h, small.inner.g, small.inner.size, small.depth) == (2, 1, 4, 4)
    assert (module.inner.h, module.inner.g) == (4, 2)
    again = secateur.resize(module, json.loads(json.dumps(secateur.sizes(small))))
    again.load_state_dict(small.state_dict())
    assert_same(run(again, X), run(small, X))


def test_without_example_inputs_the_attribute_is_named() -> None:
    module = prepared(Deep(kv_heads=2))
    groups = list(secateur.groups(module, X))
    with pytest.raises(InvalidStateDict) as error:
        shrink(module, groups)
    assert str(error.value) == (
        "inner: its number of heads is taken to be h; give example_inputs, to compare the shrunk "
        "module with the masked one"
    )


def test_attributes_of_one_value_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The view with the old number of heads runs, and computes something else."""
    module = prepared(Deep())  # h and g are 4
    advice = "; inner: a head count did not change: h and g are each 4; name the right one n_heads"
    groups = secateur.groups(module, X)
    assert [group.name for group in groups] == ["inner.answer.0.weight"]
    assert groups.kept["inner.ask.weight"].endswith(advice)
    monkeypatch.setattr("secateur.traced.exporting.tried", lambda _, groups, __: (groups, {}))
    with pytest.raises(InvalidStateDict) as error:
        shrink(module, secateur.groups(module, X), X)
    assert str(error.value).startswith("out: its output differs by ")
    assert str(error.value).endswith(advice)


def test_all_attributes_of_one_value_are_set_if_their_names_say_heads() -> None:
    module: Any = prepared(Deep())
    module.inner.__class__ = type("Named", (Heads,), {"h": property(lambda self: self.q_heads)})
    del module.inner.__dict__["h"], module.inner.__dict__["g"]
    module.inner.q_heads = module.inner.all_heads = 4
    type(module.inner).g = property(lambda self: self.all_heads)
    groups = secateur.groups(module, X)
    assert difference(module, X, groups, 0) < 1e-12
