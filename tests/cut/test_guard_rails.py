"""Guard rails: totals are exact within the bounds, at the least loss of importance."""

import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from secateur_server.cut.choice import Choice
from secateur_server.errors import AmountOutOfRange, InvalidSpec, UnknownTensor
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Bytes, Threshold
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import GuardRails, Rail, Selection
from secateur_server.state_dict.catalog import Stored, read_catalog
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.definition import (
    NAMES,
    Chosen,
    Ranked,
    applied,
    assert_pruned,
    at_cut,
    at_least,
    choose,
    elements,
    models,
    rule,
)
from tests.masks import packed

many = examples(40)
MODELS = models()
HUNDREDTHS = st.integers(0, 100).map(lambda percent: percent / 100)


@st.composite
def rails(draw: st.DrawFn) -> tuple[Rail, ...]:
    """Draws at most one rail for each tensor, whose floor and cap do not contradict each other."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    found = []
    for name in names:
        low, high = sorted((draw(HUNDREDTHS), draw(HUNDREDTHS)))
        # A floor and `keep_at_least` might contradict each other.
        count = draw(st.integers(0, 5)) if low == 0 else 0
        found.append(Rail(f"rails[{name}]", (name,), low, high, count))
    return tuple(found)


def limits(given_rails: Sequence[Rail], name: str, ranked: Ranked) -> tuple[int, int]:
    """Returns the least and the largest number of units that a tensor may lose."""
    units, candidates = len(ranked.candidates), len(ranked.order)
    for bounds in given_rails:
        if name in bounds.tensors:
            low = math.ceil(Fraction(str(bounds.min_sparsity)) * units)
            high = math.floor(Fraction(str(bounds.max_sparsity)) * units)
            high = min(high, units - min(bounds.keep_at_least, units))
            assume(low <= high)
            return max(0, low - (units - candidates)), max(0, high - (units - candidates))
    return 0, candidates


def bounded(
    model: dict[str, Parameter], given_rails: Sequence[Rail]
) -> tuple[list[Ranked], list[int], list[int]]:
    """Returns the elements of each tensor, and the least and largest numbers that it may lose."""
    ranked = [elements(parameter) for parameter in model.values()]
    found = [limits(given_rails, name, r) for name, r in zip(model, ranked, strict=True)]
    return ranked, [low for low, _ in found], [high for _, high in found]


def guarded(
    model: dict[str, Parameter], amount: Any, given_rails: Sequence[Rail], **choices: Any
) -> tuple[dict[str, Tensor], Choice]:
    """Applies a rule with the rails of the model's tensors. Returns the masks and the choice."""
    fitting = tuple(r for r in given_rails if set(r.tensors) <= set(model))
    selection = rule(list(model), amount, guard_rails=GuardRails(fitting), **choices)
    masks, (choice,) = applied(model, selection)
    return masks, choice


@many
@given(model=MODELS, bounds=rails(), data=st.data())
def test_the_lowest_units_within_the_bounds_are_pruned(
    model: dict[str, Parameter], bounds: tuple[Rail, ...], data: st.DataObject
) -> None:
    ranked, lows, highs = bounded(model, bounds)
    count = data.draw(st.integers(sum(lows), sum(highs)))
    masks, choice = guarded(model, count, bounds)
    chosen = choose(ranked, at_least(count), lows, highs)
    assert_pruned(model, masks, list(model), chosen)
    assert choice.requested == choice.pruned == count
    assert (choice.threshold, choice.ties, choice.ties_pruned) == at_cut(ranked, chosen)


@many
@given(model=models(most=3), bounds=rails(), data=st.data())
def test_no_other_counts_within_the_bounds_lose_less_importance(
    model: dict[str, Parameter], bounds: tuple[Rail, ...], data: st.DataObject
) -> None:
    ranked, lows, highs = bounded(model, bounds)
    count = data.draw(st.integers(sum(lows), sum(highs)))
    masks, _ = guarded(model, count, bounds)
    sums = [[Fraction(0)] for _ in ranked]  # of the lowest 0, 1, 2... units
    for sums_of_one, r in zip(sums, ranked, strict=True):
        sums_of_one.extend(itertools.accumulate(r.scores[i] for i in r.order))
    possible = itertools.product(*map(range, lows, [high + 1 for high in highs]))
    least = min(
        sum(sums_of_one[c] for sums_of_one, c in zip(sums, counts, strict=True))
        for counts in possible
        if sum(counts) == count
    )
    kept = [masks[name].flatten().tolist() for name in model]
    lost = sum(
        r.scores[i] for r, flags in zip(ranked, kept, strict=True) for i in r.order if not flags[i]
    )
    assert lost == least


