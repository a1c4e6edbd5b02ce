"""How many units each kind of amount prunes, and which ones, compared with plain sorting."""

import math
from fractions import Fraction
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur_proto import spec_pb2
from secateur_server.errors import AmountOutOfRange, InvalidSpec, UnknownTensor
from secateur_server.granularity.block import Block
from secateur_server.granularity.n_m import NM
from secateur_server.granularity.slice import Slice
from secateur_server.importance.magnitude import Magnitude
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Bytes, Macs, Table, Threshold
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.contract import raw
from tests.definition import (
    NAMES,
    SCOPES,
    Ranked,
    applied,
    assert_pruned,
    at_cut,
    at_least,
    catalog_of,
    choose,
    elements,
    kept_of,
    models,
    rule,
    sizes,
    without,
)
from tests.masks import packed

many = examples(50)
MODELS = models()
Flat = np.ndarray[Any, np.dtype[Any]]


@many
@given(model=MODELS, scope=st.sampled_from(list(SCOPES)), amount=st.floats(0, 1), data=st.data())
def test_the_lowest_units_of_a_scope_are_pruned(
    model: dict[str, Parameter], scope: str, amount: float, data: st.DataObject
) -> None:
    of_all = data.draw(st.booleans())
    masks, choices = applied(model, rule(list(model), amount, scope=scope, of_all=of_all))
    sets = SCOPES[scope](list(model))
    assert [choice.tensors for choice in choices] == [tuple(names) for names in sets]
    for names, choice in zip(sets, choices, strict=True):
        ranked = [elements(model[name]) for name in names]
        units, candidates = sizes(ranked)
        count = (
            round(amount * units) - (units - candidates) if of_all else round(amount * candidates)
        )
        chosen = choose(ranked, at_least(count))
        assert_pruned(model, masks, names, chosen)
        assert (choice.candidates, choice.requested) == (candidates, max(0, count))
        assert choice.pruned == sum(chosen.counts)
        assert (choice.threshold, choice.ties, choice.ties_pruned) == at_cut(ranked, chosen)


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("scope", list(SCOPES))
def test_an_amount_above_the_number_of_units_is_an_error(scope: str, of_all: bool) -> None:
    half = packed(torch.tensor([True, False, True, False]))
    model = {name: Parameter(torch.ones(4), half) for name in NAMES[:2]}
    units = (1 if scope == "tensor" else 2) * (4 if of_all else 2)
    masks, _ = applied(model, rule(list(model), units, scope=scope, of_all=of_all))
    assert not any(mask.any() for mask in masks.values())
    message = rf"{units + 1} is more than the {units} {'' if of_all else 'unpruned '}units"
    with pytest.raises(AmountOutOfRange, match=message):
        applied(model, rule(list(model), units + 1, scope=scope, of_all=of_all))


@many
@given(model=MODELS, fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4), data=st.data())
def test_steps_of_a_schedule_reach_their_totals(
    model: dict[str, Parameter], fractions: list[float], data: st.DataObject
) -> None:
    """Pruned elements stay pruned, also if a later step has a lower total."""
    allocation = data.draw(st.sampled_from(["rank", "uniform", "erk", "lamp"]))
    units, state = sum(p.weight.numel() for p in model.values()), dict(model)
    for fraction in fractions:
        selection = rule(list(model), fraction, of_all=True, allocation=allocation)
        before = {name: kept_of(parameter) for name, parameter in state.items()}
        masks, (choice,) = applied(state, selection)
        pruned = units - sum(int(kept.sum()) for kept in before.values())
        assert choice.requested == choice.pruned == max(0, round(fraction * units) - pruned)
        assert sum(int((~m).sum()) for m in masks.values()) == max(pruned, round(fraction * units))
        assert all(not (mask & ~before[name]).any() for name, mask in masks.items())
        state = {name: Parameter(p.weight, packed(masks[name])) for name, p in state.items()}


