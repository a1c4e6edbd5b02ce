"""Scope `row`: units compared within each row, against plain sorting of each row."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur_server.cut.plan import plan
from secateur_server.errors import AmountOutOfRange
from secateur_server.granularity.block import Block
from secateur_server.granularity.n_m import NM
from secateur_server.importance.random import Random
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.definition import DTYPES, amount_of, applied, rule
from tests.masks import packed

some = examples(40)


def lowest_of_rows(scores: Tensor, candidates: Tensor, amount: float | int, of_all: bool) -> Tensor:
    """Returns the candidates that are kept. Ties in a row are pruned from the lowest index."""
    kept = candidates.clone()
    for row, (values, unpruned) in enumerate(zip(scores, candidates, strict=True)):
        base = len(values) if of_all else int(unpruned.sum())
        count = round(amount * base) if isinstance(amount, float) else amount
        count -= len(values) - int(unpruned.sum()) if of_all else 0
        order = sorted(unpruned.nonzero().flatten().tolist(), key=lambda i: (float(values[i]), i))
        kept[row, order[: max(0, count)]] = False
    return kept


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draws a weight with many ties, and which of its elements are unpruned."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 3)))
    bits = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    values = torch.tensor(bits.integers(-4, 5, shape)).to(draw(st.sampled_from(DTYPES))) / 4
    return values, torch.tensor(bits.random(shape) < draw(st.sampled_from([0.3, 0.8, 1.0])))


@some
@given(drawn=weights(), fraction=st.sampled_from([0.0, 0.1, 0.5, 1.0]), of_all=st.booleans())
def test_each_row_loses_its_fraction(
    drawn: tuple[Tensor, Tensor], fraction: float, of_all: bool
) -> None:
    weight, unpruned = drawn
    rows = len(weight)
    model = {"w": Parameter(weight, None if unpruned.all() else packed(unpruned))}
    masks, (choice,) = applied(model, rule(["w"], fraction, scope="row", of_all=of_all))
    expected = lowest_of_rows(
        weight.abs().view(rows, -1), unpruned.view(rows, -1), fraction, of_all
    )
    assert torch.equal(masks["w"], expected.view(weight.shape))
    pruned = int(unpruned.sum()) - int(expected.sum())
    assert (choice.candidates, choice.requested) == (int(unpruned.sum()), pruned)
    assert (choice.pruned, choice.threshold) == (pruned, None)


@some
@given(drawn=weights(), count=st.integers(0, 3))
def test_each_row_loses_the_count_or_the_rule_is_refused(
    drawn: tuple[Tensor, Tensor], count: int
) -> None:
    weight, unpruned = drawn
    rows = unpruned.view(len(weight), -1)
    model = {"w": Parameter(weight, packed(unpruned))}
    selection = rule(["w"], count, scope="row")
    if (short := (rows.sum(1) < count).nonzero()).numel():
        row = int(short[0])
        message = (
            f"{count} is more than the {int(rows[row].sum())} unpruned units of row {row} of 'w'"
        )
        with pytest.raises(AmountOutOfRange, match=message):
            applied(model, selection)
        return
    masks, _ = applied(model, selection)
    expected = lowest_of_rows(weight.abs().view(len(weight), -1), rows, count, False)
    assert torch.equal(masks["w"], expected.view(weight.shape))


@pytest.mark.parametrize("width", [1, 100, 5000])
def test_many_rows_of_any_width_lose_their_lowest_units(width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(600, width)
    masks, _ = applied({"w": Parameter(weight)}, rule(["w"], 0.3, scope="row"))
    count = round(0.3 * width)
    order = weight.abs().sort(dim=1, stable=True).indices  # as Wanda's own code has it
    expected = torch.ones_like(weight, dtype=torch.bool)
    expected.scatter_(1, order[:, :count], False)
    assert torch.equal(masks["w"], expected)


def test_rows_of_blocks_and_of_n_m_groups() -> None:
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    model = {"w": Parameter(weight)}
    masks, _ = applied(model, rule(["w"], 2, scope="row", granularity=Block((2, 4), True)))
    scores = weight.double().abs().unfold(0, 2, 2).unfold(1, 4, 4).sum((2, 3))
    units = lowest_of_rows(scores, torch.ones_like(scores, dtype=torch.bool), 2, False)
    assert torch.equal(masks["w"], units.repeat_interleave(2, 0).repeat_interleave(4, 1))
    masks, _ = applied(model, rule(["w"], 3, scope="row", granularity=NM(1, 4, 1)))
    groups = masks["w"].view(8, 6, 4).sum(2)
    assert (groups == 1).sum(1).tolist() == [3] * 8
    assert (groups == 4).sum(1).tolist() == [3] * 8


def test_random_rows_differ_and_have_the_same_count() -> None:
    model = {"w": Parameter(torch.ones(50, 40))}
    masks, _ = applied(model, rule(["w"], 0.5, scope="row", importance=Random(3)))
    assert masks["w"].sum(1).tolist() == [20] * 50
    assert len({tuple(row.tolist()) for row in masks["w"]}) == 50


def test_a_plan_of_rows_equals_the_prunes() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    model, amounts = {"w": Parameter(weight)}, [0.1, 0.5, 1.0]
    outcomes = plan(
        RequestContext(),
        rule(["w"], scope="row"),
        [amount_of(amount) for amount in amounts],
        model,
        {},
    )
    for amount, outcome in zip(amounts, outcomes, strict=True):
        masks, choices = applied(model, rule(["w"], amount, scope="row"))
        assert list(outcome.choices) == list(choices)
        assert outcome.removed["w"].elements == int((~masks["w"]).sum())


def test_each_row_of_a_layer_loses_its_fraction_over_the_wire(client: secateur.Client) -> None:
    layer = torch.nn.Linear(12, 8)
    spec = secateur.select("weight", 0.25, scope="row")
    result = client.prune(layer, spec)
    assert (~result.masks["weight"]).sum(1).tolist() == [3] * 8
    assert client.plan(layer, spec, [0.25]).amounts[0].choices[0].pruned == 24


@pytest.mark.parametrize(
    ("tensors", "choices", "field"),
    [
        ("bias", {}, "scope"),
        ("weight", {"granularity": secateur.slices(0)}, "scope"),
        ("weight", {"amount": secateur.threshold(0.1)}, "scope"),
        ("weight", {"amount": secateur.target_bytes(10)}, "scope"),
        ("weight", {"allocation": "erk"}, "allocation"),
        ("weight", {"guard_rails": secateur.guard_rails(max_sparsity=0.5)}, "rails"),
    ],
    ids=str,
)
def test_rules_that_rows_do_not_support_are_refused(
    client: secateur.Client, tensors: str, choices: dict[str, Any], field: str
) -> None:
    given = {"amount": 0.5, "scope": "row", **choices}
    with pytest.raises(secateur.InvalidSpec, match=field):
        client.prune(torch.nn.Linear(12, 8), secateur.select(tensors, **given))
