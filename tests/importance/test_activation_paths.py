"""Activation-aware importance in plans, among many tensors, in pieces, and of wrong values."""

import itertools
from typing import Any

import pytest
import torch

from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut.plan import plan
from secateur_server.errors import InvalidScores, NanScores
from secateur_server.granularity.block import Block
from secateur_server.granularity.element import Element
from secateur_server.granularity.n_m import NM
from secateur_server.granularity.slice import Slice
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Fraction, Threshold
from secateur_server.state_dict.parameter import Parameter
from tests.definition import applied, kept_of, rule
from tests.importance.test_activation import FORMULAS, activation, random_case
from tests.masks import packed


@pytest.mark.parametrize("count", [3, 60])
@pytest.mark.parametrize(
    "choices",
    [
        {"scope": "tensor"},
        {"scope": "row"},
        {"scope": "global"},
        *({"scope": "global", "allocation": kind} for kind in ("uniform", "erk", "lamp")),
        {"scope": "global", "normalization": "mean"},
        {"scope": "global", "amount": Threshold(0.3)},
    ],
    ids=str,
)
def test_many_and_few_tensors_are_scored_alike(count: int, choices: dict[str, Any]) -> None:
    """With factors of 1 a rule prunes what magnitude prunes, and with others it does not."""
    model = {f"{i}.w": Parameter(torch.randn(8, 11) + 0.01 * i) for i in range(count)}
    inputs = {name: f"in.{name}" for name in model}
    ones = {holder: torch.ones(11) for holder in inputs.values()}
    some = {holder: torch.rand(11) for holder in inputs.values()}
    names, amount = list(model), choices.get("amount", 0.5)
    given = {key: value for key, value in choices.items() if key != "amount"}
    plain, expected = applied(model, rule(names, amount, **given))
    own = rule(names, amount, importance=activation(inputs), **given)
    masks, found = applied(model, own, **ones)
    assert all(torch.equal(plain[name], mask) for name, mask in masks.items())
    assert list(found) == list(expected)
    other, _ = applied(model, own, **some)
    assert any(not torch.equal(plain[name], mask) for name, mask in other.items())


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
@pytest.mark.parametrize("granularity", [Element(), Slice(1), NM(2, 4, 1), Block((2, 2), True)])
def test_plans_are_what_a_prune_does(scope: str, granularity: Any) -> None:
    if scope == "row" and isinstance(granularity, Slice):
        return
    parameter, extras = random_case()
    for importance in (FORMULAS["Wanda"], FORMULAS["RIA"]):
        selection = rule(["w"], 0.5, scope=scope, granularity=granularity, importance=importance)
        amounts = [Fraction(0.25), Fraction(0.5), Fraction(1.0)]
        outcomes = plan(RequestContext(), selection, amounts, {"w": parameter}, extras)
        for amount, outcome in zip(amounts, outcomes, strict=True):
            masks, choices = applied(
                {"w": parameter},
                rule(["w"], amount, scope=scope, granularity=granularity, importance=importance),
                **extras,
            )
            assert list(outcome.choices) == list(choices)
            pruned = int(kept_of(parameter).sum()) - int(masks["w"].sum())
            assert outcome.removed["w"].elements == pruned


def test_infinite_weights_rank_last_and_unpruned_nan_is_refused() -> None:
    weight = torch.tensor([[1.0, torch.inf, 2.0, -torch.inf], [1.0, 2.0, 3.0, 4.0]])
    extras = {"in": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    for scope in ("row", "global"):
        for importance in (FORMULAS["Wanda"], FORMULAS["RIA"]):
            selection = rule(["w"], 0.5, scope=scope, importance=importance)
            masks, _ = applied({"w": Parameter(weight)}, selection, **extras)
            assert masks["w"][0].tolist() == [False, True, False, True]
        kept = torch.tensor([[True] * 4, [False, True, True, True]])
        bad = weight.clone()
        bad[1, 0] = torch.nan
        selection = rule(["w"], 0.5, scope=scope, importance=FORMULAS["RIA"])
        masks, _ = applied({"w": Parameter(bad, packed(kept))}, selection, **extras)
        assert not masks["w"][1, 0]
        with pytest.raises(NanScores, match=r"data\['w'\].*NaN at \[1, 0\] and in 1 of 8"):
            applied({"w": Parameter(bad)}, selection, **extras)


@pytest.mark.parametrize("wrong", [-1.0, torch.nan, torch.inf])
def test_a_wrong_factor_is_named(wrong: float) -> None:
    parameter, extras = random_case()
    extras["in"][5] = wrong
    with pytest.raises(InvalidScores, match=rf"activation.inputs\['w'\]: 'in' is {wrong} at \[5\]"):
        applied({"w": parameter}, rule(["w"], importance=activation()), **extras)


def test_scores_do_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, extras = random_case((40, 30))
    for formula, scope in itertools.product(FORMULAS.values(), ("row", "tensor", "global")):
        selection = rule(["w"], 0.4, scope=scope, importance=formula)
        whole_masks, whole_choices = applied({"w": parameter}, selection, **extras)
        with monkeypatch.context() as small:
            small.setattr(TorchBackend, "piece", 64)
            small.setattr(TorchBackend, "ranked", 64)
            masks, choices = applied({"w": parameter}, selection, **extras)
        assert torch.equal(masks["w"], whole_masks["w"])
        assert choices == whole_choices