@many
@given(model=MODELS, bounds=rails(), data=st.data())
def test_a_rail_is_reported_if_it_changes_the_choice(
    model: dict[str, Parameter], bounds: tuple[Rail, ...], data: st.DataObject
) -> None:
    ranked, lows, highs = bounded(model, bounds)
    count = data.draw(st.integers(sum(lows), sum(highs)))
    _, choice = guarded(model, count, bounds)
    chosen = choose(ranked, at_least(count), lows, highs)
    by_name = {bound.tensor: bound for bound in choice.bounds}
    assert len(by_name) == len(choice.bounds)
    for i, name in enumerate(model):
        free_lows, free_highs = [*lows], [*highs]
        free_lows[i], free_highs[i] = 0, len(ranked[i].order)
        above = choose(ranked, at_least(count), lows, free_highs)
        below = choose(ranked, at_least(count), free_lows, highs)
        rails_bound = set()
        if above.counts[i] > chosen.counts[i]:
            rails_bound.add("max")
        if below.counts[i] < chosen.counts[i]:
            rails_bound.add("min")
        found = by_name.get(name)
        if found is None:
            assert not rails_bound, name
        elif found.rail == "min_sparsity":
            assert "min" in rails_bound, name
        else:
            assert "max" in rails_bound, name
        if found is not None:
            assert found.pruned == chosen.counts[i]
            assert found.rail == binding_rail(bounds, name, ranked[i], found.rail)


def binding_rail(bounds: Sequence[Rail], name: str, ranked: Ranked, found: str) -> str:
    """Returns the name of the stricter upper bound."""
    of_tensor = next(bound for bound in bounds if name in bound.tensors)
    if found == "min_sparsity":
        return found
    units = len(ranked.candidates)
    by_share = math.floor(Fraction(str(of_tensor.max_sparsity)) * units)
    by_count = units - min(of_tensor.keep_at_least, units)
    return "keep_at_least" if by_count < by_share else "max_sparsity"


@many
@given(model=MODELS, bounds=rails(), threshold=st.integers(0, 7).map(lambda x: x / 4))
def test_units_below_a_threshold_are_pruned_within_the_bounds(
    model: dict[str, Parameter], bounds: tuple[Rail, ...], threshold: float
) -> None:
    ranked, lows, highs = bounded(model, bounds)
    below = [sum(r.scores[i] < threshold for i in r.order) for r in ranked]
    counts = [min(max(b, low), high) for b, low, high in zip(below, lows, highs, strict=True)]
    masks, choice = guarded(model, Threshold(threshold), bounds)
    pruned = [sorted(r.order[:c]) for r, c in zip(ranked, counts, strict=True)]
    assert_pruned(model, masks, list(model), Chosen(counts, pruned, None))
    assert (choice.requested, choice.pruned) == (sum(below), sum(counts))
    changed = {n: c for n, b, c in zip(model, below, counts, strict=True) if b != c}
    assert {bound.tensor: bound.pruned for bound in choice.bounds} == changed
    lost = [r.scores[i] for r, units in zip(ranked, pruned, strict=True) for i in units]
    highest = max(lost, default=None)
    assert choice.threshold == (None if highest is None else float(highest))
    ties = sum(r.scores[i] == highest for r in ranked for i in r.order)
    assert (choice.ties, choice.ties_pruned) == (ties, sum(score == highest for score in lost))


@many
@given(model=MODELS, bounds=rails(), share=st.floats(0, 1), data=st.data())
def test_the_fewest_elements_within_the_bounds_are_pruned_to_reach_a_number_of_bytes(
    model: dict[str, Parameter], bounds: tuple[Rail, ...], share: float, data: st.DataObject
) -> None:
    ranked, lows, highs = bounded(model, bounds)
    costs = [parameter.weight.element_size() for parameter in model.values()]

    def kept(counts: Sequence[int]) -> int:
        candidates = [len(r.order) for r in ranked]
        return sum(c * (a - n) for c, a, n in zip(costs, candidates, counts, strict=True))

    target = data.draw(st.integers(kept(highs), kept(lows)))
    masks, choice = guarded(model, Bytes(target), bounds)
    chosen = choose(ranked, lambda counts: kept(counts) <= target, lows, highs)
    assert_pruned(model, masks, list(model), chosen)
    assert choice.requested == choice.pruned == sum(chosen.counts)