@many
@given(model=MODELS, fractions=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_each_tensor_of_a_table_has_its_own_fraction(
    model: dict[str, Parameter], fractions: list[float]
) -> None:
    table = dict(zip(list(model)[:3], fractions, strict=False))
    masks, choices = applied(model, rule(list(model), Table(table), scope="tensor"))
    for (name, parameter), choice in zip(model.items(), choices, strict=True):
        ranked = elements(parameter)
        count = round(table.get(name, 0.0) * len(ranked.order))
        assert (choice.requested, choice.pruned) == (count, count)
        assert_pruned(model, masks, [name], choose([ranked], at_least(count)))


THRESHOLDS = st.integers(-1, 7).map(lambda quarters: quarters / 4) | st.sampled_from(
    [0.3, 1.49999, 1e-40, math.inf, -math.inf]
)


@many
@given(model=MODELS, scope=st.sampled_from(list(SCOPES)), threshold=THRESHOLDS)
def test_units_strictly_below_a_threshold_are_pruned(
    model: dict[str, Parameter], scope: str, threshold: float
) -> None:
    masks, choices = applied(model, rule(list(model), Threshold(threshold), scope=scope))
    for names, choice in zip(SCOPES[scope](list(model)), choices, strict=True):
        lost = []
        for name in names:
            kept, magnitude = kept_of(model[name]), model[name].weight.double().abs()
            assert torch.equal(masks[name], kept & (magnitude >= threshold)), name
            lost += magnitude[kept & (magnitude < threshold)].tolist()
        assert choice.requested == choice.pruned == len(lost)
        assert choice.threshold == max(lost, default=None)
        ties = lost.count(max(lost)) if lost else 0
        assert (choice.ties, choice.ties_pruned) == (ties, ties)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_threshold_is_not_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    """None of these dtypes has 0.1: it is below or above the nearest number."""
    nearest = torch.tensor(0.1, dtype=dtype)
    for threshold in (0.1, math.nextafter(float(nearest), 0), math.nextafter(float(nearest), 1)):
        model = {"w": Parameter(nearest.reshape(1))}
        masks, _ = applied(model, rule(["w"], Threshold(threshold)))
        assert masks["w"].tolist() == [float(nearest) >= threshold]


@many
@given(model=MODELS, share=st.floats(0, 1.1))
def test_the_fewest_elements_are_pruned_to_reach_a_number_of_bytes(
    model: dict[str, Parameter], share: float
) -> None:
    ranked = [elements(parameter) for parameter in model.values()]
    costs = [parameter.weight.element_size() for parameter in model.values()]
    size = sum(cost * len(r.order) for cost, r in zip(costs, ranked, strict=True))
    target = int(share * size)

    def fits(counts: list[int]) -> bool:
        return size - sum(c * n for c, n in zip(costs, counts, strict=True)) <= target

    masks, (choice,) = applied(model, rule(list(model), Bytes(target)))
    chosen = choose(ranked, fits)
    assert_pruned(model, masks, list(model), chosen)
    assert choice.requested == choice.pruned == sum(chosen.counts)
    assert (choice.threshold, choice.ties, choice.ties_pruned) == at_cut(ranked, chosen)


@many
@given(
    model=models(st.lists(st.integers(1, 4), min_size=2, max_size=3), [torch.float64]),
    costs=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    share=st.floats(0, 1.1),
)
def test_the_fewest_slices_are_pruned_to_reach_a_number_of_macs(
    model: dict[str, Parameter], costs: list[int], share: float
) -> None:
    ranked = [slices(parameter, 0, 1) for parameter in model.values()]
    operations = sum(cost * len(r.order) for cost, r in zip(costs, ranked, strict=False))
    target = share * operations

    def fits(counts: list[int]) -> bool:
        return operations - sum(c * n for c, n in zip(costs, counts, strict=False)) <= target

    per_unit = {name: float(cost) for name, cost in zip(model, costs, strict=False)}
    masks, (choice,) = applied(
        model, rule(list(model), Macs(target, per_unit), granularity=Slice(0), importance=L1)
    )
    chosen = choose(ranked, fits)
    assert choice.requested == choice.pruned == sum(chosen.counts)
    for (name, parameter), pruned in zip(model.items(), chosen.pruned, strict=True):
        expected = kept_of(parameter)
        expected[pruned] = False
        assert torch.equal(masks[name], expected), name


L1 = Magnitude(1.0)


def slices(parameter: Parameter, dim: int, p: int) -> Ranked:
    """Returns the slices of a tensor, scored by the mean of |w|^p: its root has the same order."""
    return units_of(parameter, np.indices(parameter.weight.shape)[dim], p)


def units_of(parameter: Parameter, unit: Flat, p: int) -> Ranked:
    """Returns units, scored by the mean of |w|^p, where pruned elements count as 0.

    Args:
        parameter: The tensor.
        unit: The unit of each element, in the shape of the tensor.
        p: The order.
    """
    flat, kept = unit.reshape(-1).tolist(), kept_of(parameter).flatten().tolist()
    sums, sizes, candidates = ([0] * (max(flat) + 1) for _ in range(3))
    for at, magnitude, is_kept in zip(flat, elements(parameter).scores, kept, strict=True):
        sums[at] += magnitude**p if is_kept else Fraction(0)
        sizes[at] += 1
        candidates[at] |= is_kept
    means = [Fraction(total) / size for total, size in zip(sums, sizes, strict=True)]
    return Ranked(means, [bool(is_candidate) for is_candidate in candidates])


# Their means are float32. Means of float64 would break ties, because a third is rounded otherwise.
NARROW = (torch.float32, torch.float16, torch.bfloat16)
MATRICES = models(st.lists(st.integers(1, 6), min_size=2, max_size=3), NARROW)


@many
@given(model=MATRICES, dim=st.sampled_from([0, 1, -1]), amount=st.floats(0, 1))
def test_slices_of_several_tensors_are_compared_by_their_mean(
    model: dict[str, Parameter], dim: int, amount: float
) -> None:
    choices = {"importance": L1, "granularity": Slice(dim)}
    masks, (choice,) = applied(model, rule(list(model), amount, **choices))
    ranked = [slices(parameter, dim, 1) for parameter in model.values()]
    count = round(amount * sizes(ranked)[1])
    chosen = choose(ranked, at_least(count))
    assert choice.candidates == sizes(ranked)[1]
    assert choice.requested == choice.pruned == count
    for (name, parameter), pruned in zip(model.items(), chosen.pruned, strict=True):
        expected = kept_of(parameter).movedim(dim, 0)
        expected[pruned] = False
        assert torch.equal(masks[name].movedim(dim, 0), expected), name


@many
@given(
    model=MATRICES,
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4)),
    p=st.sampled_from([1, 2]),
    amount=st.floats(0, 1),
)
def test_blocks_of_several_tensors_are_compared_by_their_power_mean(
    model: dict[str, Parameter], shape: tuple[int, int], p: int, amount: float
) -> None:
    granularity = Block(shape, as_matrix=True)
    choices = {"importance": Magnitude(float(p)), "granularity": granularity}
    masks, (choice,) = applied(model, rule(list(model), amount, **choices))
    units = {name: block_of(parameter.weight, shape) for name, parameter in model.items()}
    ranked = [units_of(model[name], units[name], p) for name in model]
    count = round(amount * sizes(ranked)[1])
    chosen = choose(ranked, at_least(count))
    assert choice.requested == choice.pruned == count
    for (name, parameter), pruned in zip(model.items(), chosen.pruned, strict=True):
        is_kept = torch.from_numpy(~np.isin(units[name], pruned)).view(parameter.weight.shape)
        assert torch.equal(masks[name], kept_of(parameter) & is_kept), name


