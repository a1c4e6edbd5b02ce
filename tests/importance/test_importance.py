"""A new importance works with every granularity, scope and allocation."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.cut.plan import plan
from secateur_server.granularity import Granularity
from secateur_server.granularity.n_m import NM
from secateur_server.granularity.slice import Slice
from secateur_server.importance.protocol import Importance
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Fraction
from secateur_server.state_dict.parameter import Parameter
from tests.definition import applied, rule


@dataclass(frozen=True)
class Positive(Importance):
    """The sum of a unit's positive values, or their mean."""

    def elements(self, context: RequestContext, name: str, values: Tensor) -> Tensor:
        return values.clamp(min=0)

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        granularity: Granularity,
        is_mean: bool,
    ) -> Tensor:
        return granularity.scores(context, values.clamp(min=0), mask, 1.0, is_mean)


@pytest.mark.parametrize("count", [1, 3, 60])
@pytest.mark.parametrize(
    ("scope", "allocation"),
    [("row", "rank"), ("tensor", "rank"), ("global", "rank"), ("global", "lamp")],
)
def test_elements_are_compared_by_the_scores_of_an_importance(
    count: int, scope: str, allocation: str
) -> None:
    """Half of the elements are negative and score 0, so exactly those are pruned."""
    numbers = torch.Generator().manual_seed(3)
    signs = torch.tensor([[1.0, -1.0] * 4] * 4)
    model = {
        f"{i}.weight": Parameter(signs * (torch.rand(4, 8, generator=numbers) + 0.1))
        for i in range(count)
    }
    choices: dict[str, Any] = {"importance": Positive(), "scope": scope, "allocation": allocation}
    masks, _ = applied(model, rule(list(model), 0.5, **choices))
    for name, mask in masks.items():
        assert torch.equal(mask, model[name].weight > 0), name
    (outcome,) = plan(RequestContext(), rule(list(model), **choices), [Fraction(0.5)], model, {})
    expected = sum(float(p.weight.double().clamp(max=0).square().sum()) for p in model.values())
    found = sum(outcome.removed[name].energy for name in model)
    assert found == pytest.approx(expected, rel=1e-9)


def test_slices_and_n_m_groups_are_compared_by_the_scores_of_an_importance() -> None:
    weight = torch.tensor([[3.0, -4.0, 1.0, -9.0], [1.0, 1.0, -7.0, 2.0]])
    model = {"w": Parameter(weight)}
    masks, _ = applied(model, rule(["w"], 1, importance=Positive(), granularity=Slice(1)))
    assert masks["w"].tolist() == [[True, False, True, True]] * 2  # sums of 4, 1, 1 and 2
    masks, _ = applied(model, rule(["w"], 1.0, importance=Positive(), granularity=NM(2, 4, 1)))
    assert masks["w"].tolist() == [[True, False, True, False], [False, True, False, True]]
