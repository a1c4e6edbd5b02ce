"""The same masks on a GPU as on the CPU."""

import pytest
import torch

from secateur_server.pruning.granularity import Element, Slice
from secateur_server.pruning.measure import fold, measure
from secateur_server.pruning.prune import prune
from secateur_server.pruning.spec import (
    CustomMasks,
    Magnitude,
    Parameter,
    Random,
    Rule,
    Selection,
)
from tests.pruning.bits import unpacked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

RULES: dict[str, Rule] = {
    "l1": Selection("r", ("a", "b"), Magnitude(), Element(), "tensor", 0.3, {}),
    "global": Selection("r", ("a", "b"), Magnitude(), Element(), "global", 0.5, {}),
    "scores": Selection("r", ("a",), Magnitude(), Element(), "global", 0.5, {"a": "s"}),
    "random": Selection("r", ("a", "b"), Random(7), Element(), "global", 0.5, {}),
    "l2": Selection("r", ("a", "b"), Magnitude(2.0), Slice(0), "tensor", 0.4, {}),
    "inf": Selection("r", ("b",), Magnitude(float("inf")), Slice(-1), "tensor", 5, {}),
    "random slices": Selection("r", ("a", "b"), Random(1), Slice(1), "tensor", 3, {}),
    "custom": CustomMasks("r", {"a": "m"}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", RULES)
def test_masks_and_measures_are_those_of_the_cpu(dtype: torch.dtype, first: str) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(64, 96, 3, 3).to(dtype), "b": torch.randn(33, 1000).to(dtype)}
    extras = {"s": torch.randn(64, 96, 3, 3), "m": torch.rand(64, 96, 3, 3) > 0.5}
    rules = [RULES[first], *RULES.values()]  # each among what the ones before left
    expected, choices = prune({n: Parameter(w) for n, w in weights.items()}, rules, extras)
    found, found_choices = prune(
        {name: Parameter(weight.cuda()) for name, weight in weights.items()},
        rules,
        {name: extra.cuda() for name, extra in extras.items()},
    )
    assert found_choices == choices
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(unpacked(parameter), unpacked(expected[name]))
        assert measure(parameter) == measure(expected[name])
        fold(parameter)
        fold(expected[name])
        assert torch.equal(parameter.weight.cpu(), expected[name].weight)