@many
@given(model=MODELS, bounds=rails(), allocation=st.sampled_from(["uniform", "erk"]), data=st.data())
def test_allocated_counts_are_within_the_bounds(
    model: dict[str, Parameter], bounds: tuple[Rail, ...], allocation: str, data: st.DataObject
) -> None:
    ranked, lows, highs = bounded(model, bounds)
    count = data.draw(st.integers(sum(lows), sum(highs)))
    masks, choice = guarded(model, count, bounds, allocation=allocation)
    candidates = [len(r.order) for r in ranked]
    counts = [a - int(masks[name].sum()) for a, name in zip(candidates, model, strict=True)]
    assert choice.requested == choice.pruned == sum(counts) == count
    assert all(a <= c <= b for a, c, b in zip(lows, counts, highs, strict=True))
    pruned = [sorted(r.order[:c]) for r, c in zip(ranked, counts, strict=True)]
    assert_pruned(model, masks, list(model), Chosen(counts, pruned, None))
    # A tensor that is not at a bound keeps its share: one factor fits all of them, up to rounding.
    shares = [float(a) for a in candidates]
    if allocation == "erk":
        shares = [float(sum(parameter.weight.shape)) for parameter in model.values()]
    floor, ceiling = 0.0, math.inf
    for share, a, c, low, high in zip(shares, candidates, counts, lows, highs, strict=True):
        if share and c > low:  # it could keep more units
            ceiling = min(ceiling, (a - c + 1) / share)
        if share and c < high:
            floor = max(floor, (a - c - 1) / share)
    assert floor <= ceiling * (1 + 1e-9)


def of_shape(*shapes: Sequence[int]) -> dict[str, Parameter]:
    """Makes tensors of the numbers 1, 2, 3 and so on, across all of them."""
    model, first = {}, 1
    for name, shape in zip(NAMES, shapes, strict=False):
        count = math.prod(shape)
        weight = torch.arange(first, first + count, dtype=torch.float32).view(tuple(shape))
        model[name], first = Parameter(weight), first + count
    return model


def test_a_total_above_the_rails_is_an_error_that_names_them() -> None:
    model = of_shape((10,), (10,))
    bounds = (Rail("a", (NAMES[0],), max_sparsity=0.45), Rail("b", (NAMES[1],), keep_at_least=7))
    masks, _ = guarded(model, 7, bounds)
    assert [int((~mask).sum()) for mask in masks.values()] == [4, 3]
    with pytest.raises(AmountOutOfRange) as caught:
        guarded(model, 9, bounds)
    message = str(caught.value)
    assert caught.value.field == "rule.count"
    assert all(part in message for part in (NAMES[0], NAMES[1], "max_sparsity", "keep_at_least"))
    assert re.search(r"\b9 units: .*\b7 at most, 2 too few", message)


def test_a_total_below_the_rails_is_an_error_that_names_them() -> None:
    model = of_shape((10,), (10,))
    bounds = (Rail("a", (NAMES[1],), min_sparsity=0.41),)  # 5, rounded up
    with pytest.raises(AmountOutOfRange) as caught:
        guarded(model, 0.1, bounds)
    message = str(caught.value)
    assert caught.value.field == "rule.fraction"
    assert NAMES[1] in message
    assert NAMES[0] not in message
    assert re.search(r"\b2 units: .*\b5 at least, 3 too many.*min_sparsity", message)


def test_bytes_below_the_rails_are_an_error() -> None:
    with pytest.raises(AmountOutOfRange, match=r"40 bytes: .*\b20 at most, 20 too few") as caught:
        guarded(of_shape((10,)), Bytes(0), (Rail("a", (NAMES[0],), max_sparsity=0.5),))
    assert caught.value.field == "rule.bytes"


@pytest.mark.parametrize(
    ("bounds", "field"),
    [
        ({"min_sparsity": 0.5, "keep_at_least": 6}, "a.keep_at_least"),
        ({"min_sparsity": 0.51, "max_sparsity": 0.59}, "a.min_sparsity"),
    ],
)
def test_contradicting_rails_of_one_tensor_are_an_error(bounds: dict[str, Any], field: str) -> None:
    with pytest.raises(AmountOutOfRange) as caught:
        guarded(of_shape((10,)), 5, (Rail("a", (NAMES[0],), **bounds),))
    assert caught.value.field == field
    assert NAMES[0] in str(caught.value)