def block_of(weight: Tensor, shape: tuple[int, int]) -> Flat:
    """Returns the block of each element of a tensor, viewed as a matrix."""
    matrix = weight.flatten(1).shape
    rows, columns = shape[0] or matrix[0], shape[1]
    of_row, of_column = np.indices(tuple(matrix))
    grid: Flat = (of_row // rows) * -(-matrix[1] // columns) + of_column // columns
    return grid


@many
@given(
    model=MATRICES,
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 3)]),
    dim=st.sampled_from([0, 1, -1]),
    amount=st.floats(0, 1),
)
def test_n_m_groups_with_the_lowest_surplus_are_pruned(
    model: dict[str, Parameter], pattern: tuple[int, int], dim: int, amount: float
) -> None:
    choices = {"importance": L1, "granularity": NM(*pattern, dim)}
    masks, (choice,) = applied(model, rule(list(model), amount, **choices))
    surplus = [surplus_of(parameter, *pattern, dim) for parameter in model.values()]
    ranked = [
        Ranked([score for _, score in groups], [bool(extra) for extra, _ in groups])
        for groups in surplus
    ]
    count = round(amount * sizes(ranked)[1])
    chosen = choose(ranked, at_least(count))
    assert (choice.candidates, choice.requested) == (sizes(ranked)[1], count)
    assert choice.pruned == count
    for (name, parameter), groups, pruned in zip(
        model.items(), surplus, chosen.pruned, strict=True
    ):
        elements_of_groups = [at for group in pruned for at in groups[group][0]]
        assert torch.equal(masks[name], without(parameter, elements_of_groups)), name


def surplus_of(parameter: Parameter, n: int, m: int, dim: int) -> list[tuple[list[int], Fraction]]:
    """Returns for each group the elements beyond `n`, by flat index, and the mean of them."""
    shape, ranked = parameter.weight.shape, elements(parameter)
    index = np.arange(math.prod(shape)).reshape(tuple(shape))
    moved = np.moveaxis(index, dim, -1)
    groups = []
    for line in np.ndindex(moved.shape[:-1]):
        for first in range(0, shape[dim], m):
            group = moved[line][first : first + m].tolist()
            unpruned = sorted((ranked.scores[i], i) for i in group if ranked.candidates[i])
            extra = unpruned[: max(0, len(unpruned) - n)]
            mean = sum((s for s, _ in extra), Fraction(0)) / max(1, len(extra))
            # Units are numbered along a grid that has the groups along `dim`.
            place = list(line)
            place.insert(dim % len(shape), first // m)
            groups.append((place, [i for _, i in extra], mean))
    return [(extra, mean) for _, extra, mean in sorted(groups)]


NAMED = {
    name: Parameter(torch.arange(1.0, 13).view(3, 4))
    for name in ("conv1.weight", "conv2.weight", "fc.weight")
}


def resolved_rule(amount: Any, **choices: Any) -> Selection:
    (found,) = resolve(RequestContext(), [rule(["*"], amount, **choices)], catalog_of(NAMED))
    assert isinstance(found, Selection)
    return found


def test_the_first_matching_entry_of_a_table_applies() -> None:
    table = Table({"conv1.*": 0.25, "conv*": 0.5})
    found = resolved_rule(table, scope="tensor")
    masks, choices = applied(NAMED, found)
    assert [int((~mask).sum()) for mask in masks.values()] == [3, 6, 0]
    assert [choice.requested for choice in choices] == [3, 6, 0]


@pytest.mark.parametrize(
    ("amount", "choices", "field", "error"),
    [
        (
            Table({"conv*": 0.1, "x": 0.1}),
            {"scope": "tensor"},
            "table.entries[1].tensors",
            UnknownTensor,
        ),
        (Macs(1, {"conv1.weight": 1.0}), {}, "macs.per_unit", InvalidSpec),
        (
            Macs(1, {**dict.fromkeys(NAMED, 1.0), "x": 1.0}),
            {},
            "macs.per_unit['x']",
            UnknownTensor,
        ),
        (Bytes(1), {"granularity": NM(2, 4, 1)}, "bytes", AmountOutOfRange),
        (Bytes(1), {"granularity": Block((2, 4), as_matrix=True)}, "bytes", AmountOutOfRange),
    ],
)
def test_amounts_that_do_not_fit_the_tensors_are_an_error(
    amount: Any, choices: dict[str, Any], field: str, error: type[InvalidSpec]
) -> None:
    with pytest.raises(error) as caught:
        resolved_rule(amount, **choices)
    assert caught.value.field == f"rule.{field}"


def test_blocks_can_be_pruned_to_a_number_of_bytes() -> None:
    found = resolved_rule(Bytes(100), granularity=Block((3, 2), as_matrix=True))
    masks, (choice,) = applied(NAMED, found)
    assert choice.pruned == 2  # of 6 blocks of 24 bytes
    assert sum(int(mask.sum()) for mask in masks.values()) * 4 == 96


def test_amounts_and_rails_work_over_the_wire(channel: grpc.Channel) -> None:
    tensors = {name: parameter.weight for name, parameter in NAMED.items()}
    data = safetensors.torch.save(tensors)
    bounds = spec_pb2.GuardRails(rails=[spec_pb2.Rail(tensors=["conv*"], max_sparsity=0.25)])
    given = {"scope": spec_pb2.SCOPE_GLOBAL, "fraction": None, "bytes": 96, "guard_rails": bounds}
    first = raw.header("Prune", len(data), spec=raw.spec("*", **given))
    answer = raw.send(channel, "Prune", [raw.message("Prune", header=first, data=data)])
    report = answer[0].result.report
    (choice,) = report.rules[0].choices
    assert [tensor.pruned for tensor in report.tensors] == [3, 3, 6]
    assert (choice.candidates, choice.requested, choice.pruned) == (36, 12, 12)
    assert (choice.threshold, choice.ties, choice.ties_pruned) == (6.0, 3, 1)
    expected = [(name, "max_sparsity", 3) for name in ("conv1.weight", "conv2.weight")]
    assert [(b.tensor, b.rail, b.pruned) for b in choice.bounds] == expected