def test_hundredths_are_decimal_numbers() -> None:
    """0.29 of 100 is 29, although the double is slightly less; and 0.07 is 7, not 8."""
    model = of_shape((100,), (100,))
    bounds = (
        Rail("a", (NAMES[0],), max_sparsity=0.29),
        Rail("b", (NAMES[1],), min_sparsity=0.07),
    )
    masks, _ = guarded(model, 36, bounds)
    assert [int((~mask).sum()) for mask in masks.values()] == [29, 7]


def test_rails_count_prior_pruning() -> None:
    weight = torch.arange(1.0, 11)
    model = {NAMES[0]: Parameter(weight, packed(weight > 4)), NAMES[1]: Parameter(weight + 10)}
    masks, choice = guarded(model, 3, (Rail("a", (NAMES[0],), max_sparsity=0.5),))
    assert [int((~mask).sum()) for mask in masks.values()] == [5, 2]
    assert [(b.tensor, b.rail, b.pruned) for b in choice.bounds] == [(NAMES[0], "max_sparsity", 1)]
    # A tensor that is already above its cap loses nothing more.
    masks, _ = guarded(model, 3, (Rail("a", (NAMES[0],), max_sparsity=0.2),))
    assert [int((~mask).sum()) for mask in masks.values()] == [4, 3]


def test_a_tensor_with_fewer_units_than_keep_at_least_is_not_pruned() -> None:
    masks, _ = guarded(of_shape((3,), (9,)), 5, (Rail("a", NAMES[:2], keep_at_least=4),))
    assert [int((~mask).sum()) for mask in masks.values()] == [0, 5]


STORED = {
    name: Stored("F32", torch.float32, (4, 4))
    for name in ("conv1.weight", "conv2.weight", "fc.weight", "fc.bias")
}


def resolved(guard_rails: GuardRails, *tensors: str) -> Selection:
    unresolved = rule(tensors or ("*",), 0.5, guard_rails=guard_rails)
    (found,) = resolve(RequestContext(), [unresolved], read_catalog(STORED, {}))
    assert isinstance(found, Selection)
    return found


def test_excluded_tensors_are_not_part_of_the_rule() -> None:
    """The first and the last tensor are those of the rule, before `exclude` applies."""
    guard_rails = GuardRails(keep_first=True, keep_last=True, exclude=("fc.w*",))
    assert resolved(guard_rails).tensors == ("conv2.weight",)
    assert resolved(GuardRails(keep_first=True), "fc*").tensors == ("fc.bias",)
    assert resolved(GuardRails(keep_last=True), "fc*").tensors == ("fc.weight",)
    assert resolved(GuardRails(exclude=("conv*", "fc.bias"))).tensors == ("fc.weight",)
    model = {name: Parameter(torch.ones(4, 4)) for name in STORED}
    masks, (choice,) = applied(model, resolved(guard_rails))
    assert list(masks) == ["conv2.weight"]
    assert (choice.candidates, choice.pruned) == (16, 8)


def test_the_first_matching_rail_of_a_tensor_applies() -> None:
    bounds = (
        Rail("a", ("conv1.*",), keep_at_least=3),
        Rail("b", ("conv*", "fc.bias"), max_sparsity=0.25),
        Rail("c", (), max_sparsity=0.5),
    )
    found = resolved(GuardRails(bounds)).guard_rails
    model = {name: Parameter(torch.ones(4, 4)) for name in STORED}
    masks, _ = applied(model, rule(list(STORED), 29, guard_rails=found))
    assert [int((~mask).sum()) for mask in masks.values()] == [13, 4, 8, 4]
    with pytest.raises(AmountOutOfRange, match="29 at most"):
        applied(model, rule(list(STORED), 30, guard_rails=found))


@pytest.mark.parametrize(
    ("guard_rails", "field", "error"),
    [
        (GuardRails(exclude=("conv*", "x*")), "rule.guard_rails.exclude[1]", UnknownTensor),
        (GuardRails((Rail("r", ("fc*", "nothing")),)), "r.tensors[1]", UnknownTensor),
        (
            # The only tensor of the rail is excluded.
            GuardRails((Rail("r", ("conv1.weight",)),), keep_first=True),
            "r.tensors[0]",
            UnknownTensor,
        ),
        (GuardRails(exclude=("*",)), "rule.guard_rails", InvalidSpec),
    ],
)
def test_rails_that_match_no_tensor_are_an_error(
    guard_rails: GuardRails, field: str, error: type[InvalidSpec]
) -> None:
    with pytest.raises(error) as caught:
        resolved(guard_rails)
    assert caught.value.field == field
